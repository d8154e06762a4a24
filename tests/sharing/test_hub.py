"""Caches on the Hub, against a stand-in for HfApi that keeps a repository in memory. The real Hub is not reached."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing import stores, transfer
from tests.helpers.errors import refuses
from tests.helpers.segments import fill

URL = "hf://datasets/lab/xsum"


class FakeApi:
    """The four calls that are used, with the argument names of the real ones."""

    def __init__(self):
        self.files, self.commits, self.private, self.offline, self.conflicts = {}, [], None, False, 0

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert (repo_id, repo_type, exist_ok) == ("lab/xsum", "dataset", True)
        self.private = private

    def list_repo_tree(self, repo_id, *, path_in_repo, repo_type, revision):
        found = [name for name in self.files if name.startswith(path_in_repo + "/")]
        if not found:
            raise EntryNotFoundError("404")
        return [SimpleNamespace(path=name) for name in found]

    def create_commit(self, repo_id, operations, *, commit_message, repo_type):
        if self.conflicts:
            self.conflicts -= 1
            raise RuntimeError("412 https://hub/x?token=SECRET: a commit has happened since")
        new = {op.path_in_repo: op.path_or_fileobj for op in operations}
        self.files |= new
        self.commits.append(sorted(new))

    def hf_hub_download(self, repo_id, filename, *, repo_type, revision, local_dir):
        if self.offline:
            raise LocalEntryNotFoundError("no connection to https://hub/x?token=SECRET")
        if filename not in self.files:
            raise EntryNotFoundError("404")
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[filename])
        return str(path)


@pytest.fixture
def api(monkeypatch):
    fake, store = FakeApi(), stores.HubStore
    monkeypatch.setattr(stores, "HubStore", lambda url, license_id=None: store(url, license_id, fake))
    return fake


def test_the_stand_in_takes_the_arguments_of_the_real_client():
    for name in ("create_repo", "list_repo_tree", "create_commit", "hf_hub_download"):
        real = inspect.signature(getattr(HfApi, name)).parameters
        assert set(inspect.signature(getattr(FakeApi, name)).parameters) <= set(real), name


def test_a_batch_is_one_commit_and_a_killed_upload_shows_nothing(api, cache, tmp_path, monkeypatch):
    transfer.copy(cache.path, URL)
    assert api.private is True
    assert api.commits[0] == ["README.md", "ketchup-cache.json"]
    for names in api.commits[1:]:
        ids = [name[10:74] for name in names if name.startswith("manifests/")]
        assert set(names) == {f"manifests/{i}.json" for i in ids} | {f"segments/{i}/arrays.zip" for i in ids}
    transfer.copy(URL, tmp_path / "b")
    assert verify(open_cache(tmp_path / "b")).segments == 3
    done = len(api.commits)
    assert transfer.copy(cache.path, URL).already == 3
    assert len(api.commits) == done
    fill(cache)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "create_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            transfer.copy(cache.path, URL)
    assert verify(open_cache(URL)).segments == 3
    with pytest.raises(WriteError, match="read-only"):
        transfer.copy(cache.path, f"{URL}@v1")  # a revision
    transfer.copy(cache.path, URL)
    assert verify(open_cache(URL)).segments == 6


def test_a_new_repository_says_what_it_holds_and_one_by_hand_stays(api, cache):
    api.files["README.md"] = b"# by hand"
    transfer.copy(cache.path, URL)
    assert api.files.pop("README.md") == b"# by hand"
    del api.files["ketchup-cache.json"]
    transfer.copy(cache.path, URL, license_id="cc-by-4.0")
    text = api.files["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1])["license"] == "cc-by-4.0"
    assert f"ketchup-cache info {URL}" in text


def test_conflicts_are_tried_again_and_errors_hide_tokens(api, cache, tmp_path):
    api.conflicts = 2
    transfer.copy(cache.path, URL)
    api.conflicts = 99
    fill(cache)
    error = refuses(WriteError, ".", transfer.copy, cache.path, URL)
    assert "SECRET" not in error
    api.offline = True
    lost = refuses(CacheError, "can't be reached", transfer.copy, URL, tmp_path / "b")
    assert "SECRET" not in lost
