"""A teacher behind a server: log-probabilities of rows of token ids, over the completions API of vLLM and others.

A log-probability is a logit whose logsumexp is 0, so q := log p(a) and max_q := max log p give the K-step returns of
the normalisation `logprob`. The mean of the logits is not known.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.console import one_line, say
from ketchup_cache.errors import MismatchError, ModelError, ServerError
from ketchup_cache.models.fingerprint import PROBES, tokenizer_info
from ketchup_cache.models.folders import resolve_folder
from ketchup_cache.models.load import is_encoder_decoder, load_tokenizer
from ketchup_cache.models.server import ENTRY_BYTES, MALFORMED, ROUNDING, Refused, Server
from ketchup_cache.provenance import Served, TeacherInfo
from ketchup_cache.types import TOKEN_DTYPE, Ragged, Rollouts, Scores, TopLogits

Form = Literal["prompt_logprobs", "echo"]
FORMS: tuple[Form, ...] = ("prompt_logprobs", "echo")
PROBE_TOKENS = 48
REPLICAS = "send all requests to one replica, or serve in a higher precision"
HOW = {
    "asked again": (0.0, 1, REPLICAS),
    "at another temperature": (2.0, 1, "have it give raw log-probabilities (vLLM: --logprobs-mode raw_logprobs)"),
    "among others": (0.0, 8, REPLICAS),
}
"""Ways to ask for a row in the self-test: temperature, requests at once, and what to do where the answer differs."""

Arrays = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], float]
"""log p of each token of a row after the first [L], the largest ones in its place [L, n], whose they are [L, n], and
the largest one after the last token."""


class ServedTeacher:
    """info: what its scores are filed under. tokenizer: what its token ids mean."""

    def __init__(self, config: ScoreConfig) -> None:
        """Meet the server, and test it. config.teacher: the folder with its tokenizer.

        Raises ModelError for an encoder-decoder model, for a server that does not have the model, gives fewer
        log-probabilities than asked for, or answers a row in more than one way; MismatchError where it reads texts
        otherwise; ServerError where it can't be reached.
        """
        self._config, self._server = config, Server("teacher", config)
        self._url, self._form = self._server.url, FORMS[0]
        name, trust = config.teacher, config.trust_remote_code
        tokenizer: Any = load_tokenizer(name, trust_remote_code=trust)
        known = (resolve_folder(name) / "config.json").is_file()
        ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
        if is_encoder_decoder(name, trust_remote_code=trust) if known else ends:
            raise ModelError(
                f"{name}: servers give no log-probabilities of an encoder-decoder; leave --teacher-url out"
            )
        self.tokenizer = tokenizer_info(tokenizer, name)
        self._longest = self._server.meet()
        self._compare_tokenizers(tokenizer)
        self.info = self._self_test(tokenizer)

    def score(
        self, prompts: Ragged, rollouts: Rollouts, keep_top: int = 0, rows: Any = None, on_batch: Any = None, **_: Any
    ) -> Scores:
        """As `Teacher.score`: one request a row, `in_flight` at once. Log-probabilities in place of logits; mean_q is
        −log(vocabulary), above which the mean of log-probabilities can't be.

        Raises MismatchError for rows that are longer than the server takes, before anything is sent. ServerError, with
        the rows that are done, where it fails for longer than `retry_for` seconds or answers what can't be.
        """
        names = np.arange(len(rollouts)) if rows is None else rows
        given = prompts.lengths[rollouts.prompt_index[names]]
        lengths = given + rollouts.completions.lengths[names]
        if self._longest and (lengths >= self._longest).any():
            what = f"rollout row {names[lengths.argmax()]} has {lengths.max():,} tokens with its prompt"
            raise MismatchError(f"{what}; {self._url} takes {self._longest - 1:,}: raise its --max-model-len")
        if not given.all():
            raise MismatchError(f"rollout row {names[given.argmin()]}: an empty prompt has no log-probability after it")

        def one(row: int, stop: Any) -> Scores:
            prompt, completion = prompts[rollouts.prompt_index[row]], rollouts.completions[row]
            found = self._ask([*prompt.tolist(), *completion.tolist()], keep_top, stop=stop)
            return self._scores(found, len(prompt) - 1, bool(rollouts.finished[row]), keep_top)

        done, failed = self._server.each(names.tolist(), one, lambda row: on_batch and on_batch(len(row.q)))
        whole = Scores.concatenate([Scores.empty(0, 0, keep_top), *done.values()])
        if failed:
            failed.places, failed.done = np.array([*done], np.int64), whole
            raise failed
        return whole

    def _scores(self, found: Arrays, first: int, finished: bool, keep_top: int) -> Scores:
        """Of one row, whose completion begins with the token that `first` others after the first one precede."""
        own, best, ids, after = found[0][first:], found[1][first:], found[2][first:], found[3]
        vocab_size, top = self.tokenizer.vocab_size, None
        if keep_top:
            if (ids >= vocab_size).any():
                raise ServerError(f"{self._url}: gives token id {ids.max()}, of {vocab_size:,}: set --teacher")
            others = vocab_size - keep_top
            # what is left of 1 is a rounding error where little is left: never more than others can have
            left = np.log(np.maximum(1 - np.exp(best).sum(1), np.finfo(np.float32).tiny))
            rest = np.minimum(left, best[:, -1] + math.log(others)) if others else np.full_like(own, -np.inf)
            top = TopLogits(best.astype(np.float32), ids.astype(TOKEN_DTYPE), rest.astype(np.float32))
        q, final = own.astype(np.float32), np.array([0 if finished else after], np.float32)
        mean_q = np.full_like(q, -math.log(vocab_size))
        return Scores(q, best[:, 0].astype(np.float32), np.zeros_like(q), mean_q, final, top)

    def _ask(self, ids: list[int], top: int = 0, *, temperature: float = 0.0, stop: Any = None) -> Arrays:
        """Raises ServerError."""
        n = max(top, 1)
        body: dict[str, Any] = {"prompt": ids, "max_tokens": 1, "logprobs": n, "temperature": temperature}
        body |= {"echo": True} if self._form == "echo" else {"prompt_logprobs": n, "return_token_ids": True}

        def read(choice: dict[str, Any]) -> Arrays:
            own, maps, after = (_by_text if self._form == "echo" else _by_id)(choice, ids)
            if any(len(at) < n for at in maps):
                raise ValueError(f"fewer than {n} log-probabilities of a token")
            pairs = [sorted(((q, i) for i, q in at.items()), reverse=True)[:n] for at in maps]
            best, tokens = np.moveaxis(np.array(pairs, np.float64).reshape(-1, n, 2), 2, 0)
            every = np.array([*own, *best.ravel(), after], np.float64)
            if not (np.isfinite(every).all() and every.max() <= ROUNDING):
                raise ValueError("a log-probability is NaN, infinite or above 0")
            if (np.exp(best).sum(1) > 1 + ROUNDING).any():
                raise ValueError("the probabilities of a position add up to more than 1")
            return every[: len(own)], best, tokens.astype(np.int64), after

        return self._server.complete(body, ENTRY_BYTES * (n + 3) * (len(ids) + 2), read, stop)

    def _compare_tokenizers(self, tokenizer: Any) -> None:
        """By its ids of texts (vLLM), or by how many it counts. Raises MismatchError."""
        for text in filter(None, PROBES):
            asked = {"model": self._server.name, "prompt": text}
            try:
                ours: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
                address = f"{self._url.removesuffix('/v1')}/tokenize"
                theirs = self._server.send(address, asked | {"add_special_tokens": False})["tokens"]
            except (Refused, *MALFORMED):
                ours = len(tokenizer(text)["input_ids"])
                answer = self._server.send(f"{self._url}/completions", asked | {"max_tokens": 1})
                theirs = answer.get("usage") if isinstance(answer, dict) else None
                theirs = theirs.get("prompt_tokens") if isinstance(theirs, dict) else None
            if ours != theirs:
                what = f"{self._url}: encodes {text!r} as {self._server.clean(theirs)}, not as {one_line(ours)}"
                raise MismatchError(f"{what}: its tokenizer is not that of {self.tokenizer.name}; set --teacher")

    def _find_form(self, ids: list[int]) -> None:
        """Ask by `prompt_logprobs`, or else by `echo`, which has no ids. Raises ModelError where that is not enough."""
        top, problems = min(self._config.keep_top, self.tokenizer.vocab_size), []
        for self._form in FORMS[: 1 if top else 2]:
            try:
                self._ask(ids, top)
                return
            except Refused as error:
                problems.append(str(error))
        todo = f"lower --keep-top, or start a vLLM with --max-logprobs {top}" if top else "serve it by vLLM"
        what = f"{self._url}: does not give the {max(top, 1)} largest log-probabilities of a prompt's tokens by id"
        raise ModelError(f"{what} ({'; by echo: '.join(problems)}): {todo}")

    def _self_test(self, tokenizer: Any) -> TeacherInfo:
        """Ask for the same rows in all ways. Raises ModelError where the answers differ by more than the limit."""
        rng, most = np.random.default_rng(0), min(PROBE_TOKENS, (self._longest or PROBE_TOKENS + 1) - 1)
        how: Any = {"add_special_tokens": False, "verbose": False}
        rows = [tokenizer(text * most, **how)["input_ids"][:most] for text in PROBES[:2]]
        plain = set(tokenizer.get_vocab().values()) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        # ids that no text has in this order show whether they go through a text
        rows += [rng.choice(sorted(plain), most).tolist() for _ in range(2)]
        self._find_form(rows[0])

        def answer(row: int, temperature: float = 0.0) -> NDArray[np.float64]:
            own, best, *_ = self._ask(rows[row], temperature=temperature)
            return np.stack([own, best[:, 0]])

        first, worst = [answer(row) for row in range(len(rows))], 0.0
        order = [int(row) for _ in range(2) for row in rng.permutation(len(rows))]
        for way, (temperature, at_once, todo) in HOW.items():
            with ThreadPoolExecutor(min(at_once, self._config.in_flight)) as pool:
                again = list(pool.map(lambda row, t=temperature: answer(row, t), order))
            apart = max(float(np.sqrt(np.mean((a - first[row]) ** 2))) for a, row in zip(again, order, strict=True))
            if apart > (limit := self._config.max_disagreement):
                what = f"{self._url}: {way}, its answer to a row differs by {apart:.2g} nats (root mean square)"
                raise ModelError(f"{what}, more than --max-disagreement {limit:g}: {todo}")
            worst = max(worst, apart)
        say(f"{self._url}: its answers to the same rows differ by {worst:.1g} nats (root mean square)")
        probe = np.stack([a.mean(1) for a in first], axis=1).ravel().round(4).tolist()
        said = [self._server.name, self.tokenizer.fingerprint, *map(round, probe)]
        served = Served(form=self._form, disagreement=float(f"{worst:.3g}"), probe=tuple(probe))
        fingerprint = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        return TeacherInfo(name=self._server.name, fingerprint=fingerprint, dtype="served", served=served)


Maps = tuple[list[float], list[dict[int, float]], float]
"""log p of each token after the first, those of the likeliest in its place, and the largest after the last."""


def _by_id(choice: dict[str, Any], ids: Sequence[int]) -> Maps:
    """What `prompt_logprobs` gives: {token id: {logprob, …}} of every token after the first."""
    given = choice["prompt_logprobs"]
    if len(given) != len(ids):
        raise ValueError(f"log-probabilities of {len(given)} positions for {len(ids)} token ids")
    maps = [{int(key): entry["logprob"] for key, entry in at.items()} for at in given[1:]]
    if missing := [i for i, at in zip(ids[1:], maps, strict=True) if i not in at]:
        raise ValueError(f"token id {missing[0]}, which it was sent, is not in it")
    own = [at[i] for i, at in zip(ids[1:], maps, strict=True)]
    return own, maps, max(choice["logprobs"]["top_logprobs"][-1].values())


def _by_text(choice: dict[str, Any], ids: Sequence[int]) -> Maps:
    """What `echo` gives: {text: log-probability} of every token after the first, and of the one that was written."""
    own, largest = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    if not len(own) == len(largest) == len(ids) + 1:
        raise ValueError(f"log-probabilities of {len(own)} positions for {len(ids)} token ids and one more")
    maps = [{-1: max(q, *at.values())} for q, at in zip(own[1:], largest[1:], strict=True)]
    return own[1:-1], maps[:-1], maps[-1][-1]
