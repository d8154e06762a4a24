"""One run: learn with the tool's own commands, evaluate on the test split, keep what they print as a record.

A record is written when its run is finished and never again: stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.settings import KEEP_TOP, LENGTHS, SIZES, TASKS, Options, Row, Student, Task

DATA = Path("data")
TAILS = ("one-step", "jump")
"""Figure 2 is drawn for each: with the first, a K that is long for the completions is partly K = 1 again."""
CURVE = ("step", "return_mean", "return_sd", "k_return_sd", "length_mean", "teacher_kl", "ess")
"""What is kept of each optimizer step."""
STUDENTS = {student.name: student for student in (*LENGTHS, *SIZES)}


@dataclass(frozen=True)
class Run:
    """row None: the model itself, as it is ("teacher", or a student's name)."""

    task: str
    row: Row | None
    seed: int = 0
    model: str = ""
    split: str = "test"
    """What it is evaluated on."""

    @property
    def name(self) -> str:
        return self.row.name if self.row else self.model

    @property
    def key(self) -> str:
        """Of everything that decides its result, but for the program and the weights."""
        parts = [self.task, self.name, self.seed, self.row.learning(TASKS[self.task], self.seed) if self.row else {}]
        if self.row:
            made = STUDENTS.get(self.row.student)
            parts.append(asdict(made) if made else self.row.student)
        if self.split != "test":
            parts.append(self.split)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Tool:
    """The command line, run in this process (its imports take seconds), and the commands it was given."""

    def __init__(self, log: Path) -> None:
        self.log, self.commands = log, []
        log.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, command: str, **options: Any) -> dict[str, Any]:
        """Run a command with `--json`. Raises RuntimeError where it fails."""
        from ketchup_cache.cli import main

        words = [command, *words_of(options)]
        self.commands.append(" ".join(["ketchup-cache", *words]))
        with self.log.open("a", encoding="utf-8") as log, redirect_stderr(log), redirect_stdout(io.StringIO()) as out:
            print("$", self.commands[-1], file=log, flush=True)
            code = main([*words, "--json"])
        if code:
            raise RuntimeError(f"{self.commands[-1]}: failed, see {self.log}")
        return json.loads(out.getvalue())


def words_of(options: Options) -> Iterator[str]:
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", str(value))


# ------------------------------------------------------------------------------------------------- what runs share


def student_folder(task: Task, name: str, work: Path) -> Path:
    """The shipped student, or one that is made here: pre-distilled for another time, or of another size."""
    shipped = DATA / task.name / name
    if shipped.exists():
        return shipped
    made = work / task.name / "students" / name
    with _once(made) as missing:
        if missing:
            _make_student(task, STUDENTS[name], made, work)
    return made / "best"


def _make_student(task: Task, student: Student, out: Path, work: Path) -> None:
    start = DATA / task.name / "student"
    if student.size:
        start = _resized(start, student.size, out.with_name(f"{out.name}-untrained"))
    tool = Tool(out.with_suffix(".log"))
    outputs = teacher_outputs(task, work)
    tool("pretrain", model=start, cache=outputs, policy=DATA / task.name / "teacher", out=out,
         **{**task.pretrain, "epochs": round(task.pretrain["epochs"] * student.share), **student.pretrain})  # fmt: skip


def _resized(student: Path, size: Options, out: Path) -> Path:
    """An untrained student like the shipped one, with other numbers in its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(student)
    for key, value in size.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.generation_config = GenerationConfig.from_pretrained(student)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(student).save_pretrained(out)
    return out


def teacher_outputs(task: Task, work: Path) -> Path:
    """A cache with the teacher's greedy outputs for the labelled prompts."""
    cache = work / task.name / "outputs"
    with _once(cache) as missing:
        if missing:
            folder = DATA / task.name
            Tool(cache.with_suffix(".log"))("rollout", student=folder / "teacher", greedy=True,
                data=folder / "prompts.jsonl", limit=task.labelled, cache=cache, **task.decoding)  # fmt: skip
    return cache


def scored_outputs(task: Task, work: Path) -> Path:
    """The same, scored by the teacher, with what the divergences need of its logits."""
    cache = work / task.name / "scored-outputs"
    with _once(cache) as missing:
        if missing:
            shutil.copytree(teacher_outputs(task, work), cache)
            tool = Tool(cache.with_suffix(".log"))
            tool("score", teacher=DATA / task.name / "teacher", cache=cache, keep_top=KEEP_TOP)
    return cache


def begun_cache(task: Task, row: Row, seed: int, work: Path) -> Path:
    """A scored cache that a run starts from, shared by all rows that begin alike: score once, learn many times."""
    if not row.needs_samples:
        return scored_outputs(task, work)
    options = row.learning(task, seed)
    sampling = {key: options[key] for key in ("samples", "greedy", "seed", "max_new_tokens") if key in options}
    first = row.fresh_rollouts(options) // options["samples"]
    kept = options.get("keep_top", 0)
    marks = [*(f"{key}={value}" for key, value in sorted(sampling.items())), f"first={first}"]
    marks += [f"keep_top={kept}"] if kept and not row.needs_outputs else []
    cache = work / task.name / "begun" / "-".join([row.student, *marks, *(["outputs"] if row.needs_outputs else [])])
    with _once(cache) as missing:
        if missing:
            folder, tool = DATA / task.name, Tool(cache.with_suffix(".log"))
            if row.needs_outputs:
                shutil.copytree(scored_outputs(task, work), cache)
            tool("rollout", student=student_folder(task, row.student, work), data=folder / "prompts.jsonl",
                 skip=task.labelled, first=first, cache=cache, **{**task.decoding, **sampling})  # fmt: skip
            tool("score", teacher=folder / "teacher", cache=cache, keep_top=kept)
    return cache


@contextmanager
def _once(made: Path) -> Iterator[bool]:
    """Whether `made` is still to be made. Two processes take turns, and a half-made one is made again."""
    made.parent.mkdir(parents=True, exist_ok=True)
    done = made.with_name(f"{made.name}.done")
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (missing := not done.exists()):
            yield missing
            return
        shutil.rmtree(made, ignore_errors=True)
        yield missing
        done.touch()


# ------------------------------------------------------------------------------------------------------------ runs


def execute(run: Run, work: Path) -> dict[str, Any]:
    """The record of a run; made if it is not there."""
    record = work / run.task / "records" / f"{run.key}.json"
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(_measure(run, work), ensure_ascii=False) + "\n"
        partial = record.with_suffix(f".{os.getpid()}")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, record)
    return json.loads(record.read_text(encoding="utf-8"))


def _measure(run: Run, work: Path) -> dict[str, Any]:
    task, began = TASKS[run.task], time.monotonic()
    folder = DATA / task.name
    tool = Tool(work / run.task / "logs" / f"{run.key}.log")
    record: dict[str, Any] = {"task": run.task, "row": run.name, "seed": run.seed, "key": run.key}
    if run.row is None:
        model = folder / "teacher" if run.model == "teacher" else student_folder(task, run.model, work)
    else:
        out = work / run.task / "runs" / run.key
        cache = out.with_name(f"{out.name}-cache")
        shutil.copytree(begun_cache(task, run.row, run.seed, work), cache, dirs_exist_ok=True)
        options = {**task.decoding, **run.row.learning(task, run.seed)}
        if run.row.needs_samples:
            options = {"teacher": folder / "teacher", **options}
        start = student_folder(task, run.row.student, work)
        learned = tool("learn", student=start, cache=cache, out=out, **options)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record |= {
            "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
            "student": run.row.student,
            "learn": learned,
            "curve": [{key: _rounded(line.get(key)) for key in CURVE} for line in lines],
        }
        model = out / "best"
    # with the task's own limit, whatever limit the rollouts had
    options = {**task.decoding, **task.evaluation}
    evaluated = tool("evaluate", model=model, data=folder / f"{run.split}.jsonl", teacher=folder / "teacher", **options)
    record |= {"evaluation": evaluated, "commands": tool.commands, "seconds": round(time.monotonic() - began, 1)}
    if run.row is not None:
        shutil.rmtree(cache)
        shutil.rmtree(out)
    return record


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def analyses(task: Task, students: Sequence[str], prompts: int, samples: int, work: Path) -> dict[str, Any]:
    """Figure 2: `analyze` over rollouts of several students, scored by the teacher."""
    result = work / task.name / f"analysis-{prompts}x{samples}.json"
    if not result.exists():
        folder, cache = DATA / task.name, work / task.name / f"analysis-{prompts}x{samples}"
        tool = Tool(cache.with_suffix(".log"))
        for name in students:
            tool("rollout", student=student_folder(task, name, work), data=folder / "prompts.jsonl",
                 skip=task.labelled, limit=prompts, samples=samples, cache=cache, **task.decoding)  # fmt: skip
        tool("score", teacher=folder / "teacher", cache=cache)
        found = {tail: tool("analyze", cache=cache, tail=tail) for tail in TAILS}
        result.write_text(json.dumps({"task": task.name, "analysis": found, "commands": tool.commands}) + "\n")
    return json.loads(result.read_text(encoding="utf-8"))
