"""rollout, score, learn, analyze and info on a cache at an address: the same numbers as on a folder."""

import json
import shutil

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cli import main
from ketchup_cache.sharing.stores import open_store
from tests.helpers.errors import fails
from tests.helpers.models import write_prompts
from tests.helpers.segments import fill


def run(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("url", ["memory", "s3"], indirect=True)
def test_a_whole_run_at_an_address(folders, url, tmp_path, capsys):
    (student, teacher), data = folders, write_prompts(tmp_path / "d.jsonl", 8)
    options = ["--batch-size", 4, "--lr", 1e-3, "--unfinished", "bootstrap", "--out"]

    def all_of_it(cache, out):
        sampled = ["--student", student, "--cache", cache, "--max-new-tokens", 6, "--device", "cpu"]
        run(capsys, "rollout", *sampled, "--data", data, "--first", 4, "--samples", 2)
        scored = run(capsys, "score", "--teacher", teacher, "--cache", cache, "--device", "cpu")
        offline = run(capsys, "learn", *sampled, *options, out / "offline")
        refreshed = ["--teacher", teacher, "--samples", 2, "--refresh-every", 2, "--steps", 4]
        onpolicy = run(capsys, "learn", *sampled, *refreshed, *options, out / "onpolicy")
        found = run(capsys, "analyze", "--cache", cache, "--unfinished", "bootstrap", "--policy", student)
        info = run(capsys, "info", cache)
        kept = [scored[k] for k in ("already", "computed", "tokens", "copied")]
        kept += [info[k] for k in ("segments", "finished", "completion_tokens")]
        return [offline["fingerprint"], onpolicy["fingerprint"], found["policies"], info["rollouts"], *kept]

    there, here = all_of_it(url, tmp_path / "there"), all_of_it(tmp_path / "here", tmp_path / "here-out")
    assert here == there
    # everything is at the address, nothing only in the segment cache; a run repeats from there, pinned
    shutil.rmtree(tmp_path / "home")
    pin = tmp_path / "there" / "offline" / "pins.json"
    assert set(json.loads(pin.read_text())["segments"]) < set(open_store(url).segment_ids())
    again = ["--student", student, "--cache", url, "--max-new-tokens", 6, "--device", "cpu", *options]
    assert run(capsys, "learn", *again, tmp_path / "again", "--pin", pin)["fingerprint"] == there[0]
    assert len(list(open_cache(url).rows())) == here[3]
    assert run(capsys, "verify", url, "--deep")["ok"]
    assert run(capsys, "score", "--teacher", teacher, "--cache", url, "--device", "cpu") is not None


def test_a_profile_of_aws_is_read_by_boto3(tmp_path, monkeypatch, bucket, capsys):
    """As `aws configure` writes it. Without it, one line."""
    fill(tmp_path / "c")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    words = ["push", str(tmp_path / "c"), f"s3://{bucket}/cache"]
    assert "profile 'lab' can't be used" in fails(capsys, *words)
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = key\naws_secret_access_key = SECRET\n")
    assert main(words) == 0
    assert len(open_store(words[2]).segment_ids()) == 3


def test_a_bucket_that_is_not_there_is_one_line(tmp_path, bucket, capsys):
    fill(tmp_path / "c")
    url = f"s3://not-{bucket}/cache"
    assert "no such bucket" in fails(capsys, "push", tmp_path / "c", url)
    assert "no cache here" in fails(capsys, "pull", url, tmp_path / "b")
