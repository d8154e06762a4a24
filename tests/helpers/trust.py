"""What breaks caches, on purpose and many times: kills, failing disks, damage, writers at once. Everything is counted.

`tests/cache/test_trust.py` runs a short form, `benchmarks/soak.py` the long one. Children are forked, so a command that
imports torch is killed at work and not at its imports.
"""

import errno
import itertools
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil

from ketchup_cache import files, open_cache
from ketchup_cache.cache import disk
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cache.segment_bytes import MARKER, Packed
from ketchup_cache.cli import main
from ketchup_cache.errors import KetchupError, WriteError
from ketchup_cache.sharing.stores import open_store
from tests.helpers import segments
from tests.helpers.segments import add_prompts, exit_code, fill, in_child, load_all, make_prompts, prompts_info, same

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG)


# ---------------------------------------------------------------------------------------------------------- kills


class Count(SimpleNamespace):
    """How often each thing happened, by name."""


def kills() -> Count:
    """acknowledged: commits; lost: those that are gone. partial: segments that are visible and can't be loaded."""
    return Count(kills=0, acknowledged=0, lost=0, partial=0)


def kill_at_random(work, root: Path | str, count: Count, times: int, after_s: float, seed: int, attempt=None) -> None:
    """Run some work that commits to the cache in `root`, kill it after a random time, look; so many kills.

    Work that ends by itself before its time is not counted, and begun again. attempt: in place of `run_and_kill`.
    """
    rng, target = random.Random(seed), count.kills + times
    acknowledged: set[str] = set()
    loaded: set[str] = set()
    while count.kills < target:
        ids, killed = (attempt or run_and_kill)(work, rng.uniform(0, after_s))
        count.kills += killed
        count.acknowledged += len(ids - acknowledged)
        acknowledged |= ids
        store = open_store(root)
        visible = set(store.segment_ids()) if store.exists() else set()
        count.lost += len((acknowledged | loaded) - visible)
        if visible:
            count.partial += unreadable(open_cache(root), visible - loaded)
        loaded |= visible


def run_and_kill(work: Callable[[], object], after_s: float, after_commits: int = 0) -> tuple[set[str], bool]:
    """What was acknowledged, and whether the kill came before the end.

    after_s: from the start, or from the moment at which so many commits are acknowledged.
    """
    publish = disk.publish
    with tempfile.TemporaryFile(buffering=0) as log:

        def then_say_so(root: Path, packed: Packed) -> None:
            publish(root, packed)
            log.write(f"{packed.segment_id}\n".encode())

        def acknowledging() -> None:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            disk.publish = then_say_so
            work()

        pid = in_child(acknowledging)
        while os.pread(log.fileno(), 1 << 20, 0).count(b"\n") < after_commits and not ended(pid):
            time.sleep(0.001)
        killer = threading.Timer(after_s, os.kill, (pid, signal.SIGKILL))
        killer.start()
        ended(pid, wait=True)  # until then the killer can meet no other process
        killer.cancel()
        killer.join()
        code = exit_code(pid)
        log.seek(0)
        said = set(log.read().decode().split())
    assert code != 70, "the work failed by itself"
    return said, code == -signal.SIGKILL


def kill_once(work: Callable[[], object], ready: Callable[[], object], pause_s: float = 0.0) -> bool:
    """Some work in a child, killed this long after it is `ready`. False: it had ended before."""
    pid = in_child(work)
    while not ready() and not ended(pid):
        time.sleep(0.002)
    time.sleep(pause_s)
    os.kill(pid, signal.SIGKILL)
    return exit_code(pid) == -signal.SIGKILL


def ended(pid: int, wait: bool = False) -> bool:
    """Whether this child has ended. It stays a zombie, so its number is nobody else's."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)) is not None


def ray_workers() -> list[psutil.Process]:
    """Workers of `--engine ray` on a cluster that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [process] if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_Worker") else []
    return found


def unreadable(cache: Cache, ids: Iterable[str]) -> int:
    """How many of these segments can't be loaded."""
    failed = 0
    for segment_id in ids:
        try:
            cache.load(segment_id)
        except KetchupError:
            failed += 1
    return failed


def write_for_ever(root: Path) -> None:
    """A writer without torch: whole families of segments through the real commit path, with sizes of all kinds."""
    cache = open_cache(root, create=True)
    parent = os.getppid()
    for seed in itertools.count(os.getpid()):
        if os.getppid() != parent:  # nobody is left to kill us
            return
        lengths = (5, 2, 7) if seed % 5 else (300, 0, 400)
        fill(cache, sizes=((3, 1, 4), lengths, ((0, 1), (1, 3))), seed=seed)


def kill_writers(folder: Path, times: int, seed: int = 0) -> Count:
    count, rng = kills(), random.Random(seed)
    for _ in range(2):  # the first time is slower
        began = time.monotonic()
        fill(folder / "measure")
        after_s = 0.4 * (time.monotonic() - began)

    def attempt(work, after_s: float) -> tuple[set[str], bool]:
        return run_and_kill(work, after_s, after_commits=rng.randrange(4))  # however slow the machine is

    per_cache = 20  # so that a look at the whole cache stays quick
    for at in range(0, times, per_cache):
        root = folder / f"writer {at}"
        open_cache(root, create=True)
        some = min(per_cache, times - at)
        kill_at_random(lambda root=root: write_for_ever(root), root, count, some, after_s, seed + at, attempt)
        assert verify(open_cache(root)).ok
        shutil.rmtree(root)
    return count


def kill_clean(root: Path, times: int, leftovers: int = 40, seed: int = 0) -> Count:
    """Kill `verify --clean` while it tidies what looks like remains of killed commits. Whole segments must stay."""
    count, rng = kills(), random.Random(seed)
    kept, words = fill(root), ["verify", str(root), "--clean", "--older-than", "0"]
    count.acknowledged = len(kept)
    whole_s = 0.0
    while count.kills < times:
        for name in range(leftovers):
            segment = segments.fingerprint(str(name))  # of a manifest with these bytes
            shutil.copytree(root / "segments" / kept[0], root / "segments" / segment, dirs_exist_ok=True)
            (root / "tmp" / segment).mkdir(exist_ok=True)
            (root / "tmp" / segment / "manifest.json").write_text(str(name))
        began = time.monotonic()
        _, killed = run_and_kill(lambda: run(words), rng.uniform(0, 0.9 * whole_s) if whole_s else 600)
        whole_s = whole_s or time.monotonic() - began
        count.kills += killed
        cache = open_cache(root)
        count.lost += len(set(kept) - set(cache.segment_ids()))
        count.partial += unreadable(cache, kept)
    run_and_kill(lambda: run(words), 600)  # and at last it finishes
    report = verify(open_cache(root))
    assert report.ok
    assert report.leftovers == ()
    return count


def run(words: list[str]) -> None:
    if main(words):
        raise AssertionError(f"{words[0]} failed")


# ------------------------------------------------------------------------------------------------- failing writes


STEPS = ("mkdir", "makedirs", "open", "write", "fsync", "close", "rename")
NEW = (make_prompts((2, 6), seed=9), prompts_info())


class Interrupted:
    """Stands in for `os`: counts the steps on the file system, and does something at the n-th."""

    def __init__(self, at: int, act) -> None:
        self.at, self.act, self.done = at, act, 0
        self.counting = threading.Lock()  # files are written in threads

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*args, **kwargs):
            with self.counting:
                self.done += 1
                now = self.done - 1
            return self.act(name, real, args) if now == self.at else real(*args, **kwargs)

        return step


def stand_in(patch, fake: object) -> None:
    """`os` of everything that a commit does to the disk."""
    for module in (disk, files):
        patch.setattr(module, "os", fake)


def kill(name, real, args):
    """Die before the step, which is after the one before; in the middle where half of the bytes can be written."""
    if name == "write":
        real(args[0], args[1][: len(args[1]) // 2])
    os._exit(9)


def failing(number: int):
    """A step that raises this error, in the middle of a write."""

    def fail(name, real, args):
        if name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        if name == "close":
            real(*args)
        raise OSError(number, os.strerror(number))

    return fail


def count_steps(cache: Cache, patch_with) -> int:
    with patch_with.context() as patch:
        stand_in(patch, counter := Interrupted(-1, None))
        cache.commit_prompts(*NEW)
    return counter.done


def fail_every_step(folder: Path, patch_with, errors: tuple[int, ...] = ERRORS, every: int = 1) -> Count:
    """Each of the errors at each step of a commit, or at every so manieth. A failed commit says so in
    one line, leaves no data in `tmp/`, and is seen only where its rename is done; run again, it succeeds.

    unclear: errors that are not one line with the folder, the reason and what to do.
    """
    count, root = Count(failures=0, false_acknowledgements=0, unclear=0), folder / "failing"
    cache = open_cache(root, create=True)
    family = set(fill(cache))
    steps = count_steps(cache, patch_with)
    for number in errors:
        for at in range(number % every, steps, every):
            count.failures += 1
            before = set(open_cache(root).segment_ids())
            with patch_with.context() as patch:
                stand_in(patch, Interrupted(at, failing(number)))
                try:
                    cache.commit_prompts(*NEW)
                except WriteError as error:
                    text = str(error)
                    said = "run the command again" in text or "choose a cache folder" in text
                    said = said and str(root) in text and os.strerror(number) in text
                    count.unclear += "\n" in text or not said
                else:
                    count.false_acknowledgements += 1
            count.unclear += any((stage / "data").exists() for stage in (root / "tmp").iterdir())
            # the last three steps sync a rename that is done
            assert set(open_cache(root).segment_ids()) == before or at >= steps - 3
    assert same(cache.load_prompts(cache.commit_prompts(*NEW)), NEW[0])
    assert verify(open_cache(root)).ok
    assert family <= set(open_cache(root).segment_ids())
    return count


# --------------------------------------------------------------------------------------------------------- damage


def flips(folder: Path, cases: int, seed: int = 0) -> Count:
    """One bit flipped, or one byte replaced, somewhere in some file: each file as often as any other. Segments of every
    kind and storage."""
    root = folder / "flipped"
    fill(root)
    fill(open_cache(root), sizes=((3, 1, 4), (300, 0, 200), ((0, 3),)), seed=3, storage="compact")
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in paths}
    load_all(root)
    rng = random.Random(seed)
    count = Count(cases=0, refused=0, silent=0)
    for case in range(cases):
        path = paths[case % len(paths)]
        damaged = bytearray(whole[path])
        place = rng.randrange(len(damaged))
        damaged[place] ^= 1 << rng.randrange(8) if case % 2 else rng.randrange(1, 256)
        path.write_bytes(damaged)
        count.cases += 1
        try:
            load_all(root)
        except KetchupError as error:
            count.refused += "\n" not in str(error) and str(path) in str(error)
        else:
            count.silent += 1
        path.write_bytes(whole[path])
    load_all(root)
    return count


# ------------------------------------------------------------------------------------------------ writers at once


def write_at_once(folder: Path, processes: int, each: int) -> Count:
    """looks: how often a reader listed the whole cache meanwhile. torn: segments that it could not load."""
    root, log = folder / "crowded", folder / "acknowledged"

    def work(first: int) -> None:
        cache = open_cache(root, create=True)
        for seed in range(first, first + each):
            segment_id = add_prompts(cache, (3, 0, 5), seed=seed)
            with log.open("a") as file:  # one short write: those of others stay whole
                file.write(f"{segment_id} {seed}\n")

    pids = [in_child(lambda i=i: work(10_000 * i)) for i in range(processes)]
    count, seen = Count(segments=0, lost=0, torn=0, looks=0), set()
    with ThreadPoolExecutor(processes) as pool:
        codes = [pool.submit(exit_code, pid) for pid in pids]
        while not all(code.done() for code in codes):
            if (root / MARKER).exists():
                count.looks += 1
                cache = open_cache(root)
                count.torn += unreadable(cache, set(cache.segment_ids()) - seen)
                seen |= set(cache.segment_ids())
    assert [code.result() for code in codes] == [0] * processes
    acknowledged = dict(line.split() for line in log.read_text().splitlines())
    count.segments = len(acknowledged)
    cache = open_cache(root)
    there = set(cache.segment_ids())
    for segment_id, seed in acknowledged.items():
        whole = segment_id in there and same(cache.load_prompts(segment_id), make_prompts((3, 0, 5), seed=int(seed)))
        count.lost += not whole
    return count
