"""Many manifests in one file: opening reads it alone, believes nothing in it, and shows what it would show without."""

import hashlib
import json
import os
import tracemalloc

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache import index_file
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.disk import FolderStore
from ketchup_cache.cache.index import Index
from ketchup_cache.cache.inspect import verify
from ketchup_cache.errors import CorruptError, WriteError
from ketchup_cache.provenance import canonical_json
from ketchup_cache.sharing.remote_cache import MirroredStore
from tests.helpers.errors import refuses
from tests.helpers.segments import exit_code, fill, in_child

MANY = 60


def add(root, count, first=0, **changed):
    """More manifests like that of the first scores, at other times; their ids."""
    one = next(p for p in sorted((root / "manifests").iterdir()) if b'"kind":"scores"' in p.read_bytes())
    record, ids = json.loads(one.read_text()), []
    for number in range(first, first + count):
        data = canonical_json(record | {"created": f"2027-01-01T00:00:00.{number:06}Z"} | changed)
        ids.append(hashlib.sha256(data).hexdigest())
        (root / "manifests" / f"{ids[-1]}.json").write_bytes(data)
    return ids


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(index_file.HOME_VARIABLE, str(tmp_path / "home"))
    fill(tmp_path / "cache")
    add(tmp_path / "cache", MANY)
    return tmp_path / "cache"


@pytest.fixture
def alone(monkeypatch):
    """Ids of the manifests that were read from files of their own."""
    read, ids = FolderStore.manifest, []
    monkeypatch.setattr(FolderStore, "manifest", lambda store, id_: ids.append(id_) or read(store, id_))
    return ids


def test_the_second_opening_reads_one_file_and_shows_the_same(root, alone):
    first = open_cache(root).manifests()
    assert (len(first), len(set(alone))) == (MANY + 3, MANY + 3)
    alone.clear()
    again = open_cache(root)
    assert (again.manifests(), alone) == (first, [])
    assert again.scored() == Index(dict(first), "x").scored()
    assert again.manifest(first[0][0]).rows == first[0][1].rows
    assert alone == [first[0][0]]  # checked again where it is used


def test_new_ones_are_read_alone_and_the_file_is_rarely_written(root, alone):
    ids = set(open_cache(root).segment_ids())
    reader, before = open_cache(root), (root / FolderStore.INDEX).stat()
    reader.segment_ids()
    alone.clear()
    few = add(root, index_file.FEW, MANY)
    reader.refresh()
    assert (set(reader.segment_ids()), set(alone)) == (ids | set(few), set(few))
    assert set(open_cache(root).segment_ids()) == ids | set(few)
    assert (root / FolderStore.INDEX).stat().st_ino == before.st_ino
    more = add(root, 10, 1000)
    (root / "manifests" / f"{few[0]}.json").unlink()
    for _ in range(2):
        alone.clear()
        assert set(open_cache(root).segment_ids()) == ids | {*few[1:], *more}
    assert alone == []


def forged(data):
    return data.replace(b'"tokens":', b'"tokens":1')


HARM = {
    "torn": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "noise": lambda path, data: path.write_bytes(os.urandom(10_000) + data),
    "forged": lambda path, data: path.write_bytes(forged(data)),
    "forged beside": lambda path, data: path.write_bytes(forged(data) + data),
    "too long": lambda path, data: path.write_bytes(data * 100),
    "link": lambda path, data: (path.unlink(), path.symlink_to("/dev/zero")),
    "pipe": lambda path, data: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path, data: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_whatever_the_file_holds_the_cache_shows_the_same(root, harm):
    shown = open_cache(root).manifests()
    harm(root / FolderStore.INDEX, (root / FolderStore.INDEX).read_bytes())
    assert open_cache(root).manifests() == shown
    assert open_cache(root).manifests() == shown


def test_a_manifest_that_breaks_the_format_is_refused_from_the_file_as_without_it(root):
    open_cache(root).segment_ids()
    (bad,) = add(root, 1, MANY, rows=-1)
    refuses(CorruptError, f"manifests/{bad}.json: rows", open_cache(root).segment_ids)
    with (root / FolderStore.INDEX).open("ab") as file:
        file.write((root / "manifests" / f"{bad}.json").read_bytes() + b"\n")
    refuses(CorruptError, f"manifests/{bad}.json: rows", open_cache(root).segment_ids)


def test_damage_behind_the_file_is_found_where_the_segment_is_used(root):
    scores = open_cache(root).manifests("scores")[0][0]
    (root / "manifests" / f"{scores}.json").write_bytes(b"{}")
    cache = open_cache(root)
    assert scores in cache.segment_ids()
    refuses(CorruptError, "its bytes are not those of its id", cache.load_scores, scores)
    assert any(scores in problem for problem in verify(cache).problems)


@pytest.mark.parametrize("mirrored", [False, True], ids=["read-only", "address"])
def test_where_the_cache_takes_no_file_the_users_folder_holds_it(root, alone, monkeypatch, tmp_path, mirrored):
    def refused(path, text, write=index_file.write_file):
        if path.parent == root:
            raise WriteError("read-only")
        write(path, text)

    monkeypatch.setattr(index_file, "write_file", refused)
    store = FolderStore(root)
    place = MirroredStore(store, tmp_path / "home", 10**9) if mirrored else store
    shown = Cache(place).manifests()
    alone.clear()
    assert (Cache(place).manifests(), alone, (root / FolderStore.INDEX).exists()) == (shown, [], False)


def test_many_open_at_once(root):
    def opened():
        for _ in range(5):
            assert len(open_cache(root).segment_ids()) == MANY + 3
            (root / FolderStore.INDEX).unlink(missing_ok=True)

    assert [exit_code(pid) for pid in [in_child(opened) for _ in range(4)]] == [0] * 4


def test_a_segment_takes_little_memory(root):
    open_cache(root).segment_ids()
    add(root, 2000, 10_000)
    open_cache(root).segment_ids()
    tracemalloc.start()
    count = len((cache := open_cache(root)).segment_ids())
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cache.manifests()) == count > 2000
    assert held / count < 2500
    assert most / count < 6000
