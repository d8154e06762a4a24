"""How many tokens go through a model at once: as many as were asked for, or as fit into memory.

Running out is an exception on a GPU, and on a CPU where the operating system limits the process. Where the system
kills processes instead, only `auto` helps, which looks at what is free first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil
import torch

from ketchup_cache.console import say

PROBE = 2048
"""Tokens of the batches that `auto` looks at: they keep a machine busy already (`models/batching.py`)."""
MOST = {"cuda": 65_536, "cpu": 4096}
"""Largest budget of `auto` by device: more gains nothing. Large blocks of a CPU come from the system each time."""
SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Of the free memory. Others live in a CPU's, and going over ends the process there, not the batch."""
MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what PyTorch or NumPy raises on any device when memory has run out."""
    said = isinstance(error, RuntimeError) and any(message in str(error).lower() for message in MESSAGES)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


class TokenBudget:
    """Largest batch, in tokens. It is found once, and after that it only shrinks: keep it for a whole run."""

    def __init__(self, asked: int | Literal["auto"], say: Callable[[str], None] = say) -> None:
        """asked: a number of tokens, or what `auto` finds in the first full batches. say: told of what was found."""
        self.tokens = PROBE if asked == "auto" else asked
        self.open, self._warm, self._say = asked == "auto", False, say
        self._before: dict[torch.device, int] = {}

    def watch(self, devices: Iterable[torch.device]) -> None:
        """Measure what the next batch takes, while `auto` is open. Devices nobody can measure (MPS) are left out."""
        if self.open:
            self._before = {device: used(device) for device in set(devices) if device.type in MOST}

    def fitted(self, size: int) -> bool:
        """A batch of this many tokens fitted. Returns whether that has settled the budget.

        The first one is not counted: it also reads weights from the disk and sets libraries up. The batch's rows
        should be the longest ones: attention takes more for a token of a long row.
        """
        if not self.open or not self._warm or size < PROBE // 2:
            self._warm = True
            return False
        most = fitting = min((MOST[device.type] for device in self._before), default=MOST["cpu"])
        for device, before in self._before.items():
            with suppress(OSError):  # macOS does not say what a process took
                each = max(peak(device) - before, 1) / size
                fitting = min(fitting, int(SHARE[device.type] * free(device) / each))
        self.tokens, self.open = max(PROBE, fitting), False
        if fitting < most:
            self._say(f"batches of up to {self.tokens:,} tokens fit into memory (--batch-tokens auto)")
        return True

    def halve(self, size: int) -> None:
        """A batch of this many tokens did not fit. What it had goes back to the device."""
        torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()
        self.tokens, self.open = max(min(self.tokens, size) // 2, 1), False
        self._say(f"out of memory at a batch of {size:,} tokens: going on with at most {self.tokens:,}")


def used(device: torch.device) -> int:
    """Bytes in use by this process. From here on `peak` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak(device: torch.device) -> int:
    """Most bytes in use since `used`. Raises OSError on a CPU without Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def free(device: torch.device) -> int:
    """Bytes that this process can still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_ram() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # which those started together share


def free_ram(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes to take without making the machine swap or its container (cgroup, version 2 or 1) end the process."""
    found = [psutil.virtual_memory().available]
    for folder, limit, taken in (".", "max", "current"), ("memory", "limit_in_bytes", "usage_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or `max`: no limit
            left, used, stat = ((cgroup / folder / f"memory.{name}").read_text() for name in (limit, taken, "stat"))
            cache = re.findall(r"inactive_file (\d+)", stat)  # the last one is the total
            found.append(int(left) - int(used) + int(cache[-1] if cache else 0))
    return max(min(found), 0)
