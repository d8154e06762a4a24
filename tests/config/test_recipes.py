"""Every recipe against the paper's tables, which are written down here once more, by hand."""

import json
import shlex

import pytest
import yaml
from typer.main import get_command

from ketchup_cache.cli import app, main
from ketchup_cache.config.catalogue import catalogue, one_recipe
from ketchup_cache.config.commands import COMMANDS
from ketchup_cache.config.resolve import find_recipe, load_yaml, resolve
from ketchup_cache.errors import ConfigError
from ketchup_cache.shipped import recipe_names
from tests.helpers.errors import refuses

# Tables 4 and 5, Section 3.1: input, output, RL epochs, batch x accumulation, metrics, training and test examples
TASKS = {
    "xsum": (1024, 64, 10, 8 * 32, ("rouge",), None, None),
    "europarl": (80, 80, 10, 8 * 32, ("bleu", "chrf", "ter"), 1_167_808, 10_016),
    "gsm8k": (200, 300, 5, 8 * 4, ("gsm8k",), 6_705, None),
}
# Section 3.1, Figure 3, Table 8: teacher that is prompted or fine-tuned, student
MODELS = {
    "": ("google/flan-t5-xl", "google-t5/t5-base"), "-t5-small": ("google/flan-t5-xl", "google-t5/t5-small"),
    "-t5-large": ("google/flan-t5-xl", "google-t5/t5-large"), "-qwen": ("Qwen/Qwen1.5-4B", "Qwen/Qwen1.5-0.5B"),
}  # fmt: skip
# Table 1 (ROUGE-1, BLEU, accuracy) and the caption of Table 8
TABLE_1 = {
    "xsum": {2: 36.03, 4: 35.96, 8: 35.68, 16: 35.31},
    "europarl": {2: 22.93, 4: 22.93, 8: 22.95, 16: 22.94},
    "gsm8k": {2: 25.32, 4: 25.40, 8: 25.71, 16: 25.47},
}
TABLE_8_K = {"xsum": 2, "europarl": 2, "gsm8k": 16}
GIVEN = {"student": "s", "cache": "c", "out": "o", "model": "m", "data": "d", "teacher": "t", "to": "parquet"}
ALL = [(task, variant) for task in TASKS for variant in MODELS]


def from_recipe(command, name, **flags):
    return resolve(command, None, flags, name)


@pytest.mark.parametrize(("task", "variant"), ALL, ids=lambda x: x or "t5-base")
def test_recipe_is_the_papers_setting(task, variant):
    longest_in, longest_out, epochs, batch, metrics, train, test = TASKS[task]
    teacher, student = MODELS[variant]
    name = task + variant
    finetuned = task != "xsum" or variant == "-qwen"
    rollout, learn = (from_recipe(command, name, student="s", cache="c") for command in ("rollout", "learn"))
    pretrain, score = from_recipe("pretrain", name, cache="c", out="o"), from_recipe("score", name, cache="c")
    evaluate = from_recipe("evaluate", name, model="m")
    assert pretrain.model == student
    assert score.teacher == learn.teacher == evaluate.teacher == ("teacher/best" if finetuned else teacher)
    assert load_yaml(find_recipe(name))["about"].get("finetune") == (teacher if finetuned else None)
    assert rollout.max_prompt_tokens == pretrain.max_prompt_tokens == evaluate.max_prompt_tokens == longest_in
    for config in (rollout, pretrain, learn, evaluate):
        assert config.max_new_tokens == longest_out
    assert (pretrain.epochs, pretrain.lr, pretrain.batch_size) == (5, 3e-5, 8)
    assert (learn.epochs, learn.lr, learn.batch_size, learn.clip_return) == (epochs, 1e-5, batch, 100)
    results = TABLE_1[task]
    assert learn.k == (TABLE_8_K[task] if variant == "-qwen" else max(results, key=results.get))
    for config in (rollout, learn):  # Algorithm 1: the student's own distribution, one completion of each prompt
        assert (config.temperature, config.top_k, config.top_p, config.greedy, config.samples) == (1, 0, 1, False, 1)
    assert (learn.tail, learn.baseline) == ("one-step", "none")
    for config in (rollout, learn, evaluate):
        assert config.calculator == (task == "gsm8k")
    assert (evaluate.metrics, evaluate.rollout_batch) == (metrics, 32)
    assert (rollout.limit or None, pretrain.limit or None, evaluate.limit or None) == (train, train, test)
    asked = ("prompt_field", "target_field", "template", "long_prompts")
    for other, field in [*((evaluate, f) for f in (*asked, "data")), *((pretrain, f) for f in (*asked, "limit"))]:
        assert getattr(rollout, field) == getattr(other, field), field  # and what the teacher is fine-tuned on


def test_the_authors_program_differs_from_the_paper_where_it_is_known_to():
    name = "europarl-as-released"
    paper, program = (from_recipe("learn", n, student="s", cache="c", eval_data="d") for n in ("europarl", name))
    fields = {"greedy", "normalization", "tail", "end_weight", "clip_return", "baseline", "schedule", "batch_size"}
    fields |= {"epochs"}
    assert {f for f in type(paper).model_fields if getattr(paper, f) != getattr(program, f)} == fields
    assert from_recipe("rollout", name, student="s", cache="c").greedy


def test_test_examples_are_none_of_the_training_examples():
    for name in recipe_names():
        rollout = from_recipe("rollout", name, student="s", cache="c")
        evaluate = from_recipe("evaluate", name, model="m")
        assert (rollout.split, rollout.skip) == ("train", 0)
        assert evaluate.split == "test" or evaluate.skip >= rollout.limit + 10_014


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_every_command(command, name):
    flags = {key: GIVEN.get(key, "x") for key, field in COMMANDS[command].model_fields.items() if field.is_required()}
    if command in ("pretrain", "score"):  # one of several options that name what is read
        flags["cache"] = "c"
    assert isinstance(from_recipe(command, name, **flags), COMMANDS[command])


@pytest.mark.parametrize("name", recipe_names())
def test_commands_of_a_recipe_are_commands(name):
    """Parsed by the command line itself, and each finds the options that it needs."""
    group, commands, made = get_command(app), one_recipe(name).commands, set()
    for line in commands:
        program, command, *flags = shlex.split(line)
        assert program == "ketchup-cache"
        values = group.commands[command].make_context(command, flags).params
        values.pop("as_json"), values.pop("config")
        config = resolve(command, None, {k: v for k, v in values.items() if k != "recipe"}, values["recipe"])
        assert values["recipe"] == name
        needed = {str(getattr(config, key, None)) for key in ("model", "student", "teacher")}
        assert {path for path in needed if path.endswith(("/model", "/student"))} <= made | {"None"}, line
        if out := getattr(config, "out", None):
            made |= {f"{out}/best"}
    assert [line.split()[1] for line in commands][-6:] == "rollout pretrain rollout score learn evaluate".split()


def test_a_file_extends_a_recipe_and_merges_its_sections_and_flags_win(tmp_path):
    file = tmp_path / "mine.yaml"
    given = {"student": "s", "cache": "c"}
    file.write_text("max-new-tokens: 7\nlr: 1e-3\n")
    config = resolve("learn", file, given | {"lr": "2e-3"}, "xsum")
    assert (config.max_new_tokens, config.lr, config.k, config.epochs) == (7, 2e-3, 2, 10)
    file.write_text("extends: gsm8k-t5-small\nlearn:\n  batch-size: 64\n")
    config = resolve("learn", file, given)
    assert (config.batch_size, config.k, config.max_new_tokens) == (64, 8, 300)
    assert resolve("pretrain", file, {"cache": "c", "out": "o"}).model == "google-t5/t5-small"


def test_extends_names_a_recipe_and_makes_no_circle(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    for name, message in (("gsm8", r"no recipe `gsm8`: did you mean `gsm8k`\?"), ("3", "no recipe `3`; ")):
        file.write_text(f"extends: {name}\n")
        refuses(ConfigError, f"^{message}", resolve, "learn", file, {})
    for name, below in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {below}\n")
    monkeypatch.setattr("ketchup_cache.config.resolve.recipe_names", lambda: ["a", "b"])
    monkeypatch.setattr("ketchup_cache.config.resolve.recipe", lambda name: tmp_path / f"{name}.yaml")
    refuses(ConfigError, "circle", resolve, "learn", None, {}, "a")


def test_list_and_one_recipe(capsys):
    def shown_by(*words: str, code: int = 0) -> str:
        assert main(list(words)) == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    shown = shown_by("recipes")
    assert recipe_names() == sorted([*(task + variant for task, variant in ALL), "europarl-as-released"])
    assert all(f"{name} " in shown for name in recipe_names())
    assert "FLAN-T5-XL (3B) → T5-large (800M)" in shown
    assert [r["name"] for r in json.loads(shown_by("recipes", "--json"))["recipes"]] == recipe_names()
    tasks = {r["task"] for r in catalogue().recipes}
    assert tasks == {"XSum summarisation", "Europarl EN–NL translation", "GSM8K reasoning"}

    shown = shown_by("recipes", "gsm8k-qwen")
    assert find_recipe("gsm8k-qwen").read_text() in shown
    assert "extends: gsm8k" in shown
    assert shown.rstrip().splitlines()[-1] == "ketchup-cache evaluate --recipe gsm8k-qwen --model k16/best"
    assert yaml.safe_load(shown.split("# Commands")[0])["learn"] == {"k": 16}
    one = json.loads(shown_by("recipes", "gsm8k-qwen", "--json"))
    assert (one["options"]["learn"]["k"], one["options"]["learn"]["epochs"]) == (16, 5)
    assert one["about"]["student"] == "Qwen1.5-0.5B"

    assert "no recipe `gsm8k-gpt`" in shown_by("recipes", "gsm8k-gpt", code=2)
    assert "`ketchup-cache recipes` lists them" in shown_by("learn", "--recipe", "nonsense-name", code=2)
