"""`report`: runs in one HTML file that loads nothing, made from their folders and their caches (report.html).

Everything is a stranger's: data goes in as JSON without `<`, is made `visible`, and the page writes it as text alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import AnalyzeConfig, ReportConfig
from ketchup_cache.config.options import SelectOptions
from ketchup_cache.config.values import LOWER_IS_BETTER
from ketchup_cache.console import Report, one_line, printable, size_text
from ketchup_cache.errors import DataError, KetchupError
from ketchup_cache.evaluation.compare import read_outputs, targets_of, values_of_each
from ketchup_cache.evaluation.outputs import token_logprob
from ketchup_cache.files import write_file
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model
from ketchup_cache.report.analyze import analyze
from ketchup_cache.report.rows import Part, cache_of_run, load_part, parts, record, tokenizer_of
from ketchup_cache.text.tokens import visible
from ketchup_cache.training.dev import read_dev
from ketchup_cache.training.optimizer import all_rows
from ketchup_cache.training.records import unsealed
from ketchup_cache.version import TOOL

CURVES = {
    "return_mean": "Return G₁ of the rollouts (nats)",
    "reward_mean": "Task reward R of the rollouts",
    "variance": "Variance of the return that is learned from (nats²)",
    "length_mean": "Length of the rollouts (tokens)", "entropy": "Entropy of the policy (nats per token)",
    "ess": "Effective sample size (share)", "teacher_kl": "KL(student‖teacher) (nats per token)",
    "loss": "Loss (each method has its own)",
}  # fmt: skip
OF_FRESH = ("return_mean", "length_mean")
"""Curves that say nothing where the rollouts stay the same."""
TIMES = ("sample_s", "score_s", "load_s", "train_s")
POINTS, SAMPLES, LOGGED, TOKENS, TOP = 500, 500, 200, 12_000, 5
"""At most: of a curve, examples before and after, logged rollouts, tokens of all rollouts, choices of a token."""
TEXT = 1500
"""Bytes of a text at most; more are cut off, and marked."""
EDGE = 10
"""Steps at both ends that a return is a mean of; of a short run, half of its steps."""
Record = dict[str, Any]


@dataclass(frozen=True)
class PageReport(Report):
    """notes: what the page lacks, and why."""

    out: str
    runs: int
    samples: int
    rollouts: int
    bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs"
        what = f"{runs}, {self.samples} outputs before and after, {self.rollouts} rollouts by token"
        return "\n".join(map(printable, [f"{self.out}: {what}, {size_text(self.bytes)}; open it", *self.notes]))


def report(config: ReportConfig) -> PageReport:
    """Write the page. Raises ConfigError and DataError for what is no folder of a run, WriteError. A cache or a
    tokenizer that can't be opened costs the page its rollouts, and is noted."""
    once, share = [path.resolve().name for path in config.runs], len(config.runs)
    data: Record = {"tool": TOOL, "lower": LOWER_IS_BETTER, "curves": CURVES, "notes": [], "bias": []}
    data |= {"runs": [], "samples": [], "logged": [], "rollouts": [], "student": config.student}
    for i, path in enumerate(config.runs):
        name = once[i] if once.count(once[i]) == 1 else str(path)
        try:
            made = unsealed(path / "config.json")
            options = made["options"]
            run = _run(path, options) | {"name": name, "config": made}
            run["by"], samples = _samples(path, options, SAMPLES // share)
            logged = _some(json_lines(path / "samples.jsonl"), LOGGED // share)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: is no folder of a run ({type(error).__name__}: {one_line(error)})") from None
        rows: list[Record] = []
        try:
            cache = cache_of_run(path)
            found = list(parts(cache, SelectOptions(scored_by=options.get("scored_by")), unscored=False))
            run["cache"] = {"cache": cache.address, "segments": " ".join(id_[:12] for id_ in cache.segment_ids())}
            for kind, models in (("teacher", cache.teachers()), ("policy", cache.policies()[:1])):
                run["cache"] |= {kind: ", ".join(f"{model.name} ({model.fingerprint})" for model in models)}
            rows = _rollouts(path, cache, found, config, share)
            data["bias"] = data["bias"] or _bias(cache, found, options)
        except KetchupError as error:
            why = str(one_line(error)).removesuffix(": give a model that has it with --tokenizer")
            data["notes"].append(f"{name} has no token view ({why}).")
        data["runs"].append(run)
        for key, some in (("samples", samples), ("logged", logged), ("rollouts", rows)):
            data[key] += [row | {"run": i} for row in some]
    page = _html(data)
    write_file(config.out, page)
    counts = share, len(data["samples"]), len(data["rollouts"]), len(page)
    return PageReport(str(config.out), *counts, tuple(data["notes"]))


def _html(data: Any) -> bytes:
    """The policy lets the page's own script and style run, and nothing be loaded."""
    page = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    hashes = []
    for tag in ("style", "script"):
        text = page.split(f"<{tag}>\n")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(f"\n{text}".encode()).digest()).decode()
        hashes.append(f"{tag}-src 'sha256-{digest}'")
    policy = "; ".join(["default-src 'none'", *hashes, "base-uri 'none'", "form-action 'none'"])
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return page.replace("{{POLICY}}", policy).replace("{{DATA}}", text.replace("<", "\\u003c"), 1).encode()


def _plain(value: Any) -> Any:
    """Ready for the page: texts short and visible, numbers finite or null."""
    if isinstance(value, str):
        text = visible(value)
        return text if len(text.encode()) <= TEXT else text.encode()[:TEXT].decode(errors="ignore") + " … (cut)"
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(path: Path, options: Record) -> Record:
    """What its metrics and evaluations say. `returns` are of fresh rollouts alone: fixed ones say nothing of the
    student."""
    lines, devs = json_lines(path / "metrics.jsonl"), [line for _, line in read_dev(path) if line]
    for line in lines:
        line["variance"] = None if line.get("k_return_sd") is None else line["k_return_sd"] ** 2
    fresh = any(options.get(name) for name in ("teacher", "teacher_url", "scores_from"))
    shown = [key for key in CURVES if fresh or key not in OF_FRESH]
    points = {key: [(line["step"], line.get(key)) for line in lines] for key in shown}
    for key in devs[0]["metrics"] if devs else ():
        points[f"{key} on the dev set"] = [(line["step"], line["metrics"].get(key)) for line in devs]
    returns = [line["return_mean"] for line in lines if fresh and line.get("return_mean") is not None]
    edge = max(1, min(EDGE, len(returns) // 2))
    report = path / "report.json"
    said = json.loads(report.read_text(encoding="utf-8")).get("alarms", ()) if report.exists() else ()
    texts = {one["name"]: one["text"] for one in said}
    alarms = [(name, line["step"]) for line in [*lines, *devs] for name in line.get("alarms", ())]
    seconds = {key: round(sum(line.get(key, 0.0) for line in lines), 3) for key in TIMES}
    return {
        "curves": {key: thin for key, values in points.items() if (thin := _thin(values))[0]},
        "returns": [float(np.mean(part)) for part in (returns[:edge], returns[-edge:]) if part],
        "seconds": seconds | {"eval_s": round(sum(line["seconds"] for line in devs), 3)},
        "dev": [line for line in devs if line["best"] or line in (devs[0], devs[-1])],
        "alarms": [{"name": name, "step": step, "text": texts.get(name, "")} for name, step in alarms],
        "finished": report.exists(),
        "steps": len(lines),
    }


def _thin(points: Sequence[tuple[float, float | None]]) -> list[list[float]]:
    """Steps and values, as means of neighbours where there are too many."""
    known = np.array([point for point in points if point[1] is not None], float).reshape(-1, 2)
    known = known[np.isfinite(known).all(1)]
    some = np.array_split(known, POINTS) if len(known) > POINTS else known[:, None]
    return [[float(f"{part[:, column].mean():.5g}") for part in some] for column in (0, 1)]


def _samples(path: Path, options: Record, most: int) -> tuple[str, list[Record]]:
    """What the start and the best model wrote for the dev set, with the value of each, and the name of that."""
    files = [path / f"outputs-{name}.jsonl" for name in ("start", "best")]
    if not all(file.is_file() for file in files):
        return "", []
    before, after = map(read_outputs, files)
    targets = [row["target"] for row in before]
    if None in targets or len(after) != len(before):
        return "", []
    outputs = [[row["output"] for row in rows] for rows in (before, after)]
    refs = list(map(targets_of, before))
    by, values = values_of_each(options["metric"], outputs, refs, options.get("rouge_tokenizer") or "unicode")
    keys = ("row", "prompt", "reference", "before", "after", "was", "now")
    columns = range(len(targets)), [row["prompt"] for row in before], ["\n".join(of) for of in refs], *outputs, *values
    return by, [dict(zip(keys, row, strict=True)) for row in _some(list(zip(*columns, strict=True)), most)]


def _rollouts(path: Path, cache: Cache, found: Sequence[Part], config: ReportConfig, share: int) -> list[Record]:
    """Some of the scored rollouts, from all of the run alike. share: how many runs there are."""
    tokenizer, rows = tokenizer_of(cache, str(path / "last") if (path / "last").is_dir() else None), list[Record]()
    wanted = _some([(part, i) for part in found for i in range(part[2] - part[1])], config.rollouts // share)
    tokens = TOKENS // share
    if config.student:
        model = load_model(
            name := str(path / config.student), device=config.device, trust_remote_code=config.trust_remote_code
        )
        head = Head.of(model, tokenizer_info(tokenizer, name).vocab_size)
    for part in dict.fromkeys(part for part, _ in wanted):
        joined, chosen = load_part(cache, part), [i for other, i in wanted if other == part]
        if config.student:
            batch = all_rows(joined.take(np.array(chosen)))
            ends = np.cumsum(batch.completions.lengths)[:-1]
            now = dict(zip(chosen, np.split(token_logprob(model, head, batch), ends), strict=True))
        for i in chosen:
            rows.append(record(joined, i, part, tokenizer, TOP))
            if config.student:
                rows[-1]["student_logprob"] = [round(float(value), 5) for value in now[i]]
            if (tokens := tokens - len(rows[-1]["ids"])) < 0:
                return rows[:-1]
    return [row for row in rows if row["ids"]]


def _bias(cache: Cache, found: Sequence[Part], options: Record) -> list[Record]:
    """`analyze` of the first policy with several samples of a prompt."""
    several = [ref for *_, ref in found if ref and ref.samples > 1]
    if not several:
        return []
    how = {key: options[key] for key in ("tail", "normalization", "unfinished") if key in options}
    ref = several[0]
    config = AnalyzeConfig(cache=cache.address, policy=ref.policy.fingerprint, scored_by=ref.teacher.fingerprint, **how)
    return list(analyze(config).policies)


def _some(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many, from first to last."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))] if rows else []


def json_lines(path: Path) -> list[Record]:
    """Those that are whole. Raises ValueError."""
    text = path.read_bytes() if path.is_file() else b""
    return [dict(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
