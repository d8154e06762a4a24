"""How much faster k_step_returns is than Algorithm 1 written out in Python. Prints a table.

python -m benchmarks.returns
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ketchup_cache import k_step_returns
from tests.helpers.returns import algorithm_1


def best(call: Callable[[], object], repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'B':>6} {'T':>5} {'K':>4} {'literal ms':>11} {'ours ms':>9} {'ratio':>7}")
    for rows, width, k in ((256, 64, 1), (256, 64, 4), (256, 64, 16), (256, 300, 4), (4096, 64, 4)):
        q = rng.normal(size=(rows, width)).astype(np.float32)
        max_q = q + rng.exponential(size=q.shape).astype(np.float32)
        lengths, pairs = np.full(rows, width), list(zip(q.tolist(), max_q.tolist(), strict=True))
        # lists of Python floats are the literal version's best case
        literal = best(lambda pairs=pairs, k=k: [algorithm_1(a, b, k) for a, b in pairs])
        ours = best(lambda q=q, m=max_q, n=lengths, k=k: k_step_returns(q, m, n, k))
        print(f"{rows:>6} {width:>5} {k:>4} {literal * 1e3:>11.3f} {ours * 1e3:>9.3f} {literal / ours:>7.1f}")


if __name__ == "__main__":
    main()
