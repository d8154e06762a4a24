"""A completions server over a tiny model in this process, which speaks as vLLM and as older ones, and fails on request.

Its log-probabilities come from the model's own forward pass over the row alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import transformers


class Server:
    """processed: whether it gives log-probabilities after temperature, top-k and top-p. reads: what it makes of the ids
    that it is sent. bends: what it makes of [L, V] log-probabilities, given the request. fault: given the request's
    number, what it does in place of an answer. changes: what it makes of an answer. dev: whether it takes weights;
    False where it says that it does. updates: the models that it was given.
    """

    def __init__(self, model: Any, tokenizer: Any, vocab: int = 60) -> None:
        self.model, self.tokenizer, self.vocab = model, tokenizer, vocab
        self.name, self.longest, self.most, self.old, self.tokenizes = "tiny", 64, 20, False, True
        self.processed, self.dev = False, None
        self.updates: list[Any] = []
        self.reads: Callable[[list[int]], list[int]] = list
        self.bends: Callable[[torch.Tensor, dict], torch.Tensor] = lambda logprob, body: logprob
        self.fault: Callable[[int], Any] = lambda number: None
        self.changes: Callable[[dict], Any] = lambda answer: answer
        self.requests: list[dict] = []
        self.keys: set[str | None] = set()
        self._lock = threading.Lock()

    @torch.no_grad()
    def draw(self, body: dict) -> dict:
        """Tokens one after the other, each from a pass over the row so far."""
        generator, given, ids = torch.Generator().manual_seed(body["seed"]), [], self.reads(body["prompt"])
        tokens: list[int] = []
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            with self._lock:
                logits = self.model(torch.tensor([ids + tokens])).logits[0, -1].double()
            for i, bias in body.get("logit_bias", {}).items():
                logits[int(i)] += bias
            raw, scaled = logits.log_softmax(-1), logits / (body["temperature"] or 1)
            if 0 < body["top_k"] < len(scaled):
                scaled[scaled < scaled.sort().values[-body["top_k"]]] = -torch.inf
            largest, order = scaled.softmax(-1).sort(descending=True)
            scaled[order[largest.cumsum(0) - largest >= body["top_p"]]] = -torch.inf
            p = scaled.softmax(-1)
            token = int(p.multinomial(1, generator=generator) if body["temperature"] else p.argmax())
            logprob = self.bends((p.log() if self.processed else raw)[None], body)[0]
            tokens.append(token)
            given.append(float(logprob[token]))
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": given}, "prompt_token_ids": ids}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    @torch.no_grad()
    def complete(self, body: dict) -> Any:
        text = isinstance(body["prompt"], str)
        ids = self.reads(self.tokenizer(body["prompt"])["input_ids"] if text else body["prompt"])
        with self._lock:
            logits = self.model(torch.tensor([ids])).logits[0, :, : self.vocab]
        logprob = self.bends(logits.log_softmax(-1), body)
        n = body.get("logprobs") if self.old else body.get("prompt_logprobs")
        if (n or 0) > self.most:
            return 400, {}, f"Requested {n} logprobs, but at most {self.most} are given"
        words = [f"<{i}>" for i in range(self.vocab)]
        after = {words[int(logprob[-1].argmax())]: float(logprob[-1].max())}
        choice: dict[str, Any] = {"text": "", "logprobs": {"top_logprobs": [after]}}
        own = [float(row[i]) for row, i in zip(logprob, ids[1:], strict=False)]
        top = [row.topk(n or 1) for row in logprob[:-1]]
        if self.old and body.get("echo"):
            of = [dict(zip([words[i] for i in t.indices], t.values.tolist(), strict=True)) for t in top]
            of = [found | {words[i]: q} for found, i, q in zip(of, ids[1:], own, strict=True)]
            choice["logprobs"] = {"token_logprobs": [None, *own, *after.values()], "top_logprobs": [None, *of, after]}
        elif not self.old and n:
            maps = [{str(int(i)): {"logprob": float(x)} for i, x in zip(t.indices, t.values, strict=True)} for t in top]
            maps = [at | {str(i): {"logprob": q}} for at, i, q in zip(maps, ids[1:], own, strict=True)]
            choice |= {"prompt_logprobs": [None, *maps], "prompt_token_ids": ids}
        return self.changes({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})

    def answer(self, path: str, body: dict) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": self.name, "max_model_len": self.longest}]}
        if path == "/tokenize":
            given = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return {"tokens": given} if self.tokenizes else (404, {}, "Not Found")
        if path in ("/collective_rpc", "/reset_prefix_cache") and self.dev is not None:
            if weights := body.get("kwargs", {}).get("weights_path") if self.dev else None:
                self.model = transformers.AutoModelForCausalLM.from_pretrained(weights)
                self.updates.append(self.model)
            return {"success": True} if path == "/reset_prefix_cache" else {"results": [None]}
        if not path.startswith("/v1/"):
            return 404, {}, "Not Found"
        with self._lock:
            self.requests.append(body)
            number = len(self.requests)
        if fault := self.fault(number):
            return fault
        return self.changes(self.draw(body)) if "seed" in body else self.complete(body)


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Address of its API while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            server.keys.add(self.headers.get("authorization"))
            made = server.answer(self.path, json.loads(raw or b"{}"))
            if made == "close":
                self.close_connection = True
                return
            if isinstance(made, float):
                time.sleep(made)
                made = {}
            status, headers, text = made if isinstance(made, tuple) else (200, {}, made)
            content = (text if isinstance(text, str) else json.dumps(text)).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join(10)
