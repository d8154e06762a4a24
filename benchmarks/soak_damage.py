"""Damaged and hostile input of `benchmarks/soak.py`: folders of runs, forged segments, configs, models and servers."""

from __future__ import annotations

import http.server
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from ketchup_cache import open_cache
from ketchup_cache.cli import main
from ketchup_cache.errors import KetchupError
from ketchup_cache.sharing import stores
from ketchup_cache.training.learn import learn
from tests.helpers.caches import make_cache
from tests.helpers.hostile import HOSTILE, Payload, altered, forge
from tests.helpers.learning import config, killed_before
from tests.helpers.models import save_model, write_prompts
from tests.helpers.segments import exit_code, fill, in_child, load_all
from tests.helpers.trust import Count

SLOW_S, MUCH_BYTES = 20.0, 2**30


def run_folders(folder: Path, cases: int, seed: int) -> Count:
    """One bit or byte of a run that was killed, in a file that it goes on from; then the same command.

    refused: in one line that names the run. harmless: it went on to the same weights. accepted: to others.
    """
    models = tuple(save_model(folder / name, "1.0", seed=i) for i, name in enumerate(("student", "teacher")))
    make_cache(folder / "cache", *models, prompts=8)
    options = config(folder, models, steps=4, checkpoint_every=1, unfinished="bootstrap")
    with killed_before(2):
        learn(options)
    shutil.copytree(options.out, base := folder / "base")
    wanted = learn(options).fingerprint
    newest = sorted((base / "checkpoints").iterdir())[-1]
    paths = [base / "config.json", base / "metrics.jsonl", *newest.iterdir()]
    rng, count = random.Random(seed), Count(cases=0, refused=0, harmless=0, accepted=0, unclear=0)
    for case in range(cases):
        shutil.rmtree(options.out)
        shutil.copytree(base, options.out)
        path = options.out / paths[case % len(paths)].relative_to(base)
        damaged = bytearray(path.read_bytes())
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8) if case % 2 else rng.randrange(1, 256)
        path.write_bytes(damaged)
        count.cases += 1
        try:
            same = learn(options).fingerprint == wanted
            count.harmless, count.accepted = count.harmless + same, count.accepted + (not same)
        except KetchupError as error:
            count.refused += 1
            count.unclear += "\n" in str(error) or str(options.out) not in str(error)
    return count


NONSENSE = (
    (0, ("tokens", "offsets")),
    (1, ("completion_tokens", "completion_offsets", "prompt_index", "behavior_logprob")),
    (2, ("q", "max_q", "logsumexp", "mean_q", "final_max_q")),
)
"""Member of a family of segments, and arrays of it in which neither an infinity nor the largest integer may be."""


def nonsense(array: np.ndarray) -> Any:
    return np.inf if array.dtype.kind == "f" else np.iinfo(array.dtype).max


def forged(folder: Path, cases: int, seed: int) -> Count:
    """Segments whose hashes are all right: the whole list of the tests, in both versions, then nonsense somewhere."""
    rng, count = random.Random(seed), Count(cases=0, refused=0, accepted=0, unclear=0, slow=0)
    known = [(0, change, version) for change, _ in HOSTILE.values() for version in (1, 2)]
    rng.shuffle(known)
    for case in range(cases):
        root = folder / f"forged {case}"
        ids = fill(root)
        if case < cases // 2 and known:
            member, change, version = known.pop()
        else:
            member, names = rng.choice(NONSENSE)
            change, version = altered(rng.choice(names), rng.randrange(3), nonsense), rng.choice((1, 2))
        forge(open_cache(root), ids[member], change, version=version)
        began = time.monotonic()
        count.cases += 1
        try:
            load_all(root)
            count.accepted += 1
        except KetchupError as error:
            count.refused += 1
            count.unclear += "\n" in str(error) or str(root) not in str(error)
        count.slow += time.monotonic() - began > 1
        shutil.rmtree(root)
    return count


# ------------------------------------------------------------------------------------------ configs, models, servers


def hostile(folder: Path) -> Count:
    """unclear: not one line and exit code 2. slow: more than 20 s, or than a gigabyte of memory."""
    count = Count(cases=0, refused=0, unclear=0, slow=0)
    student, data = save_model(folder / "student", "1.0"), write_prompts(folder / "data.jsonl", 4)
    evaluate = ("evaluate", "--data", data, "--max-new-tokens", "4", "--device", "cpu", "--model")
    _main([*evaluate, student])  # so that children are forked after the imports
    for number, text in enumerate(CONFIGS):
        (file := folder / f"{number}.yaml").write_bytes(text) if text else os.mkfifo(file := folder / f"{number}.yaml")
        _judge(count, folder, f"config {number}", ["learn", "--student", student, "--cache", folder, "--config", file])
    for name, change in MODELS.items():
        shutil.copytree(student, model := folder / name)
        change(model)
        _judge(count, folder, f"model: {name}", [*evaluate, model])
        shutil.rmtree(model)
    for name, answer in SERVERS.items():
        with _serving(answer) as url:
            _judge(count, folder, f"server: {name}", ["pull", url, folder / "pulled"])
    return count


def _main(words: list[Any]) -> tuple[int, list[str]]:
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    return code, said.getvalue().splitlines()


def _judge(count: Count, folder: Path, name: str, words: list[Any]) -> None:
    log = folder / "log.json"
    log.unlink(missing_ok=True)

    def work() -> None:
        signal.alarm(round(2 * SLOW_S))
        stores.FIRST_PAUSE_S, stores.REQUEST_S, stores.IDLE_S = 0.01, 1.0, 1.0
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        code, lines = _main(words)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        log.write_text(json.dumps([code, lines, time.monotonic() - began, grown]))

    exit_code(in_child(work))
    code, lines, seconds, grown = json.loads(log.read_text()) if log.exists() else (None, [], 2 * SLOW_S, 0)
    fine = code == 2 and len(lines) == 1 and all(c.isprintable() for c in lines[0])
    slow = seconds > SLOW_S or grown > MUCH_BYTES
    count.cases, count.refused, count.unclear = count.cases + 1, count.refused + fine, count.unclear + (not fine)
    count.slow += slow
    if slow or not fine:
        print(f"  {name}: code {code}, {seconds:.1f} s, {grown:,} bytes: {lines[:3]}", flush=True)


CONFIGS: list[bytes] = [
    b"", b"a: &a [x]\nb: [*a, *a]", b"k: " + b"[" * 9_000, b"{" * 9_000, b"k: 1\n" * 50_000, b"k: " + b"9" * 50_000,
    b"k: 2026-99-99", b"k: !!python/object/apply:os.system [ls]", b"- a\n- b", b"\xff\xfe\x00", b"learn: [1]",
    b"extends: ../../etc/passwd", b"k: \x1b[2J", b"'\\e[2Jlr': 1", b"lr: .nan", b"steps: 1e400",
]  # fmt: skip
"""The first is a named pipe."""


def _said(**values: object) -> Callable[[Path], object]:
    """config.json with other values."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def _cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pipe(name: str) -> Callable[[Path], object]:
    return lambda model: ((model / name).unlink(), os.mkfifo(model / name))


def _pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def _outside(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')


MODELS: dict[str, Callable[[Path], object]] = {
    "deep config": _written("config.json", b"[" * 100_000),
    "a list": _written("config.json", b"[]"),
    "no JSON": _written("config.json", b"\xff\x00"),
    "a huge vocabulary": _said(vocab_size=10**12),
    "a million layers": _said(num_layers=10**6, num_decoder_layers=10**6),
    "a negative size": _said(d_model=-1),
    "a huge size": _said(d_model=10**9),
    "a text for a size": _said(d_model="x"),
    "an unknown type": _said(model_type="\x1b[2J"),
    "a vision model": _said(model_type="vit"),
    "code of its own": _said(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "no such dtype": _said(dtype="float7"),
    "a pipe for its config": _pipe("config.json"),
    "a pipe for its weights": _pipe("model.safetensors"),
    "a pipe for its tokenizer": _pipe("tokenizer.json"),
    "cut weights": _cut,
    "a huge header": _written("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
    "a deep header": _written("model.safetensors", (10**5).to_bytes(8, "little") + b"[" * 10**5),
    "empty weights": _written("model.safetensors", b""),
    "pickled weights": _pickled,
    "weights from elsewhere": _outside,
    "no tokenizer": lambda model: (model / "tokenizer.json").unlink(),
    "a deep tokenizer": _written("tokenizer.json", b"[" * 100_000),
    "an empty tokenizer": _written("tokenizer.json", b"{}"),
    "a deep record of its training": _written("ketchup-cache-origin.json", b"[" * 100_000),
}  # fmt: skip

Handler = Callable[[http.server.BaseHTTPRequestHandler], object]


def _page(body: bytes, code: int = 200, **headers: str) -> Handler:
    def answer(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(code)
        for name, value in headers.items():
            to.send_header(name.replace("_", "-"), value)
        to.end_headers()
        to.wfile.write(body)

    return answer


def _endless(piece: bytes, pause_s: float) -> Handler:
    def answer(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        for _ in itertools.count():
            to.wfile.write(piece)
            time.sleep(pause_s)

    return answer


MARK = b'{"format":"ketchup-cache","version":2}'
SERVERS: dict[str, Handler] = {
    "not found": _page(b"", 404), "forbidden": _page(b"", 403), "broken": _page(b"\x1b[2J", 500),
    "a login page": _page(b"<html>Log in</html>"), "nothing": _page(b""), "another format": _page(b'{"format":"x"}'),
    "a newer version": _page(MARK.replace(b"2", b"99")), "deep JSON": _page(b"[" * 60_000),
    "a marker for everything": _page(MARK), "endless": _endless(b" " * 2**16, 0), "slow": _endless(b" ", 0.05),
    "a loop": _page(b"", 302, Location="/"), "elsewhere": _page(b"", 302, Location="http://169.254.169.254/"),
    "a file": _page(b"", 302, Location="file:///etc/passwd"), "too short": _page(MARK, Content_Length="1000"),
    "no HTTP": lambda to: to.wfile.write(b"\x00" * 100), "hangs up": lambda to: to.connection.close(),
    "steers": _page(b"", 302, Location="http://\x1b[2J/"),
}  # fmt: skip


@contextmanager
def _serving(answer: Handler) -> Iterator[str]:
    class Server(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            answer(self)

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that has gone."""

    server = Quiet(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
