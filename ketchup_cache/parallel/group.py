"""The processes that torchrun or `accelerate launch` started together: which one this is, and what they do as one.

Work is dealt out, and what comes of it is put together in the order that one process gives it. What one process must do
alone (files, texts for people) the first does, and the others wait. Of a process without others nothing here imports
torch.distributed.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.console import is_first, one_line
from ketchup_cache.errors import ProcessError

if TYPE_CHECKING:
    from torch.nn import Parameter

Value = TypeVar("Value")
Given = ParamSpec("Given")
LONGEST = timedelta(hours=1)
"""That processes wait for one that works alone, or has more to do. One that has ended is noticed at once by its closed
connection, and a machine that is lost by the launcher."""
FAILED = "failed"
"""Key in the store of the launcher: how many processes had something to say of their end."""


@dataclass(frozen=True)
class Group:
    """rank: which of `size` processes this one is. Every method but `mine` and `cut` must be called by all of them, in
    the same order. They raise ProcessError where another process has ended."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def mine(self, items: Iterable[Value]) -> Iterator[Value]:
        """This process's items: every `size`-th."""
        return islice(items, self.rank, None, self.size)

    def level(self, mine: list[Value], spare: Value) -> list[Value]:
        """`mine` with `spare` behind it, as often as another process has more: all have as many."""
        return mine + [spare] * (max(self.gathered(len(mine))) - len(mine))

    def in_order(self, mine: list[Value]) -> list[Value]:
        """What came of the items of `mine` in each process, in the order of the items. None of them is None."""
        return [one for some in zip_longest(*self.gathered(mine)) for one in some if one is not None]

    def cut(self, rows: NDArray[np.int64], sizes: NDArray) -> NDArray[np.int64]:
        """This process's part of the rows, next to each other: about an equal part of the sum of their sizes."""
        middle = np.cumsum(sizes) - sizes / 2
        owner = (middle * self.size / max(sizes.sum(), 1)).astype(np.int64)
        return rows[np.minimum(owner, self.size - 1) == self.rank]

    def gathered(self, value: Value) -> list[Value]:
        """The value of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with together():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` gives in the first process, which calls it alone."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        found: list[Any] = [None]
        if self.first:
            with alone():
                found = [make()]
        with together():
            dist.broadcast_object_list(found, 0)
        return found[0]

    def summed(self, values: NDArray) -> NDArray:
        """The sum of an array over all processes, the same to the bit in each."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(np.array(values))
        with together():
            dist.all_reduce(total)
        return total.numpy()

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Sum the gradients over all processes. A parameter that has one in no process stays without. FSDP has done it
        for its parts (DTensors)."""
        every = [p for p in parameters if not hasattr(p, "full_tensor")]
        if self.size == 1 or not every:
            return
        import torch
        import torch.distributed as dist

        has = self.summed(np.array([p.grad is not None for p in every], np.int64))
        used = [p for p, known in zip(every, has, strict=True) if known]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        total = torch.cat([part.flatten() for part in parts])
        with together():
            dist.all_reduce(total)
        for p, part in zip(used, total.split([p.numel() for p in used]), strict=True):
            p.grad = part.view_as(p)


_ALONE = Group()
_current: Group | None = None
_store: Any = None


def started() -> bool:
    """Whether a launcher started this process with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def group() -> Group:
    """Of this process; joined when it is asked for first. Raises ProcessError where the others can't be met."""
    global _current
    if _current is None:
        _current = _join() if started() else _ALONE
    return _current


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process is on its own."""
    global _current
    before, _current = _current, _ALONE
    try:
        yield
    finally:
        _current = before


def by_first(function: Callable[Given, Value]) -> Callable[Given, Value]:
    """The first process calls the function alone; all get what it returns."""

    @wraps(function)
    def call(*args: Given.args, **named: Given.kwargs) -> Value:
        return group().from_first(lambda: function(*args, **named))

    return call


def first_to_fail() -> bool:
    """Whether this process is the one to say why all of them end: the first that asks."""
    with suppress(RuntimeError):
        if _store is not None:
            return bool(_store.add(FAILED, 1) == 1)
    return is_first()


def leave() -> None:
    """At the end, when all goes well."""
    if _store is not None:
        import torch.distributed as dist

        dist.destroy_process_group()


def _join() -> Group:
    global _store
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus:  # what "cuda" without a number means from here on
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)
    if not dist.is_initialized():
        with together():
            _store, rank, size = next(rendezvous("env://", timeout=LONGEST))
            # two processes may share a GPU, but not by NCCL
            backend = "cpu:gloo,cuda:nccl" if gpus >= here else "gloo"
            dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=LONGEST)
        if threading.current_thread() is threading.main_thread():  # the launcher's way to end the others
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    return Group(dist.get_rank(), dist.get_world_size())


@contextmanager
def together(known_by: str = "") -> Iterator[None]:
    """What processes do as one. known_by: a pattern of what is said where another one fails them, if the block does
    more than that. Raises ProcessError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(known_by, str(error), re.IGNORECASE):
            raise
        what = f"another process of this command has ended, or does not answer ({one_line(error, 60)})"
        raise ProcessError(f"{what}: run the same command again to continue") from error
