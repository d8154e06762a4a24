"""Caches and models on the Hub, against a stand-in for HfApi that keeps a repository in memory."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.sharing import stores, transfer
from ketchup_cache.training.learn import learn
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails, refuses
from tests.helpers.learning import config, run
from tests.helpers.segments import fill

URL = "hf://datasets/lab/xsum"


class FakeApi:
    """The five calls that are used, with the argument names of the real ones."""

    def __init__(self):
        self.files, self.commits, self.private, self.offline, self.conflicts = {}, [], None, False, 0

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert (repo_id, exist_ok) == ("lab/xsum", True)
        self.private, self.kind = private, repo_type

    def upload_folder(self, *, repo_id, folder_path, commit_message, repo_type, allow_patterns):
        if self.offline:
            raise self.offline
        assert (repo_id, repo_type) == ("lab/xsum", self.kind)
        there = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        chosen = filter_repo_objects(there, allow_patterns=allow_patterns)
        self.files |= {name: (folder_path / name).read_bytes() for name in chosen}

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
    for name in ("create_repo", "list_repo_tree", "create_commit", "hf_hub_download", "upload_folder"):
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


def test_a_trained_model_goes_to_a_model_repository_with_its_card_and_nothing_private(
    api, tmp_path, folders, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr(stores, "FIRST_PAUSE_S", 0.001)
    make_cache(tmp_path / "cache", *folders)
    learn(config(tmp_path, folders))
    best, model = tmp_path / "run" / "best", "hf://lab/xsum"
    private = [".lock", ".env.json", "optimizer.safetensors", "checkpoints/model.safetensors", "notes.pdf", "a.partial"]
    for name in private:
        (best / name).parent.mkdir(exist_ok=True)
        (best / name).write_bytes(b"private")
    run("push", best, model, "--dry-run")
    assert api.files == {}
    run("push", best, model)
    assert (api.private, api.kind) == (True, "model")
    assert api.files.keys() >= {"README.md", "ketchup-cache-origin.json", "model.safetensors", "tokenizer.json"}
    assert not {name.rpartition("/")[2] for name in api.files} & set(private)
    assert b"private" not in api.files.values()
    there = tmp_path / "there"
    there.mkdir()
    for name, content in api.files.items():
        (there / name).write_bytes(content)
    assert AutoModelForSeq2SeqLM.from_pretrained(there).config.model_type == "t5"
    assert AutoTokenizer.from_pretrained(there)("the cat")["input_ids"] == [3, 5, 1]
    assert weights_fingerprint(there) == weights_fingerprint(best)

    assert f"its model is {best}" in fails(capsys, "push", tmp_path / "run", model)
    assert "hf://datasets/lab/xsum" in fails(capsys, "push", tmp_path / "cache", model)
    assert "hf://owner/name" in fails(capsys, "push", best, f"{model}@v1")
    assert "README.md" in fails(capsys, "push", best, model, "--license", "mit")
    api.offline = OfflineModeIsEnabled("no network at https://hub/x?token=SECRET")
    assert "SECRET" not in (told := fails(capsys, "push", best, model))
    assert "can't be reached" in told
    api.offline = RuntimeError("403")
    api.offline.response = SimpleNamespace(status_code=403)
    assert "check your credentials" in fails(capsys, "push", best, model)
