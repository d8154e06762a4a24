"""Damaged and hostile caches: a typed error that names the file, quickly, and never wrong numbers or foreign code."""

import getpass
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache import zarr_files
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import clean, set_aside, verify
from ketchup_cache.cli import main
from ketchup_cache.errors import CacheError, CorruptError, KetchupError, MismatchError
from tests.helpers import hostile, segments
from tests.helpers.errors import refuses
from tests.helpers.hostile import HOSTILE, altered, both, forge, refused, removed, said
from tests.helpers.segments import add_prompts, fill, load_all, make_scores, scores_info

ARCHIVE = zarr_files.ARCHIVE


# ------------------------------------------------------------------------------------------------------- damage


def test_one_flipped_bit_anywhere_is_refused(cache: Cache) -> None:
    segment_id = add_prompts(cache, (2, 3))
    archive = cache.path / "segments" / segment_id / ARCHIVE
    for path in (cache.path / "manifests" / f"{segment_id}.json", archive):
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            caught = refuses(CorruptError, ".", open_cache(cache.path).load_prompts, segment_id)
            assert str(path) in caught
        path.write_bytes(whole)
    open_cache(cache.path).load_prompts(segment_id)


@pytest.mark.parametrize("version", [1, 2])
def test_deleted_cut_lengthened_swapped_and_linked_files(cache: Cache, tmp_path: Path, version: int) -> None:
    _, _, scores = fill(cache)
    folder = cache.path / "segments" / (scores if version == 2 else forge(cache, scores, lambda m, f: None, version=1))
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert len(paths) == (1 if version == 2 else 11)
    for path in paths:
        whole = path.read_bytes()
        for change in (
            path.unlink,
            lambda path=path, whole=whole: path.write_bytes(whole[:-1]),
            lambda path=path, whole=whole: path.write_bytes(whole + b"\0"),
            lambda path=path: path.write_bytes(b""),
        ):
            change()
            assert str(path) in refused(cache.path)
            path.write_bytes(whole)
        outside = tmp_path / "outside"
        outside.write_bytes(whole)
        path.unlink()
        path.symlink_to(outside)
        assert "symbolic link" in refused(cache.path)
        path.unlink()
        os.mkfifo(path)  # reading it would wait for ever
        assert "not a regular file" in refused(cache.path)
        path.unlink()
        path.write_bytes(whole)
    if version == 1:
        q, max_q = folder / "q/c/0", folder / "max_q/c/0"
        first, second = q.read_bytes(), max_q.read_bytes()
        q.write_bytes(second)
        max_q.write_bytes(first)
        assert "q/c/0: its bytes are not those its manifest promises" in refused(cache.path)
        q.write_bytes(first)
        max_q.write_bytes(second)
    load_all(cache.path)


@pytest.mark.parametrize("name", ["manifests", "segments", "tmp", "a segment"])
def test_folders_that_are_links_lead_nowhere(cache: Cache, tmp_path: Path, name: str) -> None:
    """Neither reading, nor writing, nor cleaning follows one to somebody else's files."""
    fill(cache)
    folder = cache.path / (f"segments/{cache.segment_ids()[0]}" if name == "a segment" else name)
    outside = tmp_path / "outside"
    if folder.exists():
        shutil.move(folder, outside)
    outside.mkdir(exist_ok=True)
    (outside / "thesis.tex").write_text("words")
    folder.symlink_to(outside)
    if name != "tmp":
        refuses(CorruptError, "is a symbolic link", load_all, cache.path)
    if name != "a segment":
        refuses(CorruptError, "is a symbolic link", add_prompts, open_cache(cache.path), seed=3)
        refuses(CorruptError, "is a symbolic link", clean, open_cache(cache.path), hours=0)
    assert (outside / "thesis.tex").read_text() == "words"


def test_files_that_no_manifest_names_change_nothing(cache: Cache) -> None:
    ids = fill(cache)
    before = cache.load_scored(cache.scored()[0])
    folder = cache.path / "segments" / ids[2]
    (folder / "evil").mkdir()
    (folder / "evil/zarr.json").write_text("{")
    (folder / ".zmetadata").write_text("{")
    (cache.path / "manifests" / "notes.txt").write_text("hello")
    (cache.path / "segments" / ("0" * 64)).mkdir()
    again = open_cache(cache.path)
    assert segments.same(again.load_scored(again.scored()[0]), before)
    report = verify(again)
    assert (report.ok, report.leftovers) == (True, (f"segments/{'0' * 64}",))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_lost_manifest_is_reported_and_its_data_stays(cache: Cache, kind: int) -> None:
    """Also that of scores, which no child names: it comes back with a copy of its manifest."""
    segment_id = fill(cache)[kind]
    manifest = cache.path / "manifests" / f"{segment_id}.json"
    lost = manifest.read_bytes()
    manifest.unlink()
    (problem, *_) = (p for p in verify(open_cache(cache.path), deep=False).problems if "its manifest is lost" in p)
    assert str(cache.path / "segments" / segment_id) in problem
    assert clean(open_cache(cache.path), hours=0) == ((), 0)
    manifest.write_bytes(lost)
    load_all(cache.path)
    manifest.unlink()
    set_aside(cache, verify(open_cache(cache.path)).damaged)
    assert verify(open_cache(cache.path)).ok
    assert (cache.path / "aside" / "segments" / segment_id / ARCHIVE).exists()


def test_a_commit_that_was_cut_short_is_no_lost_manifest(cache: Cache, monkeypatch) -> None:
    def dying() -> None:
        real = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: os._exit(0) if "manifests" in str(b) else real(a, b))
        fill(cache)

    assert segments.exit_code(segments.in_child(dying)) == 0
    report = verify(open_cache(cache.path))
    assert report.ok
    assert sorted(left.partition("/")[0] for left in report.leftovers) == ["segments", "tmp"]
    assert len(clean(open_cache(cache.path), hours=0)[0]) == 2


def test_verify_lists_every_problem(cache: Cache) -> None:
    paths = [cache.path / "segments" / segment_id / ARCHIVE for segment_id in fill(cache)]
    for path in paths:
        path.write_bytes(b"?")
    for deep in (False, True):
        report = verify(cache, deep=deep)
        assert {problem.split(": ")[0] for problem in report.problems} == set(map(str, paths))
        assert report.bytes == 0
    assert "3 problems" in str(report)


# ----------------------------------------------------------------------------------- hostile: all hashes are right


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompts(cache: Cache, name: str, version: int, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    change, match = HOSTILE[name]
    segment_id = add_prompts(cache)
    forged = forge(cache, segment_id, change, version=version)
    message = refused(cache.path, match=match)
    assert forged in message
    assert "SECRET" not in message
    assert not (tmp_path / "unpickled").exists()

    def grows_little() -> None:
        with pytest.raises(KetchupError):
            load_all(cache.path)
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        most, now = (int(lines[key].split()[0]) for key in ("VmHWM", "VmRSS"))
        assert most - now < 256 * 1024  # kB

    if Path("/proc/self/status").exists():
        assert segments.exit_code(segments.in_child(grows_little)) == 0


def test_the_forger_forges_valid_segments(cache: Cache) -> None:
    """Else every test above would pass for the wrong reason."""
    segment_id = add_prompts(cache)
    forged = forge(cache, segment_id, hostile.replaced("tokens", np.arange(8, dtype=np.uint16)))
    assert forged != segment_id
    assert open_cache(cache.path).load_prompts(forged).tokens.values.tolist() == list(range(8))
    # and so does the chunk with a checksum made here
    again = forge(cache, forged, hostile.holding(hostile.chunk(hostile.frame(16))))
    assert open_cache(cache.path).load_prompts(again).tokens.values.tolist() == [0] * 8
    assert open_cache(cache.path).load_prompts(forge(cache, again, lambda m, f: None, version=1)).tokens.values[0] == 0


NAN, INF = np.nan, np.inf
TOKEN = int(segments.make_rollouts().completions.values[3])
HOSTILE_SCORES = {  # storage: array, place, value there, what is said
    "plain": [
        ("q", 3, NAN, "q[3] is nan"), ("q", 3, 1000, "q[3] is larger than max_q"), ("max_q", 3, INF, "max_q[3] is inf"),
        ("max_q", 3, -1000, "q[3] is larger than max_q"), ("logsumexp", 3, NAN, "logsumexp[3] is nan"),
        ("logsumexp", 3, -1000, "logsumexp[3] is smaller than max_q"),
        ("logsumexp", 3, 1000, "logsumexp[3] is larger than max_q + log"),
        ("mean_q", 3, 1000, "mean_q[3] is larger than max_q"), ("final_max_q", 2, -INF, "final_max_q[2] is -inf"),
    ],
    "top": [
        ("top_q", (3, 1), NAN, "top_q[3] is nan"), ("top_q", (3, 3), -INF, "top_q[3] is -inf"),
        ("rest_logsumexp", 3, NAN, "rest_logsumexp[3] is nan"), ("rest_logsumexp", 3, -INF, "[3] is -inf"),
        ("top_ids", (3, 1), segments.VOCAB, "top_ids[3] holds an id that words does not have"),
        ("top_ids", (3, 1), 65535, "top_ids[3] holds an id that words does not have"),
        ("top_ids", (3, 2), lambda ids: ids[3, 0], "top_ids[3] holds a token twice"),
        ("top_ids", (3, 3), TOKEN, "top_q[3] is not q where top_ids is the token"),
        ("top_q", 3, lambda top: top[3, [0, 2, 1, 3]], "top_q[3] does not fall"),
        ("top_q", (3, 0), 1000, "top_q[3] does not begin with max_q"),
        ("top_q", (3, 3), -30, "rest_logsumexp[3] is more than so many smaller logits can have"),
        ("rest_logsumexp", 3, 1000, "rest_logsumexp[3] is more than so many"),
        ("logsumexp", 3, 0, "logsumexp[3] is smaller than max_q"),
        # each array is possible for itself; together they are not those of one distribution
        ("logsumexp", 3, lambda before: before[3] + 0.5, "top_q[3] and rest_logsumexp do not add up to logsumexp"),
    ],
    "float16": [
        ("gap", 2, -1, "q[2] is larger than max_q"), ("gap", 2, INF, "max_q[2] is inf"), ("q", 2, NAN, "q[2] is nan"),
        ("logsumexp_gap", 2, -1, "logsumexp[2] is smaller than max_q"),
        ("logsumexp_gap", 2, np.log(segments.VOCAB) + 0.2, "logsumexp[2] is larger than max_q + log"),
        ("mean_gap", 2, -1, "mean_q[2] is larger than max_q"),
    ],
}  # fmt: skip
STORED = {"plain": {}, "top": {"top": 4}, "float16": {"storage": "compact"}}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in HOSTILE_SCORES.items() for case in cases])
def test_hostile_scores(cache: Cache, kind: str, case: tuple) -> None:
    *_, segment_id = fill(cache, forced=False, **STORED[kind])
    assert kind != "top" or TOKEN not in cache.load_scores(segment_id).top.ids[3]
    *change, message = case
    forge(cache, segment_id, altered(*change))
    assert message in refused(cache.path)


def test_scores_that_do_not_fit_their_rollouts(cache: Cache) -> None:
    _, rollouts_id, segment_id = fill(cache)
    scores, rollouts = cache.load_scores(segment_id), cache.load_rollouts(rollouts_id)
    row = int(np.flatnonzero(rollouts.finished)[0])
    final = np.array(scores.final_max_q)
    final[row] = 1
    forged = forge(cache, segment_id, hostile.replaced("final_max_q", final))
    refused(cache.path, match=rf"final_max_q\[{row}\] is not 0")

    def shorter(manifest, files):
        manifest["tokens"] -= 1
        for name in ("q", "max_q", "logsumexp", "mean_q"):
            files.update(hostile.stored(getattr(scores, name)[:-1], name))
            manifest["arrays"][name]["shape"][0] -= 1

    forge(cache, forged, shorter)
    refused(cache.path, match="scores of 13 tokens for rollouts that have 14")


def test_bytes_that_are_no_booleans(cache: Cache) -> None:
    """NumPy would count a True of 2 as two."""
    _, rollouts_id, scores = fill(cache)
    (cache.path / "manifests" / f"{scores}.json").unlink()
    odd = np.array([2, 0, 1], np.uint8)
    forge(cache, rollouts_id, hostile.holding(hostile.stored(odd, "finished")["finished/c/0"], "finished/c/0"))
    refused(cache.path, match="finished: holds bytes that are neither true nor false")


def test_parents_must_be_there_and_fit(cache: Cache) -> None:
    prompts, rollouts_id, scores_id = fill(cache)
    other = {"name": "other", "fingerprint": segments.fingerprint("other"), "vocab_size": 60}
    forged = forge(cache, scores_id, said("info", tokenizer=other), keep=True)
    assert "share a tokenizer" in refused(cache.path, MismatchError, "other and words encode differently")
    removed(cache.path, forged)

    forged = forge(cache, scores_id, said("info", row_start=1, row_stop=4))
    refused(cache.path, CacheError, "covers rows 1 to 4 of .*, which has 3")
    forged = forge(cache, forged, said("info", rollouts=prompts, row_start=0, row_stop=3))
    refused(cache.path, CacheError, "is a segment of prompts")
    forged = forge(cache, forged, said("info", rollouts=rollouts_id))
    load_all(cache.path)

    (cache.path / "manifests" / f"{rollouts_id}.json").unlink()
    message = refused(cache.path, CacheError, "which is not in this cache")
    assert forged[:12] in message
    assert rollouts_id[:12] in message
    refuses(CacheError, f"{forged[:12]} needs rollouts {rollouts_id[:12]}", open_cache(cache.path).scored)


# ----------------------------------------------------------------------------- markers, versions, other folders


def test_manifest_of_another_version_says_so(cache: Cache) -> None:
    fill(cache)
    segment_id = cache.manifests("scores")[0][0]
    forge(cache, segment_id, said(version=3, news={}))
    with pytest.raises(CacheError, match=r"is of format version 3, this program reads versions up to 2; upgrade"):
        open_cache(cache.path).manifests()


@pytest.mark.parametrize(
    ("marker", "match"),
    [
        (b'{"format":"ketchup-cache","version":3}', "format version 3, .* upgrade ketchup-cache"),
        (b'{"format":"ketchup-cache","version":true}', "format version True"),
        (b'{"format":"something","version":1}', "does not say that this is a ketchup cache"),
        (b"[]", "does not say that this is a ketchup cache"), (b"", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"), (b" " * 100_000, "expected 65,536 at most"),
    ],
)  # fmt: skip
def test_markers(cache: Cache, marker: bytes, match: str) -> None:
    (cache.path / "ketchup-cache.json").write_bytes(marker)
    for create in (False, True):
        refuses(CacheError, match, open_cache, cache.path, create=create)
    assert (cache.path / "ketchup-cache.json").read_bytes() == marker


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    refuses(CacheError, r"no cache here; `ketchup-cache rollout --cache .*new` makes one", open_cache, tmp_path / "new")
    (tmp_path / "file").write_text("")
    for create in (False, True):
        refuses(CacheError, "can't be read \\(Not a directory\\)", open_cache, tmp_path / "file", create=create)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("words")
    for create in (False, True):
        with pytest.raises(CacheError, match=r"is not a ketchup cache.*`ketchup-cache rollout"):
            open_cache(tmp_path / "thesis", create=create)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    (tmp_path / "empty").mkdir()
    refuses(CacheError, "is not a ketchup cache", open_cache, tmp_path / "empty")
    assert open_cache(tmp_path / "empty", create=True).manifests() == []


def test_a_segment_id_can_not_name_a_path(cache: Cache) -> None:
    fill(cache)
    for segment_id in ("../marker", "", "/etc/passwd", "0" * 64, "*"):
        refuses(CacheError, "has no segment", cache.load_prompts, segment_id)


# ----------------------------------------------------------------------------------------------------- who scored


@pytest.mark.parametrize("storage", ["lossless", "compact"])
def test_scores_of_one_teacher_that_disagree_are_told_with_who_wrote_them(cache: Cache, storage: str) -> None:
    """An honest second scorer is no dispute: rounding, float16, another teacher. A forged, earlier segment is."""
    _, rollouts_id, first = fill(cache, sizes=((3, 1, 4), (5, 2, 7), ((0, 3),)), top=4)
    rollouts, honest = cache.load_rollouts(rollouts_id), cache.load_scores(first)
    again = replace(honest, q=honest.q - np.float32(1e-5) * np.abs(honest.q))
    info = scores_info(rollouts_id, 0, 3, keep_top=4, storage=storage)
    second = cache.commit_scores(again, info)
    other = make_scores(rollouts, 0, 3, seed=7)
    cache.commit_scores(other, scores_info(rollouts_id, 0, 3, by="another teacher"))
    assert verify(cache, deep=False).ok
    part = honest.rows(rollouts.completions, 1, 3)
    forged = cache.commit_scores(replace(part, q=part.q - 1, top=None), scores_info(rollouts_id, 1, 3, storage=storage))
    early = forge(cache, forged, said(created="2020-01-01T00:00:00.000000Z"))
    for deep in (False, True):
        problems = verify(open_cache(cache.path), deep=deep).problems
        assert len(problems) == 2  # with each honest one
        for problem, theirs in zip(problems, (first, second), strict=True):
            assert (
                f"scores {early[:12]} of 2020-01-01T00:00:00.000000Z by {getpass.getuser()}, and {theirs[:12]}"
                in problem
            )
            assert f"of rows 1 to 3 of rollouts {rollouts_id[:12]}, by up to 1; use ids" in problem


@pytest.mark.parametrize(
    "evil", ["\x1b[2J\x1b]0;owned\x07", "\nketchup-cache: all right", "\x9b2J", "\u202etxt", "a\rb", "a\x85b"]
)
def test_names_print_no_control_characters_and_no_line_of_ours(cache: Cache, capsys, tmp_path: Path, evil: str) -> None:
    """In reports and in errors: names of everything a manifest names."""
    _, _, scores = fill(cache)
    manifest = json.loads((cache.path / "manifests" / f"{scores}.json").read_text())
    tokenizer = manifest["info"]["tokenizer"] | {"name": evil}
    who = {"name": evil, "fingerprint": "e" * 64, "dtype": evil}
    forge(cache, scores, both(said(tool=evil, created=evil), said("info", teacher=who, tokenizer=tokenizer)), keep=True)
    root = str(cache.path)
    for words in (
        ["info", root], ["verify", root, "--deep"], ["info", root, str(tmp_path / "none")],
        ["export", root, str(tmp_path / "o"), "--to", "parquet"], ["analyze", "--cache", root],
        ["analyze", "--cache", root, "--scored-by", evil], ["evaluate", "--model", evil, "--data", evil],
    ):  # fmt: skip
        main(words)
        shown = "".join(capsys.readouterr())
        assert "�" in shown or words[0] != "info" or len(words) > 2
        assert all(c.isprintable() or c == "\n" for c in shown), words
        assert "\nketchup-cache: all right" not in shown
