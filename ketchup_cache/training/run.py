"""One training run: its folder, its loop, and going on where it was killed. Only safetensors and JSON.

OUT/config.json            what was asked for and what it resolved to (fingerprints, versions)
OUT/metrics.jsonl          one line per optimizer step
OUT/dev.jsonl              one line per evaluation on the dev set (training/dev.py)
OUT/samples.jsonl          a few rollouts as text, at every refresh
OUT/pins.json              ids of the segments that the run has read
OUT/checkpoints/step-N/    the newest complete one is where a killed run goes on
OUT/best/                  the best model on the dev set, with its tokenizer; without a dev set a link to last/
OUT/last/                  the model of the last step
OUT/report.json            written last: the run is finished

Of several processes (parallel/group.py) the first writes all of it, and calls the callbacks; all read it, to go on.
"""

from __future__ import annotations

import copy
import fcntl
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import LearnConfig, PretrainConfig
from ketchup_cache.config.resolve import flag
from ketchup_cache.console import Report, progress, say, warn
from ketchup_cache.errors import ConfigError, MismatchError, WriteError
from ketchup_cache.files import write_file, writing
from ketchup_cache.models import lora
from ketchup_cache.models.fingerprint import state_fingerprint
from ketchup_cache.models.folders import ORIGIN
from ketchup_cache.models.load import quiet
from ketchup_cache.models.origin import Origin
from ketchup_cache.parallel.group import by_first, group, together
from ketchup_cache.training import checkpoints
from ketchup_cache.training.alarms import Alarm, Alarms
from ketchup_cache.training.card import model_card
from ketchup_cache.training.dev import DevRecord, DevSet, read_dev
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.training.records import as_json, read_pins, sealed, sha256, unsealed
from ketchup_cache.training.tracking import Trackers
from ketchup_cache.version import TOOL

MAY_CHANGE = {"fsdp", "out", "checkpoint_every", "save_limit", "trust_remote_code", "scores_timeout", "track"}
MAY_CHANGE |= {*"teacher_url student_url in_flight idle_timeout retry_for max_disagreement max_mismatch".split()}
"""Options that a resumed run may change, since no number depends on them."""
LENGTH = {"steps", "epochs", "patience"}
"""Options by which a run is lengthened, also a finished one."""
State = Callable[[], dict[str, Any]]
"""Returns what a checkpoint holds besides weights and optimizer."""
Step = Callable[[int], tuple[dict[str, Any], str]]
"""Takes optimizer step n; returns its line of metrics.jsonl and a note beside the progress bar."""
AnyReport = TypeVar("AnyReport", bound=Report)


class Callback:
    """What a program does while a run goes on: `learn(config, callbacks=[...])`. Override what you need.

    `run.stop()` ends the run after this step as if its steps were over.
    """

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """After every optimizer step, with its line of metrics.jsonl."""

    def on_refresh(self, run: Run, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Before the first step of `learn`, and whenever there are new rollouts: some of them, as in samples.jsonl."""

    def on_evaluation(self, run: Run, record: Mapping[str, Any]) -> None:
        """After every evaluation on the dev set, with its line of dev.jsonl."""

    def on_end(self, run: Run, report: Mapping[str, Any]) -> None:
        """When the run is finished, with what report.json holds."""


class Run:
    def __init__(self, command: str, config: LearnConfig | PretrainConfig, callbacks: Sequence[Callback] = ()) -> None:
        self.out, self.command, self.config, self.callbacks = config.out, command, config, callbacks
        self.metrics_path, self.pins_path = self.out / "metrics.jsonl", self.out / "pins.json"
        self.resumed = self.done = 0
        """Optimizer steps that were done when it was last killed, and by now."""
        self.stopped = ""
        """Why it ended before its last step."""
        self.recorded: dict[str, Any] = {}
        """What the options resolved to when the run began; empty for a new one."""
        self._lengthened, self._interrupted = False, 0
        self.gather: Callable[..., None] = lambda **_: None  # as `Learner.gather`
        self._trackers = Trackers(config.track if group().first else (), self.out)
        self._began = time.monotonic()

    def stop(self, why: str = "callback") -> None:
        """End the run after this optimizer step as if its steps were over."""
        self.stopped = why

    @contextmanager
    def locked(self) -> Iterator[Run]:
        """Hold the folder while the run works. Raises ConfigError where another process has it, or where it holds
        a run with other options; WriteError where it can't be written.
        """
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = (self.out / ".lock").open("a")
        with lock:
            try:
                if group().first:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError([f"{self.out}: another process is running there; choose another --out"]) from None
            self._match_config()
            try:
                with together("gloo|nccl"):
                    yield self
            finally:
                self._trackers.finish()

    def _match_config(self) -> None:
        path, lines = self.out / "config.json", self._lines()
        begun = bool(lines) or any((self.out / name).exists() for name in ("checkpoints", "report.json"))
        if not path.exists():
            if begun:
                raise ConfigError([f"{self.out}: holds a run without its config.json; choose another --out"])
            return
        record, options = unsealed(path), self.config.model_dump(mode="json")
        before = record["options"]
        if begun or before == options:
            self.recorded = record["resolved"]
        if not begun:  # nothing was trained, so the folder is free for other options
            return
        self._lengthened = any(before.get(name, options[name]) != options[name] for name in LENGTH & options.keys())
        todo, fields = "repeat its options to continue it, or choose another --out", type(self.config).model_fields
        if problems := [
            f"{self.out} holds a run with {flag(k)} {before.get(k)}, not {options[k]}: {todo}"
            for k in sorted(options.keys() - MAY_CHANGE - LENGTH)
            # an option that the run does not know came with a later version; its default does what was done before
            if before.get(k) != options[k] and (k in before or getattr(self.config, k) != fields[k].default)
        ]:
            raise ConfigError(problems)

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Record the options, and what they resolved to, once the run is known to be possible, and `restore` has read
        its checkpoint. resolved: with `steps`. Raises ConfigError where a run has taken more steps already, and
        MismatchError where the weights beside an adapter are others than they were.
        """
        whose = "student" if self.command == "learn" else "model"
        if hasattr(self._parts[0], "base_fingerprint") and self.recorded.get(whose, resolved[whose]) != resolved[whose]:
            what = "is not as it was when this run of an adapter began; bring it back, or choose another --out"
            raise MismatchError(f"{self.out}: {whose} {getattr(self.config, whose)} {what}")
        steps, before = resolved["steps"], self.recorded.get("steps", resolved["steps"])
        if steps < self.resumed:
            what = f"{self.out} holds a run that has taken {self.resumed} steps, more than {steps}"
            raise ConfigError([f"{what}: a run can be lengthened only; choose another --out"])
        if steps != before and self.resumed and (self.config.schedule != "constant" or 0 < self.config.warmup < 1):
            say(f"the {self.resumed} steps taken had the learning rates of a run of {before} steps")
        self._write_config(resolved)

    @by_first
    def _write_config(self, resolved: dict[str, Any]) -> None:
        (self.out / "report.json").unlink(missing_ok=True)
        versions = {"torch": torch.__version__, "transformers": version("transformers")}
        record: dict[str, Any] = {"tool": TOOL, "versions": versions, "command": self.command}
        record |= {"options": self.config.model_dump(mode="json"), "resolved": resolved}
        write_file(self.out / "config.json", sealed(record))
        self._trackers.start(record["options"], self.resumed)

    # -------------------------------------------------------------------------------------------------- loop

    def train(
        self,
        learner: Learner,
        steps: int,
        step: Step,
        state: State = dict,
        dev: DevSet | None = None,
        alarms: Alarms | None = None,
    ) -> list[dict[str, Any]]:
        """Take the optimizer steps that are left, with checkpoints and evaluations; returns the metrics of all.

        Ctrl-C, or SIGTERM, saves after the step that is being taken, and raises KeyboardInterrupt.
        """
        every, self.done = self.config.checkpoint_every, self.resumed
        with self._interruptible(), progress(self.command, steps, "steps", done=self.resumed) as bar:
            self._know_again(dev, alarms)
            self._evaluate(dev, alarms)
            if dev and dev.patience_is_over and self.done < steps:
                self.stop("patience")
            while self.done < steps and not self.stopped:
                line, note = step(self.done)
                if alarms:
                    line["alarms"] = _say(alarms.step(line))
                if group().first:
                    with writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    self._trackers.log("train", line)
                    for callback in self.callbacks:
                        callback.on_step(self, line)
                self.done += 1
                bar.note(note)
                bar.advance()
                better = self._evaluate(dev, alarms)
                if dev and dev.patience_is_over and self.done < steps:
                    self.stop("patience")
                # each process has its signals at a time of its own, and the first alone has callbacks
                signals, stopped = zip(*group().gathered((self._interrupted, self.stopped)), strict=True)
                interrupted, self.stopped = max(signals), max(stopped)
                over = self.done == steps or self.stopped
                if over or better or interrupted or (every and self.done % every == 0):
                    self._save_checkpoint(self.done, learner, state())
                if interrupted and not over:
                    say(f"saved after step {self.done} of {steps} in {self.out}")
                    group().gathered(None)  # said before another process says that it has stopped
                    raise KeyboardInterrupt
        return [json.loads(line) for line in group().from_first(self._lines)]

    def _lines(self) -> list[bytes]:
        """Of metrics.jsonl, without one that a kill left unfinished."""
        lines = self.metrics_path.read_bytes().splitlines(keepends=True) if self.metrics_path.exists() else []
        return [line for line in lines if line.endswith(b"\n")]

    def _written(self, step: int) -> dict[str, bytes]:
        """What the run has written up to an optimizer step, besides its checkpoint."""
        dev = b"".join(line for line, record in read_dev(self.out) if record is None or record["step"] <= step)
        return {"metrics.jsonl": b"".join(self._lines()[:step]), "dev.jsonl": dev}

    def _know_again(self, dev: DevSet | None, alarms: Alarms | None) -> None:
        """Go through what happened before a run was killed, so that each alarm is raised once."""
        records: dict[int, DevRecord] = {record.step: record for record in dev.records} if dev else {}
        lines = group().from_first(self._lines) if alarms else []
        for step in range(len(lines) + 1):
            if alarms and step:
                alarms.step(json.loads(lines[step - 1]))
            if alarms and step in records:
                alarms.dev(records[step].model_dump(mode="json"))

    def _evaluate(self, dev: DevSet | None, alarms: Alarms | None) -> bool:
        """Evaluate on the dev set where it is time to; returns whether the model is the best so far."""
        if dev is None or not dev.due(self.done):
            return False
        record = dev.evaluate(self.done)
        if alarms:
            record = record.model_copy(update={"alarms": tuple(_say(alarms.dev(record.model_dump(mode="json"))))})
        dev.record(record)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in record.metrics.items())
        say(f"step {self.done}: {shown} on the dev set{', the best so far' * (record.best and self.done > 0)}")
        self._trackers.log("dev", record.model_dump(mode="json"))
        for callback in self.callbacks if group().first else ():
            callback.on_evaluation(self, record.model_dump(mode="json"))
        return record.best

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let a first Ctrl-C or SIGTERM wait for the end of a step; a second one stops at once."""

        def ask(*_: Any) -> None:
            self._interrupted += 1
            if self._interrupted > 1:
                raise KeyboardInterrupt
            if group().size == 1:  # others may be dying, and this the launcher's way to end the rest
                say("stopping after this step; Ctrl-C again stops at once")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def seconds(self) -> float:
        """Wall time since `restore`."""
        return round(time.monotonic() - self._began, 1)

    def _save_checkpoint(self, step: int, learner: Learner, state: dict[str, Any]) -> None:
        """After `step` optimizer steps."""
        written = self._written(step) if group().first else {}
        checkpoints.save(self.out, step, learner, state, written, keep=max(self.config.save_limit, 1))

    def restore(self, learner: Learner) -> dict[str, Any]:
        """Load the newest checkpoint into model and optimizer; returns its state, {} where there is none.

        Metrics of later steps, which will be computed again, are cut off.

        Raises WriteError where the checkpoint, or the metrics of its steps, are not as they were written.
        """
        record = checkpoints.load_newest(self.out, learner)
        for name, content in self._written(record["step"]).items() if "sha256" in record else ():
            if sha256(content) != record["sha256"][name]:
                what = f"{self.out / name}: is not as it was written up to step {record['step']}"
                raise WriteError(f"{what}; bring it back, or choose another --out")
        self.resumed, self._began = record["step"], time.monotonic()
        group().gathered(None)  # all have read it
        self._cut_off()
        return record["state"]

    @by_first
    def _cut_off(self) -> None:
        self._trackers.look()
        if self.metrics_path.exists():  # a line that a kill left unfinished goes too
            write_file(self.metrics_path, b"".join(self._lines()[: self.resumed]))
        if not self.resumed:
            self.pins_path.unlink(missing_ok=True)

    @by_first
    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rollouts as text to samples.jsonl; those of steps that a killed run takes again go. Raises WriteError."""
        path = self.out / "samples.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        found = ((line, re.match(rb'{"step": (\d+),.*}\n', line)) for line in lines)
        kept = [line for line, whole in found if whole and int(whole[1]) < step]
        new = (json.dumps({"step": step, **row}, ensure_ascii=False).encode() + b"\n" for row in rows)
        write_file(path, b"".join([*kept, *new]))
        for callback in self.callbacks:
            callback.on_refresh(self, step, rows)

    @by_first
    def pin(self, cache: str, ids: Sequence[str]) -> None:
        """Write down which segments the run reads, before it learns from them. Raises WriteError."""
        known = read_pins(self.pins_path) if self.pins_path.exists() else []
        if not set(known) >= set(ids):
            write_file(self.pins_path, as_json({"cache": cache, "segments": list(dict.fromkeys([*known, *ids]))}))

    # ------------------------------------------------------------------------------------------------ result

    def finished(self, kind: type[AnyReport]) -> AnyReport | None:
        """What the finished run reported; None while it is not finished, or is to go on.

        Raises ConfigError where a finished run is to go on, and its last checkpoint was not kept.
        """
        path = self.out / "report.json"
        if not path.exists():
            return None
        if not (self.out / "best").exists():
            raise ConfigError([f"{self.out / 'best'}: is gone from a finished run; bring it back, or use last"])
        if not self._lengthened:
            return kind(**{**unsealed(path), "already_done": True})
        if not list((self.out / "checkpoints").glob("step-????????")):
            what = "the finished run has no checkpoint to go on from (--save-limit 0, or an earlier version)"
            raise ConfigError([f"{self.out}: {what}; choose another --out"])
        return None

    def describe(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        known: Origin,
        cache: Cache | None = None,
    ) -> None:
        """What `publish` writes. known: of the origin, all but command, step and metrics. cache: that it reads."""
        self._parts, self._origin, self._cache = (model, tokenizer), known, cache

    def result(self) -> PreTrainedModel:
        """The model as it is written: itself, or with --lora-merge a copy with its adapter merged."""
        return lora.merge(copy.deepcopy(self._parts[0])) if self.config.lora_merge else self._parts[0]

    def fingerprint(self) -> str:
        """Of `result`, before `finish` writes it."""
        self.gather(to_write=True)
        return group().from_first(lambda: state_fingerprint(self.result()))

    @by_first
    def publish(
        self,
        name: str,
        step: int,
        metrics: Mapping[str, float] | None = None,
        variants: Mapping[str, str] | None = None,
    ) -> None:
        """Write the model as it is, with its tokenizer, origin and card, as OUT/name. Raises WriteError."""
        with checkpoints.saving(self.out / name) as partial, quiet():
            lora.save(model := self.result(), partial)
            self._parts[1].save_pretrained(partial)
            now = {"tool": TOOL, "command": self.command, "step": step, "metrics": dict(metrics or {})}
            now["base"] = getattr(model, "base_fingerprint", None)
            known = self._origin.model_copy(update=now)
            write_file(partial / ORIGIN, as_json(known.model_dump(mode="json")))
            pins = read_pins(self.pins_path) if self.pins_path.exists() else []
            card = model_card(unsealed(self.out / "config.json"), known, variants or {}, self._cache, pins)
            (partial / "README.md").write_text(card, encoding="utf-8")

    @by_first
    def finish(self, report: Report, dev: DevSet | None = None) -> None:
        """Publish the trained model as OUT/last, then the report; drop checkpoints that are not to be kept."""
        self.publish("last", self.done)
        if dev is not None:
            dev.check_best()
        elif not (self.out / "best").exists():
            with writing(self.out):
                (self.out / "best").symlink_to("last")
        values = report.to_dict()
        write_file(self.out / "report.json", sealed(values))
        if not self.config.save_limit:
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        for callback in self.callbacks:
            callback.on_end(self, values)


def steps_text(steps: int, seconds: float, resumed: int, stopped: str) -> str:
    """The start of a run's last line."""
    whys = {"patience": " (stopped early, nothing better came)", "callback": " (stopped by a callback)"}
    went_on = f" (continued from step {resumed})" if resumed else ""
    return f"{steps:,} steps in {seconds:.0f} s{went_on}{whys.get(stopped, '')}"


def _say(alarms: Sequence[Alarm]) -> list[str]:
    """Their names."""
    for alarm in alarms:
        warn(f"step {alarm.step}: {alarm.text}")
    return [alarm.name for alarm in alarms]
