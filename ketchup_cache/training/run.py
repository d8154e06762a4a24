"""The folder of one training run: its settings, metrics, checkpoint and result. Only safetensors and JSON.

OUT/config.json            what was asked for and what it resolved to (fingerprints, versions)
OUT/metrics.jsonl          one line per optimizer step
OUT/checkpoints/step-N/    the newest complete one is where a killed run goes on
OUT/teacher.json           with --scorer: whose scores the run learns from
OUT/report.json            written last: the run is finished
OUT/<result>/              the trained model with its tokenizer, as `from_pretrained` reads it
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ketchup_cache.config.base import Config
from ketchup_cache.config.resolve import flag
from ketchup_cache.errors import ConfigError, WriteError
from ketchup_cache.files import publishing, write_file, writing
from ketchup_cache.models.load import quiet
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.origin import Origin
from ketchup_cache.version import TOOL

MAY_CHANGE = {"checkpoint_every", "trust_remote_code", "scorer_timeout"}
"""Options that a resumed run may change, since no number depends on them."""


class Run:
    def __init__(self, out: Path, command: str, config: Config) -> None:
        self.out, self.command, self.config = out, command, config

    @contextmanager
    def locked(self) -> Iterator[Run]:
        """Hold the folder while the run works. Raises ConfigError where another process has it, or where it holds
        a run with other options; WriteError where it can't be written.
        """
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.out / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError([f"{self.out}: another process is running there; choose another --out"]) from None
            self._match_config()
            yield self
        finally:
            os.close(lock)

    def _match_config(self) -> None:
        path = self.out / "config.json"
        options = self.config.model_dump(mode="json")
        begun = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
        if path.exists() and begun:
            before = _read_json(path).get("options", {})
            fields = type(self.config).model_fields
            # an option that the run does not know came with a later version; its default does what was done before
            later = {k for k in options.keys() - before.keys() if getattr(self.config, k) == fields[k].default}
            known = (before.keys() | options.keys()) - later
            changed = sorted(k for k in known if before.get(k) != options.get(k))
            if problems := [
                f"{self.out} holds a run with {flag(k)} {before.get(k)}, not {options.get(k)}: "
                "repeat its options to continue it, or choose another --out"
                for k in changed
                if k not in MAY_CHANGE
            ]:
                raise ConfigError(problems)

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Record the options, and what they resolved to, once the run is known to be possible."""
        record = {
            "tool": TOOL,
            "versions": {"torch": torch.__version__, "transformers": _version("transformers")},
            "command": self.command,
            "options": self.config.model_dump(mode="json"),
            "resolved": resolved,
        }
        write_file(self.out / "config.json", _json(record))

    # ------------------------------------------------------------------------------------------------ result

    @property
    def report(self) -> dict[str, Any] | None:
        """What the finished run reported; None while it is not finished."""
        path = self.out / "report.json"
        return _read_json(path) if path.exists() else None

    def finish(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        report: dict[str, Any],
        origin: Origin | None = None,
    ) -> Path:
        """Publish the trained model as OUT/name, then the report, then drop the checkpoints."""
        folder = self.out / name
        with publishing(folder) as partial, quiet():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if origin:
                origin.write(partial)
        write_file(self.out / "report.json", _json(report))
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        return folder

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, step: int, model: PreTrainedModel, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """After `step` optimizer steps. The earlier checkpoints go once this one is on the disk."""
        target = self.out / "checkpoints" / f"step-{step:08d}"
        with publishing(target) as partial:
            save_file(_weights(model), partial / "model.safetensors")
            save_file(optimizer.tensors(), partial / "optimizer.safetensors")
            (partial / "state.json").write_bytes(_json({"step": step, **state}))
        for other in target.parent.iterdir():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self, model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
        """Load the newest checkpoint into model and optimizer; returns its state, {"step": 0} where there is none.

        Metrics of later steps, which will be computed again, are cut off.
        """
        found = sorted((self.out / "checkpoints").glob("step-????????"))
        state: dict[str, Any] = {"step": 0}
        if found:
            state = _read_json(found[-1] / "state.json")
            try:
                weights = load_file(found[-1] / "model.safetensors")
                optimizer.load_tensors(load_file(found[-1] / "optimizer.safetensors"))
                with torch.no_grad():
                    for name, tensor in _weights(model).items():
                        tensor.copy_(weights[name])
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                raise WriteError(f"{found[-1]}: damaged checkpoint ({error}); delete it to start again") from error
        self._cut_metrics(state["step"])
        return state

    # ------------------------------------------------------------------------------------------------ metrics

    @property
    def metrics_path(self) -> Path:
        return self.out / "metrics.jsonl"

    def log(self, metrics: dict[str, Any]) -> None:
        with writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]

    def _cut_metrics(self, steps: int) -> None:
        """Keep the lines of the first `steps` steps; a line that a kill left unfinished goes too."""
        if self.metrics_path.exists():
            lines = self.metrics_path.read_bytes().splitlines(keepends=True)
            write_file(self.metrics_path, b"".join(lines[:steps]))


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


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
