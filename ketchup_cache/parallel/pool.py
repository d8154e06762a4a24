"""Workers on a Ray cluster: each makes ready once, and does one part of the work after another.

Ray starts a worker wherever there is room. Who does which part is decided here: a worker gets one once it says that it
is ready, so that nothing waits for a machine that is still to come, and the part of one that has died is the next that
is given out.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

from ketchup_cache.config.options import RayOptions
from ketchup_cache.console import LOG_EVERY_S, one_line, say
from ketchup_cache.errors import ConfigError, KetchupError, ProcessError
from ketchup_cache.parallel.group import started

Part = TypeVar("Part", bound=Hashable)
Result = TypeVar("Result")
KEYS = ("KETCHUP_CACHE_API_KEY", "HF_TOKEN", "AWS_", "AZURE_STORAGE_")
"""How the names of variables begin that a worker has from the command."""
MOST_DEATHS = 5
"""Workers that may die of the same part; for each worker, in a row, before one is ready."""


def on_ray(
    options: RayOptions, make: Callable[[], Callable[[Part], Result]], parts: Iterable[Part]
) -> Iterator[tuple[Part, Result]]:
    """Each part with what a worker made of it, in the order in which they end. A part may be begun several times.

    make: what a worker does once; gives what it does with a part. Both sides pickle what they send. parts: tuples, all
    different. Raises ConfigError where there is no cluster; what a worker raises, with the machine where it did;
    ProcessError where workers keep dying (`MOST_DEATHS`).
    """
    if started():
        raise ConfigError(["--engine ray has workers of its own: start it without torchrun"])
    import ray
    from ray.exceptions import RayError, RayTaskError

    with nullcontext() if ray.is_initialized() else _connected(ray, options):
        has_gpus = options.device != "cpu" and any(node["Resources"].get("GPU") for node in ray.nodes())
        gpus = float(has_gpus) if options.ray_gpus is None else options.ray_gpus
        worker_class = ray.remote(_Worker).options(num_cpus=options.ray_cpus, num_gpus=gpus)
        variables = {name: value for name, value in os.environ.items() if name.startswith(KEYS)}
        variables["OMP_NUM_THREADS"] = str(options.ray_cpus)
        given = ray.cloudpickle.dumps(make), variables, os.getcwd()  # a runtime_env would be in Ray's logs
        waiting, deaths, idle = deque[Part | None](parts), Counter[Part | None](), list[Any]()
        busy: dict[Any, tuple[Any, Part | None]] = {}
        left = len(waiting)
        while left:
            room = options.ray_workers or _room(ray.nodes(), {"CPU": options.ray_cpus, "GPU": gpus})
            wanted = max(1, min(room, left))
            for worker in (worker_class.remote(*given) for _ in range(wanted - len(idle) - len(busy))):
                busy[worker.call.remote(None)] = worker, None
            while waiting and idle:
                worker, part = idle.pop(), waiting.popleft()
                busy[worker.call.remote(part)] = worker, part
            done, _ = ray.wait(list(busy), timeout=LOG_EVERY_S)
            if not done and not any(part for _, part in busy.values()):
                say("no worker is ready: they load the model, or the cluster has no room for one (`ray status`)")
            for call in done:
                worker, part = busy.pop(call)
                try:
                    result = ray.get(call)
                except RayTaskError as error:
                    raise error.cause from error
                except RayError as error:  # the worker has died, or its machine is gone
                    deaths[part] += 1
                    why = one_line(str(error).strip().splitlines()[-1], 100)
                    if deaths[part] >= MOST_DEATHS * (1 if part else wanted):
                        what = f"workers die again and again {'of the same part' if part else 'before one is ready'}"
                        raise ProcessError(f"{what} (memory? `ray logs`): {why}") from None
                    say(f"a worker has ended{', another does its part' if part else ''}: {why}")
                    waiting.extendleft([part] if part else [])
                    continue
                idle.append(worker)
                if part:
                    left -= 1
                    yield part, result
                deaths[part] = 0


class _Worker:
    """On a machine of the cluster."""

    def __init__(self, make: bytes, variables: dict[str, str], folder: str) -> None:
        """make: pickled, since reading it imports what reads the variables. folder: where the command was started."""
        os.environ |= variables
        with suppress(OSError):
            os.chdir(folder)
        self._make, self._do = make, None  # type: Any, Any

    def call(self, part: Any) -> Any:
        """What comes of a part. Of None nothing: this worker is ready."""
        import ray

        try:
            self._do = self._do or ray.cloudpickle.loads(self._make)()
            return part and self._do(part)
        except KetchupError as error:
            error.args = *error.args[:-1], f"{error.args[-1]} (on {ray.util.get_node_ip_address()})"
            raise


def _connected(ray: Any, options: RayOptions) -> AbstractContextManager[Any]:
    """Raises ConfigError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that begins here
    ray._private.worker._worker_logs_enabled = False  # what Ray says of dead workers goes to stdout, amid --json
    address = options.ray_address or os.environ.get("RAY_ADDRESS")
    try:
        if address and ":" in address:  # Ray itself tries for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        return ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        what = f"no Ray cluster answers at {address or 'this machine'} ({one_line(error)})"
        raise ConfigError([f"{what}: start one (`ray start --head`), or correct --ray-address"]) from None


def _room(nodes: Iterable[dict[str, Any]], needs: dict[str, float]) -> int:
    """Workers that the machines can hold which are there."""
    there = (node["Resources"] for node in nodes if node["Alive"])
    return sum(min(int(has.get(kind, 0) / n) for kind, n in needs.items() if n) for has in there)
