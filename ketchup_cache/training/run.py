"""One training run: its folder, its loop, and going on where it was killed. Only safetensors and JSON.

OUT/config.json            what was asked for and what it resolved to (fingerprints, versions)
OUT/metrics.jsonl          one line per optimizer step
OUT/pins.json              ids of the segments that the run has read
OUT/checkpoints/step-N/    the newest complete one is where a killed run goes on
OUT/report.json            written last: the run is finished
OUT/<result>/              the trained model with its tokenizer, as `from_pretrained` reads it
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ketchup_cache.config.commands import LearnConfig, PretrainConfig
from ketchup_cache.config.resolve import flag
from ketchup_cache.console import Report, progress
from ketchup_cache.errors import ConfigError, MismatchError, ModelError, WriteError
from ketchup_cache.files import publishing, write_file, writing
from ketchup_cache.models.load import quiet, resolve_folder
from ketchup_cache.provenance import PolicyInfo
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.version import TOOL

MAY_CHANGE = {"checkpoint_every", "trust_remote_code", "scores_timeout"}
"""Options that a resumed run may change, since no number depends on them."""
ORIGIN = "ketchup-cache-origin.json"
"""Beside a pre-distilled model's weights: the policies whose text it learned."""
Origin = Sequence[PolicyInfo]
"""The policies whose text a model was pre-distilled on."""
State = Callable[[], dict[str, Any]]
"""Returns what a checkpoint holds besides weights and optimizer."""
Step = Callable[[int], tuple[dict[str, Any], str]]
"""Takes optimizer step n; returns its line of metrics.jsonl and a note beside the progress bar."""
AnyReport = TypeVar("AnyReport", bound=Report)


class Run:
    def __init__(self, command: str, config: LearnConfig | PretrainConfig) -> None:
        self.out, self.command, self.config = config.out, command, config
        self.metrics_path, self.pins_path = self.out / "metrics.jsonl", self.out / "pins.json"
        self.resumed = 0
        """Optimizer steps that were done when it was last killed."""
        self._began = time.monotonic()

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
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError([f"{self.out}: another process is running there; choose another --out"]) from None
            self._match_config()
            yield self

    def _match_config(self) -> None:
        path = self.out / "config.json"
        if not (path.exists() and self.metrics_path.exists() and self.metrics_path.stat().st_size > 0):
            return
        before, options = _read_json(path).get("options", {}), self.config.model_dump(mode="json")
        todo, fields = "repeat its options to continue it, or choose another --out", type(self.config).model_fields
        if problems := [
            f"{self.out} holds a run with {flag(k)} {before.get(k)}, not {options[k]}: {todo}"
            for k in sorted(options.keys() - MAY_CHANGE)
            # an option that the run does not know came with a later version; its default does what was done before
            if before.get(k) != options[k] and (k in before or getattr(self.config, k) != fields[k].default)
        ]:
            raise ConfigError(problems)

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Record the options, and what they resolved to, once the run is known to be possible."""
        versions = {"torch": torch.__version__, "transformers": version("transformers")}
        record = {"tool": TOOL, "versions": versions, "command": self.command}
        record |= {"options": self.config.model_dump(mode="json"), "resolved": resolved}
        write_file(self.out / "config.json", _json(record))

    # -------------------------------------------------------------------------------------------------- loop

    def train(self, learner: Learner, steps: int, step: Step, state: State = dict) -> list[dict[str, Any]]:
        """Take the optimizer steps that are left, with a checkpoint now and then; returns the metrics of all."""
        every = self.config.checkpoint_every
        with progress(self.command, steps - self.resumed, "steps") as bar:
            for number in range(self.resumed, steps):
                line, note = step(number)
                with writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                bar.note(note)
                bar.advance()
                done = number + 1
                if every and done % every == 0 and done < steps:
                    self._save_checkpoint(done, learner, state())
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]

    @property
    def seconds(self) -> float:
        """Wall time since `restore`."""
        return round(time.monotonic() - self._began, 1)

    def _save_checkpoint(self, step: int, learner: Learner, state: dict[str, Any]) -> None:
        """After `step` optimizer steps. The earlier checkpoints go once this one is on the disk."""
        target = self.out / "checkpoints" / f"step-{step:08d}"
        with publishing(target) as partial:
            save_file(_weights(learner.model), partial / "model.safetensors")
            save_file(learner.optimizer.tensors(), partial / "optimizer.safetensors")
            (partial / "state.json").write_bytes(_json({"step": step, **state}))
        for other in target.parent.iterdir():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self, learner: Learner) -> dict[str, Any]:
        """Load the newest checkpoint into model and optimizer; returns its state, {} where there is none.

        Metrics of later steps, which will be computed again, are cut off.
        """
        found = sorted((self.out / "checkpoints").glob("step-????????"))
        state: dict[str, Any] = {}
        if found:
            state = _read_json(found[-1] / "state.json")
            try:
                weights = load_file(found[-1] / "model.safetensors")
                learner.optimizer.load_tensors(load_file(found[-1] / "optimizer.safetensors"))
                with torch.no_grad():
                    for name, tensor in _weights(learner.model).items():
                        tensor.copy_(weights[name])
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                raise WriteError(f"{found[-1]}: damaged checkpoint ({error}); delete it to start again") from error
        self.resumed, self._began = state.get("step", 0), time.monotonic()
        if self.metrics_path.exists():  # a line that a kill left unfinished goes too
            lines = self.metrics_path.read_bytes().splitlines(keepends=True)
            write_file(self.metrics_path, b"".join(lines[: self.resumed]))
        if not self.resumed:
            self.pins_path.unlink(missing_ok=True)
        return state

    def pin(self, cache: str, ids: Sequence[str]) -> None:
        """Write down which segments the run reads, before it learns from them. Raises WriteError."""
        known = read_pins(self.pins_path) if self.pins_path.exists() else []
        if not set(known) >= set(ids):
            write_file(self.pins_path, _json({"cache": cache, "segments": list(dict.fromkeys([*known, *ids]))}))

    # ------------------------------------------------------------------------------------------------ result

    def finished(self, kind: type[AnyReport]) -> AnyReport | None:
        """What the finished run reported; None while it is not finished."""
        path = self.out / "report.json"
        return kind(**{**_read_json(path), "already_done": True}) if path.exists() else None

    def finish(
        self, result: str, parts: Sequence[PreTrainedModel | PreTrainedTokenizerBase], report: Report, origin: Origin
    ) -> None:
        """Publish the trained model and its tokenizer as OUT/result, then the report, then drop the checkpoints."""
        with publishing(self.out / result) as partial, quiet():
            for part in parts:
                part.save_pretrained(partial)
            if origin:
                record = {"tool": TOOL, "pretrained_on": [policy.model_dump(mode="json") for policy in origin]}
                write_file(partial / ORIGIN, _json(record))
        write_file(self.out / "report.json", _json(report.to_dict()))
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)


def read_origin(model: str) -> list[PolicyInfo]:
    """The policies whose text a model was pre-distilled on; [] where that is not recorded, or not legibly."""
    try:
        record = json.loads((resolve_folder(model) / ORIGIN).read_text(encoding="utf-8"))
        return [PolicyInfo.model_validate(policy) for policy in record["pretrained_on"]]
    except (ModelError, OSError, ValueError, KeyError, TypeError):
        return []


def read_pins(path: Path) -> list[str]:
    """The ids in a pins.json. Raises MismatchError where the file is none."""
    try:
        ids = list(json.loads(path.read_text(encoding="utf-8"))["segments"])
        if not ids or not all(re.fullmatch("[0-9a-f]{64}", id_) for id_ in ids):
            raise ValueError("holds no segment ids")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{path}: is no list of pins ({error}); take pins.json from the folder of a run") from None
    return ids


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once, and buffers that are part of the model's state."""
    buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: can't be read ({error}); delete the folder or choose another --out"]) from None
