"""push, pull, merge, diff, gc and caches at addresses: folders, memory, a real web server, S3 through moto."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from ketchup_cache.cache.cache import open_cache as open_folder
from ketchup_cache.cache.garbage import collect
from ketchup_cache.cache.inspect import describe, verify
from ketchup_cache.cache.segment_bytes import segment_ids
from ketchup_cache.cli import main
from ketchup_cache.errors import CacheError, CorruptError, KetchupError, MismatchError, WriteError
from ketchup_cache.sharing import base
from ketchup_cache.sharing import remote_cache as view
from ketchup_cache.sharing.object_store import ObjectRemote
from ketchup_cache.sharing.stores import open_remote
from ketchup_cache.sharing.transfer import copy, diff
from tests.helpers.segments import exit_code, fill, in_child, make_prompts, prompts_info
from tests.helpers.trust_s3 import same_keys


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv(view.HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture
def cache(tmp_path):
    made = open_folder(tmp_path / "a", create=True)
    fill(made)
    return made


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for folder in ("manifests", "segments")
        for p in (root / folder).rglob("*")
        if p.is_file()
    }


def test_push_and_pull_bring_back_every_byte(cache, url, tmp_path):
    planned = copy(cache.path, url, dry_run=True)
    assert not open_remote(url).exists()
    pushed = copy(cache.path, url)
    moved = (planned.segments, planned.rows, planned.bytes)
    assert moved == (pushed.segments, pushed.rows, pushed.bytes)
    assert pushed.segments == {"prompts": 1, "rollouts": 1, "scores": 1}
    assert copy(cache.path, url).already == 3
    copy(url, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(cache.path)
    assert copy(url, tmp_path / "b").bytes == 0


def test_a_cache_at_an_address_reads_as_the_folder_does(cache, url):
    copy(cache.path, url)
    there = view.open_cache(url)
    for mine, theirs in zip(cache.rows(), there.rows(), strict=True):
        np.testing.assert_array_equal(mine.q, theirs.q)
        np.testing.assert_array_equal(mine.completion_tokens, theirs.completion_tokens)
    assert {**describe(there).to_dict(), "path": ""} == {**describe(cache).to_dict(), "path": ""}
    assert verify(there).ok
    assert verify(there, deep=False).ok


def test_what_is_committed_at_an_address_is_there_for_others(cache, url, tmp_path):
    copy(cache.path, url)
    new = view.open_cache(url).commit_prompts(make_prompts(seed=9), prompts_info())
    assert new in open_remote(url).segment_ids()
    copy(url, tmp_path / "b")
    assert verify(open_folder(tmp_path / "b")).ok
    assert new in segment_ids(tmp_path / "b")


@pytest.fixture
def web(cache):
    class Handler(http.server.SimpleHTTPRequestHandler):
        cut: ClassVar[set[str]] = set()

        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path in self.cut:
                self.cut.discard(self.path)
                data = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                return
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(cache.path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()


def test_a_web_server_is_read_only(cache, web, tmp_path):
    address, _ = web
    copy(address, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(cache.path)
    assert len(list(view.open_cache(address).rows())) == 3
    other = open_folder(tmp_path / "c", create=True)
    fill(other)
    with pytest.raises(WriteError, match="read-only"):
        copy(other.path, address)


def test_a_connection_that_is_cut_is_tried_again(cache, web, tmp_path):
    address, handler = web
    handler.cut = {f"/{name}" for name in contents(cache.path)}
    copy(address, tmp_path / "b")
    assert not handler.cut
    assert contents(tmp_path / "b") == contents(cache.path)


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer", "gone"])
def test_tampered_bytes_are_never_committed(cache, web, tmp_path, damage):
    address, _ = web
    victim = next((cache.path / "segments" / cache.manifests("scores")[0][0] / "q" / "c").iterdir())
    data = victim.read_bytes()
    changed = {"flip": bytes([data[0] ^ 1]) + data[1:], "shorter": data[:-1], "longer": data + b"x"}
    victim.unlink() if damage == "gone" else victim.write_bytes(changed[damage])
    with pytest.raises(CorruptError, match="/q/c/0: "):
        copy(address, tmp_path / "b")
    assert [m.kind for _, m in open_folder(tmp_path / "b").manifests()] == ["prompts", "rollouts"]
    with pytest.raises(CorruptError, match="/q/c/0"):
        list(view.open_cache(address).rows())
    assert not verify(view.open_cache(address), deep=False).ok
    with pytest.raises(CorruptError):
        copy(cache.path, tmp_path / "c")


def test_a_tampered_manifest_is_refused(cache, web, tmp_path):
    path = next((cache.path / "manifests").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"rows":3', b'"rows":2'))
    with pytest.raises(CorruptError, match="not those of its id"):
        copy(web[0], tmp_path / "b")


def test_a_child_without_its_parent_does_not_travel(cache, tmp_path):
    (cache.path / "manifests" / f"{cache.manifests('prompts')[0][0]}.json").unlink()
    with pytest.raises(CacheError, match="needs prompts"):
        copy(cache.path, tmp_path / "b")
    assert not segment_ids(tmp_path / "b")


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_eight_writers_of_the_same_keys(tmp_path, url):
    """Every object has one creator, and all eight pushes succeed."""
    count = same_keys(tmp_path, url, 8, 8)
    assert (count.two_creators, count.lost, count.early) == (0, 0, 0)
    assert count.objects == 1 + 8 * (7 + 1)  # the marker; of each segment seven files and the manifest


def test_damaged_data_in_the_store_is_not_published(cache, tmp_path):
    remote = ObjectRemote(f"memory://{uuid.uuid4().hex}/cache")
    prompts = cache.manifests("prompts")[0][0]
    remote._create(f"segments/{prompts}/zarr.json", b"{}")
    with pytest.raises(WriteError, match="with other bytes"):
        copy(cache.path, remote.url)
    assert remote.segment_ids() == []


def test_killed_pulls_go_on(tmp_path):
    """At no moment does a kill leave a partial segment; the next pull ends the work."""
    cache = open_folder(tmp_path / "a", create=True)
    for seed in range(30):
        cache.commit_prompts(make_prompts([300] * 20, seed=seed), prompts_info())
    rng, killed = np.random.default_rng(0), 0
    for _ in range(8):
        pid = in_child(lambda: copy(cache.path, tmp_path / "b"))
        time.sleep(rng.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        killed += exit_code(pid) == -signal.SIGKILL
        if (tmp_path / "b" / "ketchup-cache.json").exists():
            assert verify(open_folder(tmp_path / "b")).ok
    assert killed >= 1
    copy(cache.path, tmp_path / "b")
    assert contents(tmp_path / "b").keys() >= contents(cache.path).keys()
    assert verify(open_folder(tmp_path / "b")).segments == 30


def test_diff_says_what_each_side_lacks(cache, tmp_path):
    copy(cache.path, tmp_path / "b")
    new = open_folder(tmp_path / "b").commit_prompts(make_prompts(seed=5), prompts_info())
    report = diff(cache.path, tmp_path / "b")
    assert report.both == 3
    assert (report.only[0].ids, report.only[1].ids) == ((), (new,))
    assert diff(tmp_path / "b", cache.path).only[0].rows == {"prompts": 3, "rollouts": 0, "scores": 0}


def test_gc_takes_old_garbage_only(cache):
    before = contents(cache.path)
    orphan, stage = cache.path / "segments" / ("0" * 64), cache.path / "tmp" / "dead"
    for folder in (orphan, stage):
        folder.mkdir()
        (folder / "x").write_bytes(b"123")
    young = collect(cache)
    assert (young.removed, young.kept) == ((), 2)
    planned = collect(cache, hours=0, dry_run=True)
    assert orphan.exists()
    done = collect(cache, hours=0)
    assert set(done.removed) == set(planned.removed) == {"tmp/dead", f"segments/{'0' * 64}"}
    assert done.bytes == 6
    assert contents(cache.path) == before
    assert not list((cache.path / "tmp").iterdir())


def test_the_segment_cache_keeps_the_most_recently_used(cache, tmp_path):
    url = f"memory://{uuid.uuid4().hex}/cache"
    copy(cache.path, url)
    ids = {kind: cache.manifests(kind)[0][0] for kind in ("prompts", "rollouts", "scores")}
    size = {id_: sum(f.length for f in cache.manifest(id_).files.values()) for id_ in ids.values()}
    home = view.SegmentCache(tmp_path / "home", size[ids["prompts"]] + size[ids["scores"]])
    there = view.RemoteCache(open_remote(url), home)
    there.check_bytes(ids["prompts"], there.manifest(ids["prompts"]))
    for kind in ("prompts", "rollouts"):
        there.load_prompts(ids[kind]) if kind == "prompts" else there.load_rollouts(ids[kind])
    os.utime(home.path / "segments" / ids["rollouts"], (1, 1))
    there.load_scores(ids["scores"])
    held = {p.name for p in (home.path / "segments").iterdir()}
    assert ids["scores"] in held
    assert ids["rollouts"] not in held
    victim = next((home.path / "segments" / ids["scores"] / "q" / "c").iterdir())
    victim.write_bytes(b"damaged")
    assert len(list(view.RemoteCache(open_remote(url), home).rows())) == 3


def test_some_arrays_of_a_segment_do_not_bring_all_of_it(cache, tmp_path):
    url = f"memory://{uuid.uuid4().hex}/cache"
    copy(cache.path, url)
    there = view.RemoteCache(open_remote(url), view.SegmentCache(tmp_path / "home", 10**9))
    id_, manifest = there.manifests("rollouts")[0]
    asked, file = [], there.remote.file
    there.remote.file = lambda segment, name, length: asked.append(name) or file(segment, name, length)
    found = there.read_arrays(id_, manifest, {"finished"})["finished"]
    np.testing.assert_array_equal(found, cache.load_rollouts(id_).finished)
    assert sorted(asked) == ["finished/c/0", "finished/zarr.json", "zarr.json"]
    assert not (tmp_path / "home" / "segments").exists()


def test_a_segment_cache_that_can_not_be_written_is_no_obstacle(cache, tmp_path, capsys):
    url = f"memory://{uuid.uuid4().hex}/cache"
    copy(cache.path, url)
    (tmp_path / "home").write_bytes(b"a file where the folder should be")
    there = view.RemoteCache(open_remote(url), view.SegmentCache(tmp_path / "home", 10**9))
    assert len(list(there.rows())) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: segments are not kept here" in line


def test_leftovers_of_killed_processes_leave_the_segment_cache(cache, tmp_path):
    home = view.SegmentCache(tmp_path / "home", 10**9)
    old, young = (home.path / "tmp" / name for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    local = open_remote(cache.path)
    home.keep(base.read_segment(local, *_first(local)))
    assert (old.exists(), young.exists()) == (False, True)


def _first(remote):
    id_ = remote.segment_ids()[0]
    return id_, *base.read_manifest(remote, id_)


@pytest.mark.parametrize(
    "address",
    [
        "s3://user:SECRET@bucket/c",
        "https://u:SECRET@h/c",
        "https://h/c?token=SECRET",
        "s3://k:SE/SECRET@b/c",
        "hf://u:SECRET@datasets/a/b",
    ],
)
def test_credentials_in_an_address_are_refused_and_never_repeated(address, tmp_path, capsys, cache):
    for command in (["pull", address, str(tmp_path / "b")], ["push", str(cache.path), address], ["info", address]):
        assert main(command) == 2
        shown = capsys.readouterr()
        assert "SECRET" not in shown.out + shown.err
        assert "must hold no user" in shown.err
        assert len(shown.err.splitlines()) == 1
    assert base.scrub("GET https://u:SECRET@h/x?sig=SECRET failed") == "GET https://h/x failed"


def test_a_place_without_a_cache_is_one_clear_line(tmp_path, capsys):
    for address in (f"memory://{uuid.uuid4().hex}/c", str(tmp_path / "none"), "ftp://h/c", "hf://models/a/b"):
        assert main(["pull", address, str(tmp_path / "b")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(KetchupError):
        view.open_cache("memory://nothing/here")


def test_pins_show_the_pinned_segments_alone(cache):
    used = [id_ for id_, _ in cache.manifests()]
    fill(cache)
    again = open_folder(cache.path)
    again.only = frozenset(used)
    assert [id_ for id_, _ in again.manifests()] == used
    assert {ref.scores_id for ref in again.scored()} <= set(used)
    with pytest.raises(MismatchError, match="pinned"):
        again.commit_prompts(make_prompts(), prompts_info())


def test_a_damaged_copy_in_the_segment_cache_is_fetched_again(cache, tmp_path):
    url = f"memory://{uuid.uuid4().hex}/cache"
    copy(cache.path, url)
    home = view.SegmentCache(tmp_path / "home", 10**9)
    scores = cache.manifests("scores")[0][0]
    view.RemoteCache(open_remote(url), home).load_scores(scores)
    victim = home.path / "segments" / scores / "q" / "c" / "0"
    victim.write_bytes(b"damaged")
    np.testing.assert_array_equal(
        view.RemoteCache(open_remote(url), home).load_scores(scores).q, cache.load_scores(scores).q
    )
    assert victim.read_bytes() == (cache.path / "segments" / scores / "q" / "c" / "0").read_bytes()


def test_a_file_that_came_short_is_asked_for_once_more(cache):
    remote = open_remote(cache.path)
    whole, asked = remote.file, []

    def short_at_first(segment, name, length):
        asked.append(name)
        return whole(segment, name, length)[: length // 2 if asked.count(name) == 1 else length]

    remote.file = short_at_first
    packed = base.read_segment(remote, *_first(remote))
    assert dict(packed.files) == {name: whole(packed.segment_id, name, 10**6) for name in packed.files}
    assert len(asked) == 2 * len(packed.files)


def test_two_copies_of_one_segment_at_the_same_moment(cache, tmp_path, monkeypatch):
    """Another process puts the same segment there just before our rename."""
    rename, late = os.rename, []

    def beaten(source, target):
        target = Path(target)
        if target.parent == tmp_path / "b" / "segments":
            shutil.copytree(cache.path / "segments" / target.name, target)
            late.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "rename", beaten)
    copy(cache.path, tmp_path / "b")
    assert len(late) == 3
    assert contents(tmp_path / "b") == contents(cache.path)
