"""What a report of a bug needs: versions, the machine, and whether there is a GPU."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ketchup_cache.console import Report
from ketchup_cache.models.memory import free_ram
from ketchup_cache.version import __version__


@dataclass(frozen=True)
class Environment(Report):
    """packages: of each requirement, extras of users included, the version that is installed; None where it is not."""

    ketchup_cache: str
    python: str
    system: str
    cpus: int
    free_memory_gb: float
    free_disk_gb: float
    gpus: tuple[str, ...]
    cuda: str | None
    packages: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"ketchup-cache {self.ketchup_cache}", f"python {self.python}, {self.system}"]
        lines.append(f"{self.cpus} CPUs, {self.free_memory_gb} GB of memory and {self.free_disk_gb} GB of disk free")
        lines.append(f"GPUs: {', '.join(self.gpus) or 'none'}" + (f" (CUDA {self.cuda})" if self.cuda else ""))
        there = [f"{name} {known}" for name, known in self.packages.items() if known]
        missing = [name for name, known in self.packages.items() if not known]
        return "\n".join([*lines, "packages: " + ", ".join(there), "not installed: " + (", ".join(missing) or "none")])


def environment() -> Environment:
    """Of this process. Imports torch, which is slow, and fails where torch is broken: that is worth knowing too."""
    import torch

    wanted = map(Requirement, requires("ketchup-cache") or [])
    named = sorted({one.name for one in wanted if 'extra == "dev"' not in str(one.marker)})
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Environment(
        ketchup_cache=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        free_memory_gb=round(free_ram() / 1e9, 1),
        free_disk_gb=round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        gpus=tuple(gpus),
        cuda=torch.version.cuda if gpus else None,
        packages={name: _version(name) for name in named},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
