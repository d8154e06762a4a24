"""Experiment trackers: every number of metrics.jsonl and dev.jsonl goes to TensorBoard or W&B too, through accelerate.

OUT/tensorboard/   event files        OUT/wandb/   what W&B keeps on this machine
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ketchup_cache.console import one_line, warn
from ketchup_cache.errors import ConfigError
from ketchup_cache.training.dev import read_dev

WANDB = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_machine_info": True, "quiet": True}
"""Settings: W&B gets what is logged and the options, and not the code, its state in git, the console or the machine's
data."""
Line = tuple[str, Mapping[str, Any]]
"""train and a line of metrics.jsonl, or dev and one of dev.jsonl."""


class Trackers:
    """Those of one run; without names it does nothing."""

    def __init__(self, names: Sequence[str], out: Path) -> None:
        """out: the folder of the run. Raises ConfigError where a package is missing."""
        self._names, self._out, self._before = dict.fromkeys(names), out, list[Line]()
        self._live: dict[str, tuple[Any, set[tuple[str, int]]]] = {}
        for name in self._names:
            try:
                version(name)
            except PackageNotFoundError:
                todo = "pip install 'ketchup-cache[track]'"
                raise ConfigError([f"--track {name} needs the package {name}: {todo}"]) from None

    def look(self) -> None:
        """At what the run has logged so far, before steps that were taken after its last checkpoint are cut off."""
        path = self._out / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if self._names and path.exists() else []
        self._before = [("train", json.loads(line)) for line in lines if line.endswith(b"\n")]
        self._before += [("dev", record) for _, record in read_dev(self._out) if self._names and record]

    def start(self, options: Mapping[str, Any], resumed: int) -> None:
        """Go on with the run that a tracker has of this folder, or begin one, which gets steps before `resumed` too.

        Raises ConfigError where a tracker can't be started.
        """
        if not self._names:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # which its log asks for
        plain = bool | int | float | str | None
        config = {key: value if isinstance(value, plain) else json.dumps(value) for key, value in options.items()}
        del config["out"]
        for name in self._names:
            folder = self._out / name
            given: dict[str, Any] = {"run_name": name, "logging_dir": self._out}
            known = folder.exists()
            if name == "wandb":
                ids = [path.name.rpartition("-")[2] for path in sorted(folder.glob("*run-*-*"))]
                given = {"run_name": os.environ.get("WANDB_PROJECT", "ketchup-cache"), "settings": WANDB}
                given |= {"name": self._out.resolve().name, "dir": str(self._out), "resume": "allow"}
                given["id"] = ids[-1] if ids else None
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](**given)
                tracker.start()
                self._live[name] = tracker, {(kind, line["step"]) for kind, line in self._before if known}
                if not known:
                    tracker.store_init_configuration(config)
            except Exception as error:  # they raise errors of many libraries
                raise ConfigError([f"--track {name}: can't be started ({one_line(error)}); leave it out"]) from None
        for kind, line in sorted(self._before, key=lambda one: (one[1]["step"], one[0])):
            if line["step"] < resumed + (kind == "dev"):
                self.log(kind, line)

    def log(self, kind: str, line: Mapping[str, Any]) -> None:
        """The numbers of a line, once. A tracker that fails is left, with a warning."""
        flat = {**line, **line.get("metrics", {})}
        numbers = {f"{kind}/{name}": value for name, value in flat.items() if type(value) in (int, float)}
        del numbers[f"{kind}/step"]
        for name, (tracker, seen) in list(self._live.items()):
            if (kind, line["step"]) not in seen:
                self._try(name, tracker.log, numbers, step=line["step"])

    def finish(self) -> None:
        for name, (tracker, _) in list(self._live.items()):
            self._try(name, tracker.finish)
        self._live.clear()

    def _try(self, name: str, call: Any, *given: Any, **named: Any) -> None:
        try:
            call(*given, **named)
        except Exception as error:
            del self._live[name]
            todo = f"the run goes on; with {self._out / name} deleted, it logs all steps anew when it is run again"
            warn(f"--track {name}: nothing more is logged ({one_line(error)}): {todo}")
