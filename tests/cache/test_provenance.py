"""Who made a segment, where they say so, and whose text a student was pre-distilled on."""

import json
import shutil

import pytest

from ketchup_cache.cli import main
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails


@pytest.fixture(scope="module")
def predistilled(tmp_path_factory, folders):
    """Student, teacher, the student trained on the teacher's outputs, and scored rollouts of that one."""
    base, (student, teacher) = tmp_path_factory.mktemp("predistilled"), folders
    make_cache(base / "sft", teacher, teacher)
    options = ["--model", str(student), "--cache", str(base / "sft"), "--out", str(base / "pre")]
    assert main(["pretrain", *options, "--epochs", "1", "--batch-size", "4", "--device", "cpu"]) == 0
    model = base / "pre" / "best"
    make_cache(base / "cache", model, teacher)
    return student, teacher, model, base / "cache"


def learned(capsys, student, cache, out):
    """What `learn` warned of."""
    capsys.readouterr()
    words = ["learn", "--student", str(student), "--cache", str(cache), "--out", str(out), "--device", "cpu"]
    words += ["--unfinished", "bootstrap"]  # of the made-up rollouts many are cut, and `learn` would warn of that
    assert main([*words, "--steps", "1", "--batch-size", "4", "--k", "1"]) == 0
    return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]


def test_another_teacher_than_the_one_of_pre_distillation_is_warned_of(predistilled, tmp_path, capsys):
    student, teacher, model, cache = predistilled
    # the cache calls its teacher "teacher", which is neither the name nor a folder of what wrote the outputs
    (line,) = learned(capsys, model, cache, tmp_path / "run")
    assert f"pre-distilled on the outputs of {teacher} (" in line
    assert "but teacher scored" in line
    assert learned(capsys, student, cache, tmp_path / "plain") == []
    # what is learned from a pre-distilled student is still pre-distilled on that text
    assert len(learned(capsys, tmp_path / "run" / "student", cache, tmp_path / "next")) == 1


def test_the_same_teacher_is_known_by_name_or_by_weights(predistilled, tmp_path, capsys, monkeypatch):
    _, teacher, model, cache = predistilled
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, tmp_path / "teacher")  # the name in the cache, from here
    assert learned(capsys, model, cache, tmp_path / "by-weights") == []
    shutil.rmtree(tmp_path / "teacher")
    copied = shutil.copytree(model, tmp_path / "renamed")
    origin = copied / "ketchup-cache-origin.json"
    origin.write_text(origin.read_text().replace(json.dumps(str(teacher)), '"teacher"'))
    assert learned(capsys, copied, cache, tmp_path / "by-name") == []
    origin.write_bytes(b"\xff damaged")
    assert "origin.json: can't be used" in fails(
        capsys, "learn", "--student", copied, "--cache", cache, "--out", tmp_path / "u"
    )
