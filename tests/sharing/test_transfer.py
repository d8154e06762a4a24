"""push, pull, merge, info A B, verify --clean; caches at addresses: folders, memory, a web server, S3 by moto."""

import functools
import http.server
import os
import shutil
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import clean, compare, describe, verify
from ketchup_cache.cache.segment_bytes import read_manifest, read_segment
from ketchup_cache.cli import main
from ketchup_cache.errors import CacheError, CorruptError, KetchupError, MismatchError, WriteError
from ketchup_cache.sharing import remote_cache, stores
from ketchup_cache.sharing.stores import ObjectStore, open_store
from ketchup_cache.sharing.transfer import copy
from ketchup_cache.shipped import task
from tests.helpers.errors import fails, refuses
from tests.helpers.hostile import altered, forge
from tests.helpers.segments import add_prompts, contents, fill
from tests.helpers.stores import KEYS, same_keys


def test_push_and_pull_bring_back_every_byte(cache, url, tmp_path):
    planned = copy(cache.path, url, dry_run=True)
    assert not open_store(url).exists()
    pushed = copy(cache.path, url)
    moved = (planned.segments, planned.rows, planned.bytes)
    assert moved == (pushed.segments, pushed.rows, pushed.bytes)
    assert pushed.segments == {"prompts": 1, "rollouts": 1, "scores": 1}
    assert copy(cache.path, url).already == 3
    copy(url, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(cache.path)
    assert copy(url, tmp_path / "b").bytes == 0


def test_a_cache_at_an_address_reads_as_the_folder_does_and_takes_commits(cache, url, tmp_path):
    copy(cache.path, url)
    there = open_cache(url)
    for mine, theirs in zip(cache.rows(), there.rows(), strict=True):
        np.testing.assert_array_equal(mine.q, theirs.q)
        np.testing.assert_array_equal(mine.completion_tokens, theirs.completion_tokens)
    assert {**describe(there).to_dict(), "path": ""} == {**describe(cache).to_dict(), "path": ""}
    assert verify(there).ok
    assert verify(there, deep=False).ok
    # and what is committed there is there for others
    new = add_prompts(open_cache(url), seed=9)
    assert new in open_store(url).segment_ids()
    copy(url, tmp_path / "b")
    assert verify(open_cache(tmp_path / "b")).ok
    assert new in open_cache(tmp_path / "b").segment_ids()


@pytest.fixture
def web(cache):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(cache.path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_server_is_read_only(cache, web, tmp_path):
    copy(web, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(cache.path)
    assert len(list(open_cache(web).rows())) == 3
    fill(tmp_path / "c")
    refuses(WriteError, "read-only", copy, tmp_path / "c", web)


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer", "gone"])
def test_tampered_bytes_are_never_committed(cache, web, tmp_path, damage):
    victim = cache.path / "segments" / cache.manifests("scores")[0][0] / "arrays.zip"
    data = victim.read_bytes()
    changed = {"flip": bytes([data[0] ^ 1]) + data[1:], "shorter": data[:-1], "longer": data + b"x"}
    victim.unlink() if damage == "gone" else victim.write_bytes(changed[damage])
    refuses(CorruptError, r"/arrays\.zip: ", copy, web, tmp_path / "b")
    assert [m.kind for _, m in open_cache(tmp_path / "b").manifests()] == ["prompts", "rollouts"]
    refuses(CorruptError, r"/arrays\.zip", list, open_cache(web).rows())
    assert not verify(open_cache(web), deep=False).ok
    with pytest.raises(CorruptError):
        copy(cache.path, tmp_path / "c")


def test_a_tampered_manifest_is_refused_and_a_child_without_its_parent_does_not_travel(cache, web, tmp_path):
    path = cache.path / "manifests" / f"{cache.manifests('prompts')[0][0]}.json"
    path.write_bytes(path.read_bytes().replace(b'"rows":3', b'"rows":2'))
    refuses(CorruptError, "not those of its id", copy, web, tmp_path / "c")
    path.unlink()
    refuses(CacheError, "needs prompts", copy, cache.path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_damage_stops_no_other_segments_and_can_be_set_aside(cache, tmp_path, capsys):
    """A file of one family's rollouts, and the manifest of another's scores."""
    whole, good, second = contents(cache.path), tmp_path / "good", fill(cache, seed=5)
    (_, rollouts, _), first = second[:3], cache.segment_ids()
    data = cache.path / "segments" / rollouts / "arrays.zip"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    (cache.path / "manifests" / f"{first[2]}.json").write_bytes(b"{}")
    with pytest.raises(CorruptError) as caught:
        copy(cache.path, good)
    assert [any(id_ in line for line in str(caught.value).splitlines()) for id_ in (rollouts, first[2])] == [True] * 2
    kept = {*first[:2], second[0]}
    assert set(open_cache(good).segment_ids()) == kept
    assert main(["verify", str(cache.path), "--set-aside"]) == 2
    assert capsys.readouterr().out.count("set aside") == len(first) - 3
    assert set(open_cache(cache.path).segment_ids()) == kept
    assert main(["verify", str(cache.path), "--deep"]) == 0
    assert whole.keys() - contents(cache.path).keys() == {f"{k}/{first[2]}{end}" for k, end in ASIDE}
    assert (cache.path / "aside" / "segments" / rollouts / "arrays.zip").exists()


@pytest.mark.parametrize("to", ["folder", "memory"])
def test_rules_are_checked_on_arrival_and_one_bad_segment_stops_no_other(cache, web, tmp_path, to):
    """Scores whose hashes are all right and whose numbers are not. Their children and others take no part either."""
    honest = fill(cache, seed=5)
    forged = forge(cache, cache.manifests("scores")[0][0], altered("q", 0, 1e6))
    target = tmp_path / "b" if to == "folder" else f"memory://{uuid.uuid4().hex}/cache"
    line = refuses(CorruptError, r"q\[0\] is larger than max_q", copy, web, target)
    assert forged in line
    taken = open_cache(target).segment_ids()
    assert set(taken) == {*cache.segment_ids()} - {forged} >= {*honest}
    if to == "folder":
        assert verify(open_cache(target)).ok
        assert open_cache(target / "aside").segment_ids() == [forged]
        refuses(CorruptError, "what came is in", copy, web, target)  # and once more
    # in place, through the segment cache, it takes no part either
    refuses(CorruptError, r"q\[0\] is larger than max_q", list, open_cache(web).rows())


class Pages(http.server.SimpleHTTPRequestHandler):
    """A bucket, and a web server, whose listing is a page of something else, with status 200."""

    page = b""

    def log_message(self, *_):
        """Not beside what the command says."""

    def do_GET(self):
        if "list-type" not in self.path and not self.path.endswith("manifests/"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.page)))
        self.end_headers()
        self.wfile.write(self.page)
        return None


@pytest.mark.parametrize("kind", ["s3", "web"])
@pytest.mark.parametrize(
    "page",
    [b"<html>Please log in</html>", b"<html><title>Wiki</title>Index of pages</html>", b"", b"{}", b"<br>"],
)
def test_a_page_in_the_place_of_a_listing_is_no_empty_cache(cache, tmp_path, monkeypatch, capsys, kind, page):
    shutil.copytree(cache.path, tmp_path / "bucket" / "c")
    monkeypatch.setattr(Pages, "page", page)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Pages, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"AWS_ENDPOINT_URL": there, **KEYS}.items():
        monkeypatch.setenv(name, value)
    address = "s3://bucket/c" if kind == "s3" else f"{there}/bucket/c"
    student = task("translate") / "student"
    try:
        for words in (
            ("pull", address, tmp_path / "b"), ("info", address), ("verify", address),
            ("learn", "--student", student, "--cache", address, "--out", tmp_path / "run"),
        ):  # fmt: skip
            assert address in fails(capsys, *words)
    finally:
        server.shutdown()
        server.server_close()
    assert not (tmp_path / "b").exists()


ASIDE = ("manifests", ".json"), ("segments", "/arrays.zip")


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_eight_writers_of_the_same_keys(tmp_path, url):
    """Every object has one creator, and all eight pushes succeed."""
    count = same_keys(tmp_path, url, 8, 8)
    assert (count.two_creators, count.lost, count.early) == (0, 0, 0)
    assert count.objects == 1 + 8 * 2  # the marker; of each segment the archive and the manifest


def test_damaged_data_in_the_store_is_not_published(cache, tmp_path):
    remote = ObjectStore(f"memory://{uuid.uuid4().hex}/cache")
    prompts = cache.manifests("prompts")[0][0]
    remote._create(f"segments/{prompts}/arrays.zip", b"{}")
    refuses(WriteError, "with other bytes", copy, cache.path, remote.address)
    assert remote.segment_ids() == []


def test_info_of_two_says_what_each_lacks(cache, tmp_path):
    copy(cache.path, tmp_path / "b")
    new = add_prompts(open_cache(tmp_path / "b"), seed=5)
    report = compare(cache, open_cache(tmp_path / "b"))
    assert report.both == 3
    assert [[e["id"] for e in entries] for entries in report.only.values()] == [[], [new]]
    assert "3 rows of prompts: made-up" in str(report)
    assert main(["info", str(cache.path), str(tmp_path / "b")]) == 0


def test_only_some_segments_travel_with_their_parents(cache, tmp_path):
    fill(cache)
    scores = cache.manifests("scores")[0][0]
    assert copy(cache.path, tmp_path / "b", only=[scores]).segments == {"prompts": 1, "rollouts": 1, "scores": 1}
    assert verify(open_cache(tmp_path / "b")).ok
    assert copy(cache.path, tmp_path / "b", only=[scores]).already == 1


def test_clean_takes_old_leftovers_only(cache):
    before = contents(cache.path)
    orphan, stage = cache.path / "segments" / ("0" * 64), cache.path / "tmp" / "dead"
    for folder in (orphan, stage):
        folder.mkdir()
        (folder / "x").write_bytes(b"123")
    assert clean(cache) == ((), 2)
    planned = clean(cache, hours=0, dry_run=True)
    assert orphan.exists()
    assert clean(cache, hours=0) == planned == ((f"segments/{'0' * 64}", "tmp/dead"), 0)
    assert contents(cache.path) == before
    assert not list((cache.path / "tmp").iterdir())
    assert main(["verify", str(cache.path), "--clean"]) == 0


@pytest.fixture
def remote(cache):
    """The address of a copy in memory."""
    url = f"memory://{uuid.uuid4().hex}/cache"
    copy(cache.path, url)
    return url


def mirrored(url, folder, limit=10**9):
    return Cache(remote_cache.MirroredStore(open_store(url), folder, limit))


def test_the_segment_cache_keeps_the_most_recently_used(cache, remote, tmp_path):
    ids = {kind: cache.manifests(kind)[0][0] for kind in ("prompts", "rollouts", "scores")}
    size = {id_: sum(f.length for f in cache.manifest(id_).files.values()) for id_ in ids.values()}
    home = tmp_path / "home"
    there = mirrored(remote, home, size[ids["prompts"]] + size[ids["scores"]])
    there.load_prompts(ids["prompts"])
    there.load_rollouts(ids["rollouts"])
    os.utime(home / "segments" / ids["rollouts"], (1, 1))
    there.load_scores(ids["scores"])
    held = {p.name for p in (home / "segments").iterdir()}
    assert ids["scores"] in held
    assert ids["rollouts"] not in held


def test_a_segment_cache_that_can_not_be_written_is_no_obstacle(remote, tmp_path, capsys):
    (tmp_path / "home").write_bytes(b"a file where the folder should be")
    there = mirrored(remote, tmp_path / "home")
    assert len(list(there.rows())) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: segments are not kept here" in line


def test_leftovers_of_killed_processes_leave_the_segment_cache(cache, tmp_path):
    home = tmp_path / "home"
    old, young = (home / "tmp" / name for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    list(mirrored(cache.path, home).rows())
    assert (old.exists(), young.exists()) == (False, True)


SECRETS = "s3://user:SECRET@bucket/c https://u:SECRET@h/c https://h/c?token=SECRET s3://k:SE/SECRET@b/c"


@pytest.mark.parametrize("address", [*SECRETS.split(), "hf://u:SECRET@datasets/a/b"])
def test_credentials_in_an_address_are_refused_and_never_repeated(address, tmp_path, capsys, cache):
    for command in (["pull", address, tmp_path / "b"], ["push", cache.path, address], ["info", address]):
        line = fails(capsys, *command)
        assert "SECRET" not in line
        assert "must hold no user" in line
    assert stores.scrub("GET https://u:SECRET@h/x?sig=SECRET failed") == "GET https://h/x failed"


def test_a_place_without_a_cache_is_one_clear_line(tmp_path, capsys):
    for address in (f"memory://{uuid.uuid4().hex}/c", str(tmp_path / "none"), "ftp://h/c", "hf://models/a/b"):
        fails(capsys, "pull", address, tmp_path / "b")
    with pytest.raises(KetchupError):
        open_cache("memory://nothing/here")


def test_pins_show_the_pinned_segments_alone(cache):
    used = [id_ for id_, _ in cache.manifests()]
    fill(cache)
    again = open_cache(cache.path)
    again.pin(used)
    assert [id_ for id_, _ in again.manifests()] == used
    assert {ref.scores_id for ref in again.scored()} <= set(used)
    refuses(MismatchError, "pinned", add_prompts, again)


def test_a_damaged_copy_in_the_segment_cache_is_fetched_again(cache, remote, tmp_path):
    scores = cache.manifests("scores")[0][0]
    mirrored(remote, tmp_path / "home").load_scores(scores)
    victim = tmp_path / "home" / "segments" / scores / "arrays.zip"
    victim.write_bytes(b"damaged")
    read = mirrored(remote, tmp_path / "home").load_scores(scores)
    np.testing.assert_array_equal(read.q, cache.load_scores(scores).q)
    assert victim.read_bytes() == (cache.path / "segments" / scores / "arrays.zip").read_bytes()


def test_a_file_that_came_short_is_asked_for_once_more(cache):
    store = open_store(cache.path)
    whole, asked = store.file, []

    def short_at_first(segment, name, length):
        asked.append(name)
        return whole(segment, name, length)[: length // 2 if asked.count(name) == 1 else length]

    store.file = short_at_first
    id_ = cache.segment_ids()[0]
    packed = read_segment(store, id_, *read_manifest(store, id_))
    assert dict(packed.files) == {name: whole(id_, name, 10**6) for name in packed.files}
    assert len(asked) == 2 * len(packed.files)


@pytest.mark.parametrize("page", [b"<html>Please log in</html>", b"not found"])
def test_a_listing_that_is_none_is_an_error_and_no_empty_cache(cache, web, tmp_path, page):
    """A login page with status 200 must not make `pull` end well."""
    (cache.path / "manifests" / "index.html").write_bytes(page)
    refuses(CacheError, "is not listed", copy, web, tmp_path / "b")
    assert not (tmp_path / "b").exists()


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


class Trap(http.server.SimpleHTTPRequestHandler):
    """A server that leads elsewhere, or sends a byte now and then."""

    to = ""

    def log_message(self, *_):
        """Not beside what the command says."""

    def do_GET(self):
        if self.to:
            self.send_response(302)
            self.send_header("Location", self.to + self.path)
            return self.end_headers()
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.01)


def test_redirects_stay_on_the_host_and_a_slow_server_has_a_deadline(web, tmp_path, monkeypatch, capsys):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/c"
    monkeypatch.setattr(stores, "REQUEST_S", 0.1)
    try:
        for to, message in ((web, "leads to another host"), ("file://", "not allowed"), ("", "took more than")):
            monkeypatch.setattr(Trap, "to", to)
            assert message in fails(capsys, "pull", url, tmp_path / "b")
        monkeypatch.setattr(stores, "DEADLINE_S", 0)  # no second try
        began = time.monotonic()
        fails(capsys, "info", url)
        assert time.monotonic() - began < 10
    finally:
        server.shutdown()
        server.server_close()
