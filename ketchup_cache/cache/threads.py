"""Work on the files of a segment in a few threads: hashing, compression and syncing leave the interpreter free."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PROCESSORS = min(8, os.cpu_count() or 1)
"""Threads for work that never waits."""
THREADS = min(8, PROCESSORS + 2)
"""Two more, where some of them wait for the disk."""


def each(work: Callable[[Item], Result], items: Sequence[Item], threads: int = THREADS) -> list[Result]:
    """The results in the order of the items. When it returns or raises, no thread is left.

    Raises what the first failing item (in their order) raised; items that nobody has begun by then are left out.
    """
    if len(items) < 2:
        return one_by_one(work, items)
    # a pool of its own for each call: a forked process has no threads, and must not wait for its parent's
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def one_by_one(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [work(item) for item in items]
