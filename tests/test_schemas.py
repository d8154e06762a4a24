"""Real files keep the JSON Schemas. (That the schemas are those of the models: cache/test_roundtrip.py.)"""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.schemas.generate import FOLDER
from ketchup_cache.training.learn import learn
from tests.helpers.caches import make_cache

RECIPES = sorted((Path(__file__).parents[1] / "ketchup_cache" / "config" / "recipes").glob("*.yaml"))


def schema(name):
    loaded = json.loads((FOLDER / name).read_text())
    jsonschema.Draft202012Validator.check_schema(loaded)
    return jsonschema.Draft202012Validator(loaded)


def test_metrics_and_manifests_of_a_real_run(tmp_path, folders):
    cache = make_cache(tmp_path / "cache", *folders)
    learn(LearnConfig(student=str(folders[0]), cache=cache.path, out=tmp_path / "run", batch_size=4, steps=2))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        schema("metrics.schema.json").validate(json.loads(line))
    for path in (cache.path / "manifests").iterdir():
        schema("manifest.schema.json").validate(json.loads(path.read_text()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_keep_the_config_schema(path):
    schema("config.schema.json").validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("wrong", [{"kk": 1}, {"learn": {"k": 0}}, {"tail": "jmp"}, {"score": {"k": 3}}])
def test_config_schema_refuses_what_the_program_refuses(wrong):
    with pytest.raises(jsonschema.ValidationError):
        schema("config.schema.json").validate(wrong)
