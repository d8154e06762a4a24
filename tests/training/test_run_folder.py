"""A run's folder is one unit: damage is refused in one line, and what came into the cache since changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from ketchup_cache import open_cache
from ketchup_cache.config.commands import LearnConfig, PretrainConfig, RolloutConfig
from ketchup_cache.errors import CacheError, ConfigError, KetchupError, MismatchError, WriteError
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.training import checkpoints
from ketchup_cache.training.learn import learn
from ketchup_cache.training.pretrain import pretrain
from tests.helpers.caches import make_cache
from tests.helpers.learning import assert_same_weights, config, killed_before
from tests.helpers.models import save_model, write_prompts


@pytest.fixture
def killed(tmp_path, folders):
    """Options of a run that was killed before step 5, with checkpoints after 2 and 4 steps; and the whole run."""
    make_cache(tmp_path / "cache", *folders)
    options = config(tmp_path, folders, steps=7, checkpoint_every=2)
    learn(options.model_copy(update={"out": tmp_path / "whole"}))
    with killed_before(5):
        learn(options)
    return options


def flip(path: Path, place: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def test_no_flipped_bit_is_trained_on(killed, tmp_path):
    """Anywhere in the newest checkpoint, in the options, and in the metrics of the steps done."""
    rng, newest = np.random.default_rng(0), "checkpoints/step-00000004"
    names = ["config.json", "metrics.jsonl", *(f"{newest}/{name}" for name in (*checkpoints.TENSORS, "state.json"))]
    sizes = {name: (killed.out / name).stat().st_size for name in names}
    lines = (killed.out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    done = sum(map(len, lines[:4])) / sizes["metrics.jsonl"]
    for number in range(60):
        name = names[number % len(names)]
        damaged = tmp_path / "damaged"
        shutil.copytree(killed.out, damaged)
        flip(damaged / name, rng.random() * (done if name == "metrics.jsonl" else 1), int(rng.integers(8)))
        with pytest.raises(KetchupError) as caught:
            learn(killed.model_copy(update={"out": damaged}))
        assert "\n" not in str(caught.value), (name, str(caught.value))
        shutil.rmtree(damaged)


def test_the_checkpoint_before_a_damaged_one_is_the_way_back(killed, tmp_path):
    newest = killed.out / "checkpoints" / "step-00000004"
    flip(newest / "model.safetensors", 0.7, 3)
    with pytest.raises(
        WriteError, match=r"damaged checkpoint \(model.safetensors is not .*\); delete it to go on from step-"
    ):
        learn(killed)
    shutil.rmtree(newest)
    assert learn(killed).resumed_from == 2
    assert_same_weights(tmp_path / "whole", killed.out)


def test_a_lost_file_does_not_turn_the_checks_off(killed, tmp_path):
    (killed.out / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(WriteError, match=r"metrics\.jsonl: is not as it was written up to step 4"):
        learn(killed)
    with pytest.raises(ConfigError, match=r"--lr 0\.001, not 0\.5"):
        learn(killed.model_copy(update={"lr": 0.5}))
    (killed.out / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a run without its config\.json"):
        learn(killed)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_offline_a_cache_that_grows_changes_nothing(tmp_path, folders, step):
    """Steps and segments are part of the run from its first step, also before its first checkpoint."""
    cache = make_cache(tmp_path / "cache", *folders)
    options = config(tmp_path, folders, steps=0, epochs=2, checkpoint_every=2)
    report = learn(options.model_copy(update={"out": tmp_path / "whole"}))
    assert report.steps == 6
    with killed_before(step):
        learn(options)
    make_cache(cache.path, *folders, seed=7)
    assert learn(options).steps == 6
    assert_same_weights(tmp_path / "whole", options.out)
    assert learn(options.model_copy(update={"out": tmp_path / "new"})).steps == 12


@pytest.mark.parametrize("step", [0, 3])
def test_pretrain_goes_on_in_a_cache_with_more_policies(tmp_path, folders, step):
    cache = make_cache(tmp_path / "cache", *folders)
    given = {"model": str(folders[0]), "cache": cache.path, "epochs": 2, "batch_size": 4, "device": "cpu"}
    options = PretrainConfig(**given, out=tmp_path / "run", checkpoint_every=2)
    pretrain(PretrainConfig(**given, out=tmp_path / "whole"))
    with killed_before(step):
        pretrain(options)
    make_cache(cache.path, folders[1], folders[1], seed=7)
    pretrain(options)
    assert_same_weights(tmp_path / "whole", options.out)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_on_policy_a_cache_that_grows_changes_nothing(tmp_path, folders, step):
    """Prompts, and the student's rollouts that the first phase takes, are those that were there when it began."""
    student, teacher = map(str, folders)
    common = {"student": student, "max_new_tokens": 6, "samples": 2, "device": "cpu"}
    data = write_prompts(tmp_path / "d.jsonl", 12)

    def roll(cache: Path, **options) -> None:
        rollout(RolloutConfig(**common, data=str(data), cache=cache, **options))

    given = {**common, "teacher": teacher, "refresh_every": 3, "batch_size": 8, "k": 2, "checkpoint_every": 2}
    runs = {}
    for name in ("whole", "grown"):
        roll(tmp_path / name / "cache", first=6)
        runs[name] = LearnConfig(**given, cache=tmp_path / name / "cache", out=tmp_path / name / "run", epochs=3)
    whole = learn(runs["whole"])
    with killed_before(step):
        learn(runs["grown"])
    roll(tmp_path / "grown" / "cache", first=12, seed=3)
    write_prompts(data, 20, seed=9)
    roll(tmp_path / "grown" / "cache")
    assert learn(runs["grown"]).steps == whole.steps == 9
    assert_same_weights(runs["whole"].out, runs["grown"].out)


def test_segments_that_are_gone_are_named(killed):
    (ref,) = open_cache(killed.cache).scored()
    shutil.rmtree(killed.cache / "segments" / ref.scores_id)
    (killed.cache / "manifests" / f"{ref.scores_id}.json").unlink()
    make_cache(killed.cache, Path(killed.student), Path(killed.student).parent / "teacher", seed=7)
    with pytest.raises(CacheError, match=r"1 segments that the run reads are not there any more"):
        learn(killed)


@pytest.mark.parametrize("name", ["save_file", "save_pretrained"])
def test_a_full_disk_while_weights_are_written_is_one_line(killed, monkeypatch, name):
    """safetensors' own error is no OSError."""

    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    owner = checkpoints if name == "save_file" else "transformers.PreTrainedModel"
    monkeypatch.setattr(owner, name, full) if owner is checkpoints else monkeypatch.setattr(f"{owner}.{name}", full)
    with pytest.raises(WriteError, match=r"can't be written .*free space or choose another place") as caught:
        learn(killed)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    learn(killed)
    assert_same_weights(killed.out.parent / "whole", killed.out)


def test_offline_it_learns_from_its_own_rollouts_where_there_are_any(tmp_path, folders, capsys):
    """Somebody's run in a shared cache changes nothing; without rollouts of this student, those of all are taken."""
    cache, teacher = make_cache(tmp_path / "cache", *folders), folders[1]
    first = learn(config(tmp_path, folders, out=tmp_path / "first"))
    other = save_model(tmp_path / "other", "1.0", seed=5)
    make_cache(cache.path, other, teacher, seed=7)
    again = learn(config(tmp_path, folders, out=tmp_path / "again"))
    assert again.fingerprint == first.fingerprint
    assert f"12 scored rollouts of this student; those of {other} are left out (--policy)" in capsys.readouterr().err
    third = save_model(tmp_path / "third", "1.0", seed=6)
    learn(config(tmp_path, (third, teacher), out=tmp_path / "third-run"))
    assert "24 scored rollouts of 2 policies, none of them this student" in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 3])
def test_pretrain_is_bound_to_its_data_too(tmp_path, folders, step):
    """A cache that grows changes nothing; a file that changes is refused."""
    cache, data = make_cache(tmp_path / "cache", *folders).path, write_prompts(tmp_path / "d.jsonl", 8)
    given = {"model": str(folders[0]), "batch_size": 2, "epochs": 1, "checkpoint_every": 2, "device": "cpu"}
    whole = PretrainConfig(**given, cache=cache, out=tmp_path / "whole")
    steps = pretrain(whole).steps
    killed = whole.model_copy(update={"out": tmp_path / "run"})
    with killed_before(step):
        pretrain(killed)
    make_cache(cache, *folders, seed=7)
    assert pretrain(killed).steps == steps
    assert_same_weights(whole.out, killed.out)
    killed = PretrainConfig(**given, data=str(data), out=tmp_path / "from-data")
    with killed_before(step):
        pretrain(killed)
    write_prompts(data, 8, seed=9)
    with pytest.raises(MismatchError, match=r"d\.jsonl: is not the data that the run began with"):
        pretrain(killed)
