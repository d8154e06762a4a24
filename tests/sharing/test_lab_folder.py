"""A lab's folder, as docs/sharing.md says to make it: a second member of the group reads and appends."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.training.pretrain import pretrain
from tests.helpers.caches import make_cache
from tests.helpers.segments import add_prompts, exit_code, in_child, load_all

GROUP, MEMBER = 54_321, 54_322


@pytest.fixture
def lab():
    """Setgid, of a group of its own where we may make it so. Not below pytest's folders, which others can't enter."""
    folder = Path(tempfile.mkdtemp())
    if os.getuid() == 0:
        os.chown(folder, -1, GROUP)
    folder.chmod(0o2770)
    before = os.umask(0o002)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def test_a_second_member_reads_and_appends_caches_and_models(lab, folders):
    make_cache(lab / "cache", *folders)
    given = {"model": str(folders[0]), "cache": lab / "cache", "out": lab / "run", "device": "cpu"}
    pretrain(PretrainConfig(**given, epochs=1))
    kept, group = open_cache(lab / "cache").segment_ids(), lab.stat().st_gid
    for path in lab.rglob("*"):
        wanted = 0o2070 if path.is_dir() else 0o060
        assert path.stat().st_mode & wanted == wanted, path
        assert path.stat().st_gid == group, path

    def member() -> None:
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(MEMBER)
        load_all(lab / "cache")
        add_prompts(open_cache(lab / "cache"), seed=5)
        for path in (lab / "run").rglob("*"):
            assert path.is_dir() or path.read_bytes() is not None
        (lab / "run" / "metrics.jsonl").open("a").close()

    if os.getuid() == 0:
        assert exit_code(in_child(member)) == 0
        assert len(open_cache(lab / "cache").segment_ids()) == len(kept) + 1
        assert verify(open_cache(lab / "cache")).ok
