"""What TensorBoard and W&B hold of a run, by their own files: the numbers of the run's records, each step once."""

import json
import shutil
import struct
import time
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import yaml

from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.errors import ConfigError
from ketchup_cache.training import tracking
from ketchup_cache.training.learn import learn
from ketchup_cache.training.pretrain import pretrain
from tests.helpers.caches import make_cache
from tests.helpers.learning import config, json_lines, killed_before, metrics
from tests.helpers.models import write_prompts

SECRET = "5ec7e7" * 7


@pytest.fixture
def options(tmp_path, folders):
    make_cache(tmp_path / "cache", *folders)
    dev = {"eval_data": str(write_prompts(tmp_path / "dev.jsonl", 4)), "eval_every": 2, "metric": "chrf,exact"}
    return config(tmp_path, folders, max_new_tokens=5, steps=6, checkpoint_every=2, **dev)


def expected(run):
    """Name → [(step, value)] of every number in the run's records."""
    found = {}
    dev = json_lines(run / "dev.jsonl") if (run / "dev.jsonl").exists() else []
    for kind, line in [*(("train", line) for line in metrics(run)), *(("dev", line) for line in dev)]:
        for name, value in [*line.items(), *line.get("metrics", {}).items()]:
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(f"{kind}/{name}", []).append((line["step"], value))
    return found


def of_tensorboard(run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    events = reader.EventAccumulator(str(run / "tensorboard"), {"scalars": 0}, purge_orphaned_data=False).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def of_wandb(run):
    """Its file is a log as LevelDB frames it, in blocks of 32 KiB, after 7 bytes. Returns the configuration too."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs wandb")
    found, options, ids = {}, {}, set()
    for path in sorted((run / "wandb").glob("*run-*-*/*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if (left := -place % 2**15) < 7 and left:
                place += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind not in (1, 4):  # the last part of a record
                continue
            record, whole = pb.Record.FromString(whole), b""
            ids |= {record.run.run_id} - {""}
            options |= {item.key: json.loads(item.value_json) for item in record.config.update}
            for item in record.history.item:
                name = "/".join(item.nested_key) or item.key
                if name[0] != "_":
                    found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    assert len(ids) == 1
    return found, options


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


def test_a_killed_run_goes_on_in_tensorboard_and_no_step_is_there_twice(options, capsys):
    options = options.model_copy(update={"track": ("tensorboard",)})
    with killed_before(5):
        learn(options)
    learn(options)
    wanted = expected(options.out)
    assert [step for step, _ in wanted["train/loss"]] == list(range(6))
    assert [step for step, _ in wanted["dev/chrf"]] == [0, 2, 4, 6]
    found = of_tensorboard(options.out)
    of_time = [
        name for name in wanted if name.endswith("_s") or name == "dev/seconds"
    ]  # steps 4 and 5 took another time
    assert_same({n: v for n, v in found.items() if n not in of_time}, {n: wanted[n] for n in wanted.keys() - of_time})
    assert [len(found[name]) for name in of_time] == [len(wanted[name]) for name in of_time]
    (file,) = (options.out / "tensorboard").glob("*/hparams.yml")
    config = yaml.safe_load(file.read_text())
    assert (config["k"], config["student"], config["metric"]) == (4, options.student, '["chrf", "exact"]')
    assert "out" not in config


def test_wandb_has_the_same_and_is_told_no_secret(options, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'ketchup-cache[track]'")
    for key, value in {"MODE": "offline", "API_KEY": SECRET, "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    options = options.model_copy(update={"track": ("wandb",), "steps": 4})
    with killed_before(3):
        learn(options)
    learn(options)
    wanted = expected(options.out)
    for _ in range(300):  # W&B's own process may still be writing when its run is finished
        found, config = of_wandb(options.out)
        if found.keys() == wanted.keys() and len(found["dev/chrf"]) == len(wanted["dev/chrf"]):
            break
        time.sleep(0.1)
    assert {name: [s for s, _ in v] for name, v in found.items()} == {n: [s for s, _ in v] for n, v in wanted.items()}
    for name in ("train/loss", "dev/chrf"):
        np.testing.assert_allclose(found[name], wanted[name])
    assert (config["k"], config["student"], config["scored_by"]) == (4, options.student, None)
    assert "out" not in config
    files = [path for path in (options.out / "wandb").rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not [path for path in files if path.name == "wandb-metadata.json"]


def test_a_tracker_that_fails_costs_one_warning_and_later_gets_all(options, monkeypatch, capsys):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'ketchup-cache[track]'")
    from accelerate.tracking import TensorBoardTracker

    def log(self, values, step):
        raise ConnectionError("no\nnetwork")

    options = options.model_copy(update={"track": ("tensorboard",), "steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "log", log)
        assert learn(options).steps == 3
    printed = capsys.readouterr().err
    assert printed.count("nothing more is logged (no network)") == 1
    shutil.rmtree(options.out / "tensorboard")
    learn(options.model_copy(update={"steps": 4}))
    assert_same(of_tensorboard(options.out), expected(options.out))


def test_pretrain_logs_too(tmp_path, folders):
    given = {"model": str(folders[0]), "data": str(write_prompts(tmp_path / "d.jsonl", 4)), "track": "tensorboard"}
    pretrain(PretrainConfig(**given, out=tmp_path / "run", batch_size=2, epochs=1, device="cpu"))
    assert_same(of_tensorboard(tmp_path / "run"), expected(tmp_path / "run"))


def test_what_is_missing_or_does_not_start_is_one_line(options, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    options = options.model_copy(update={"track": ("wandb",)})
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "version", missing)
        with pytest.raises(ConfigError, match=r"--track wandb needs the package wandb: pip install 'ketchup-cache\[tr"):
            learn(options)
    assert not options.out.exists()
    pytest.importorskip("wandb", reason="needs wandb: pip install 'ketchup-cache[track]'")
    monkeypatch.setattr("accelerate.tracking.WandBTracker.start", missing)
    with pytest.raises(ConfigError, match="--track wandb: can't be started"):
        learn(options)
