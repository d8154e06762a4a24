"""What the benchmarks share: the length mix, random-weight models, made-up caches, peak memory, tables and JSON.

Every script here answers one question, prints a Markdown table and writes `benchmarks/results/NAME.json`. A figure is a
ratio against its reference in the same run. With `--short` (`make bench`) it does the same on less.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo, ScoresInfo
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TeacherInfo, TokenizerInfo
from ketchup_cache.types import Prompts, Ragged, Rollouts, ScoredRollouts, Scores
from ketchup_cache.version import __version__

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
VOCAB = 32_100
"""T5's tokenizer; its head has 28 rows more."""
T5_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
FLAN_T5_XL = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
QWEN2_SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
               "num_key_value_heads": 8, "max_position_embeddings": 2048}  # fmt: skip
"""A decoder-only model with about as many weights in its body as T5-small."""
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}


def options(description: str | None, **more: tuple[Any, str]) -> argparse.Namespace:
    """`--short`, `--out`, and the given ones: name=(default, help)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the same on less, in under a minute or two")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/NAME.json; --short: none)")
    for name, (default, text) in more.items():
        flag = "--" + name.replace("_", "-")
        if default is False:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------- data


def prompt_lengths(rng: np.random.Generator, n: int) -> np.ndarray:
    """Log-normal around 180 tokens, up to 1024."""
    return np.clip(rng.lognormal(np.log(180), 0.5, n), 8, 1024).astype(np.int64)


def completion_lengths(rng: np.random.Generator, n: int) -> np.ndarray:
    """25 ± 8 tokens, up to 64."""
    return np.clip(rng.normal(25, 8, n), 2, 64).round().astype(np.int64)


def sample(
    seed: int, rollouts: int, *, samples: int = 4, first: int = 0, vocab: int = VOCAB, length: int = 0
) -> ScoredRollouts:
    """Scored rollouts of made-up tokens, `samples` of each prompt, in the realistic mix of lengths or all of one.

    Like a teacher's scores: the student mostly picks the best token; T5-sized logits; Zipf-distributed ids.
    """
    rng = np.random.default_rng([seed, first])
    prompts = -(-rollouts // samples)
    lengths, completions = prompt_lengths(rng, prompts), completion_lengths(rng, rollouts)
    if length:
        completions = np.full(rollouts, length)
    tokens = int(completions.sum())

    def ids(n: int) -> np.ndarray:
        return np.minimum(rng.zipf(1.3, n), vocab - 1).astype(np.int32)

    names = np.arange(first, first + prompts, dtype=np.int64)
    digests = np.zeros((prompts, 16), np.uint8)
    digests[:, :8] = names[:, None].view(np.uint8)
    max_q = rng.normal(-2, 6, tokens).astype(np.float32)
    gap = np.where(rng.random(tokens) < 0.6, 0, rng.exponential(3, tokens)).astype(np.float32)
    behavior = -rng.exponential(1, tokens).astype(np.float32)
    return ScoredRollouts(
        Prompts(digests, Ragged.from_lengths(ids(int(lengths.sum())), lengths)),
        Rollouts(
            np.repeat(np.arange(prompts), samples)[:rollouts],
            Ragged.from_lengths(ids(tokens), completions),
            behavior,
            np.zeros(tokens, np.bool_),
            np.ones(rollouts, np.bool_),
        ),
        Scores(
            max_q - gap,
            max_q,
            max_q + np.minimum(rng.exponential(1, tokens), 10).astype(np.float32),
            max_q - 20 + rng.normal(0, 3, tokens).astype(np.float32),
            np.zeros(rollouts, np.float32),
        ),
    )


def made_up_rollouts(prompt_index: np.ndarray, completions: Ragged) -> Rollouts:
    """Finished rollouts of nobody's, for what looks at their tokens alone."""
    tokens = len(completions.values)
    return Rollouts(
        prompt_index,
        completions,
        np.zeros(tokens, np.float32),
        np.zeros(tokens, np.bool_),
        np.ones(len(completions), np.bool_),
    )


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def made_up_cache(path: Path, tokens: int, *, segment_tokens: int = 262_144, samples: int = 4) -> Cache:
    """A cache of at least `tokens` scored completion tokens: prompts, rollouts and scores segments of one size.

    The size is that of `score`'s segments by default. Contents repeat after 8 segments, which no reader can know.
    """
    cache = open_cache(path, create=True)
    rows = max(samples, segment_tokens // 25 // samples * samples)
    kinds: list[ScoredRollouts] = []
    done, start, number = 0, 0, 0
    while done < tokens:
        if len(kinds) < 8:
            kinds.append(sample(0, rows, samples=samples, first=number * rows))
        part = kinds[number % 8]
        cache.commit_scores(part.scores, commit_rollouts(cache, part, start=start, samples=samples))
        done, start, number = done + len(part.scores.q), start + len(part.prompts), number + 1
    return cache


T5_TOKENIZER = TokenizerInfo(name="t5", fingerprint=fingerprint("t5"), vocab_size=VOCAB)


def commit_rollouts(
    cache: Cache, part: ScoredRollouts, *, start: int = 0, samples: int = 4, tokenizer: TokenizerInfo = T5_TOKENIZER
) -> ScoresInfo:
    """Commit made-up prompts, the first of which is number `start`, and their rollouts; returns how their scores are to
    be described."""
    data = DataInfo(name="made up", fingerprint=fingerprint("made up"), template="{prompt}")
    policy = PolicyInfo(name="student", fingerprint=fingerprint("student"))
    teacher = TeacherInfo(name="teacher", fingerprint=fingerprint("teacher"), dtype="float32")
    prompts = cache.commit_prompts(part.prompts, PromptsInfo(tokenizer=tokenizer, data=data, start=start))
    info = RolloutsInfo(
        prompts=prompts,
        prompt_start=0,
        prompt_stop=len(part.prompts),
        policy=policy,
        tokenizer=tokenizer,
        sampling=Sampling(samples=samples),
    )
    rollouts = cache.commit_rollouts(part.rollouts, info)
    return ScoresInfo(rollouts=rollouts, row_start=0, row_stop=len(part), teacher=teacher, tokenizer=tokenizer)


# ------------------------------------------------------------------------------------------------------- models


def t5(shape: Mapping[str, int], *, seed: int = 0, vocab_size: int = VOCAB + 28, **more: Any) -> Any:
    """A T5 of random weights."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(vocab_size=vocab_size, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **shape, **more)
    return T5ForConditionalGeneration(config).eval()


def qwen2(shape: Mapping[str, int], *, seed: int = 0) -> Any:
    """A decoder-only model of random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, eos_token_id=1, pad_token_id=0, **shape)).eval()


def needed_operations(model: Any, prompt_tokens: int, tokens: int) -> float:
    """What scoring takes at least: two operations for each weight that a token passes. Encoder, and cross-attention
    keys and values, for each prompt token once; decoder and head for each completion token. Products of token pairs
    (attention) are not counted. A decoder-only model reads each prompt once."""
    config = model.config
    if not config.is_encoder_decoder:
        body = sum(
            p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "head" not in name
        )
        return 2.0 * ((int(prompt_tokens) + tokens) * body + tokens * config.hidden_size * VOCAB)
    cross = config.num_decoder_layers * 2 * config.d_model * config.d_kv * config.num_heads
    encoder = sum(p.numel() for name, p in model.encoder.named_parameters() if "embed_tokens" not in name)
    decoder = sum(p.numel() for name, p in model.decoder.named_parameters() if "embed_tokens" not in name)
    return 2.0 * (int(prompt_tokens) * (encoder + cross) + tokens * (decoder - cross + config.d_model * VOCAB))


def word_tokenizer(vocab: int = VOCAB) -> Any:
    """Words w3, w4, … as tokens; </s> is appended."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, vocab))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# -------------------------------------------------------------------------------------------------- measuring


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, CPU seconds of this process, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median wall seconds of each, taken in turn, so that what else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call)[0])
    return {name: statistics.median(values) for name, values in times.items()}


def rss() -> int:
    """Resident memory of this process now, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> int:
    """Start the high-water mark of resident memory anew; returns the resident memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return rss()


def peak() -> int:
    """Most resident memory since `forget_peak`, or since the start, bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


LAUNCH = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, done.stdout]))
"""


def run(*words: object) -> dict[str, Any]:
    """A command in a process of its own: its wall seconds, CPU seconds, peak resident memory in bytes, and output.

    A small process starts it: Linux charges a new process with the peak of the one that it was forked from.
    """
    command = [sys.executable, "-c", LAUNCH, *(str(word) for word in words)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    seconds = time.perf_counter() - began
    code, cpu, peak_bytes, output = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command[3:])} failed:\n{done.stderr.decode()[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes, "output": output}


def tool(*words: object) -> dict[str, float]:
    """`ketchup-cache …` in a process of its own."""
    found = run(sys.executable, "-m", "ketchup_cache", *words)
    del found["output"]
    return found


# ---------------------------------------------------------------------------------------------------- reporting


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, {platform.system()}"


def results_file(name: str, where: argparse.Namespace) -> Path | None:
    return where.out or (None if where.short else RESULTS / f"{name}.json")


def held(name: str, where: argparse.Namespace) -> dict[str, Any]:
    """What the results file holds so far, for a script that measures some of its parts anew. Nothing: {}."""
    path = results_file(name, where)
    found: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    return found


def merged(
    before: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], key: Sequence[str] = ("name",)
) -> list[dict[str, Any]]:
    """The runs of a results file, with those that were run again replaced; what a new one leaves open stays."""
    found = {tuple(run[part] for part in key): dict(run) for run in before}
    for run in new:
        place = tuple(run[part] for part in key)
        found[place] = found.get(place, {}) | run
    return list(found.values())


def publish(name: str, where: argparse.Namespace, **results: Any) -> None:
    """Write the results with machine, versions and date. The load says how busy the machine was with other things."""
    path = results_file(name, where)
    if path is None:
        return
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "zarr")}
    record = {
        "benchmark": f"benchmarks/{name}.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "load": round(os.getloadavg()[1], 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or None,
        "versions": {"ketchup-cache": __version__, "python": platform.python_version(), **versions},
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=float) + "\n")
    print(f"\n→ {path}")
