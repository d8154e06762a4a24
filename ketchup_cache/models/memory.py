"""How many tokens go through a model at once: as many as were asked for, or as fit into memory.

Running out is an exception on a GPU, and on a CPU where the operating system limits the process. Where it rather kills
processes, only `auto` helps, which looks first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch

PROBE = 2048
"""Tokens of the batches that `auto` looks at: they keep a machine busy already (`models/batching.py`)."""
MOST = {"cuda": 65_536}
"""Largest budget that `auto` takes, by kind of device; more than this gains nothing."""
MOST_ELSEWHERE = 4096
"""On a CPU blocks of a few megabytes come from the allocator again and again, larger ones from the system each time."""
SHARE = {"cuda": 0.8}
"""Of the free memory. Others live in a CPU's, and going over ends the process there, not the batch."""
SHARE_ELSEWHERE = 0.5

MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what PyTorch or NumPy raises on any device when memory has run out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in MESSAGES)


def say(text: str) -> None:
    print(f"score: {text}", file=sys.stderr, flush=True)


class TokenBudget:
    """Largest batch, in tokens. It is found once, and after that it only shrinks: keep it for a whole run."""

    def __init__(self, asked: int | Literal["auto"], say: Callable[[str], None] = say) -> None:
        """asked: a number of tokens, or what `auto` finds in the first full batches. say: told of what was found."""
        self._tokens = PROBE if asked == "auto" else asked
        self.open = asked == "auto"
        self._warm = False
        self._say = say

    @property
    def tokens(self) -> int:
        return self._tokens

    def watch(self, devices: Iterable[torch.device]) -> Watch | None:
        """To be made before a batch, where its memory is wanted."""
        return Watch(devices) if self.open else None

    def fitted(self, watch: Watch, size: int) -> bool:
        """A batch of so many tokens went through. Returns whether that has settled the budget.

        The first one is not counted: it also reads weights from the disk and sets libraries up.
        """
        if not self._warm or size < PROBE // 2:
            self._warm = True
            return False
        fitting = watch.fitting(size)
        self._tokens, self.open = max(PROBE, fitting), False
        if fitting < watch.most:
            self._say(f"batches of up to {self._tokens:,} tokens fit into memory (--batch-tokens auto)")
        return True

    def halve(self, size: int) -> None:
        """A batch of so many tokens did not go through."""
        self._tokens, self.open = max(min(self._tokens, size) // 2, 1), False
        self._say(f"out of memory at a batch of {size:,} tokens: going on with at most {self._tokens:,}")


class Watch:
    """The memory that a batch takes on each of the devices, from here on."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._before = {device: _used(device) for device in set(devices)}
        for device in self._before:
            _forget_peak(device)

    @property
    def most(self) -> int:
        """Tokens beyond which a larger batch is of no use on these devices."""
        return min(MOST.get(device.type, MOST_ELSEWHERE) for device in self._before)

    def fitting(self, size: int) -> int:
        """How many tokens like those of this batch fit into what is free now, at most what is of use.

        The rows of the batch should be the longest ones: attention takes more for a token of a long row.
        """
        found = [self.most]
        for device, before in self._before.items():
            peak, free = _peak(device), _free(device)
            if before is not None and peak is not None and free is not None:
                each = max(peak - before, 1) / size
                found.append(int(SHARE.get(device.type, SHARE_ELSEWHERE) * free / each))
        return min(found)


def release() -> None:
    """Give what a failed batch had back to the device."""
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


# ------------------------------------------------------- bytes of one device; None where nobody knows (MPS, macOS)


def _used(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if device.type == "cpu" else None


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if device.type == "cpu" else None


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_ram() if device.type == "cpu" else None


def free_ram(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without making the machine swap or its container end it."""
    known = [_line(root / "proc/meminfo", "MemAvailable:", 1024)]
    groups = root / "sys/fs/cgroup"
    for limit, used, cache in (
        (groups / "memory.max", groups / "memory.current", "inactive_file"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, taken = _line(limit), _line(used)
        if most is not None and taken is not None:
            known.append(most - taken + (_line(used.parent / "memory.stat", cache) or 0))
    found = [value for value in known if value is not None]
    return max(min(found), 0) if found else None


def _status(name: str) -> int | None:
    return _line(Path("/proc/self/status"), f"{name}:", 1024)


def _line(file: Path, name: str = "", unit: int = 1) -> int | None:
    """The number behind a name, or the only one of a file; None where there is none (`max` means no limit)."""
    try:
        for line in file.read_text().splitlines():
            words = line.split()
            if not name or words[0] == name:
                return int(words[bool(name)]) * unit
    except (OSError, ValueError, IndexError):
        return None
    return None
