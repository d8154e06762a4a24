"""Options from flags and YAML, and what is said when they are wrong."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from typing import get_args

import pytest

from ketchup_cache.cli import main
from ketchup_cache.config.commands import COMMANDS, LearnConfig
from ketchup_cache.config.methods import METHODS, Method
from ketchup_cache.config.names import ADVANCED, ELSEWHERE, MOST_USED
from ketchup_cache.config.resolve import resolve
from ketchup_cache.errors import ConfigError
from tests.helpers.errors import fails

LEARN = {"student": "s", "cache": "c", "out": "o"}


def problems(command, file=None, **flags) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(command, file, flags)
    return caught.value.problems


def yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = yaml(tmp_path, "student: from-file\ncache: c\nout: o\nk: 8\nmax-new-tokens: 32\n")
    config = resolve("learn", file, {"student": "from-flag", "lr": None})
    assert (config.student, config.k, config.max_new_tokens, config.lr) == ("from-flag", 8, 32, 1e-5)


def test_one_file_serves_a_whole_experiment(tmp_path):
    sections = "learn: {student: S, out: run, k: 2, refresh_every: 4}\nscore: {batch_tokens: 99}\n"
    file = yaml(tmp_path, f"cache: shared\nteacher: T\nsamples: 2\n{sections}")
    learn, score = resolve("learn", file, {}), resolve("score", file, {})
    assert (learn.teacher, learn.k, learn.samples, str(learn.cache)) == ("T", 2, 2, "shared")
    assert (score.teacher, score.batch_tokens) == ("T", 99)
    offline = yaml(tmp_path, sections)  # a file serves runs with and without new rollouts
    assert "refresh_every" not in resolve("learn", offline, {"cache": "c"}).model_fields_set


def test_all_problems_at_once_each_with_its_fix(tmp_path):
    file = yaml(tmp_path, "studnet: x\nk: 0\nlearn: {zebra: 1}\n")
    found = problems("learn", file, lr="fast", tail="jmp", cache="c", out="o")
    assert sorted(found) == [
        "--k must be 1 or more, not 0", "--lr must be a number, not 'fast'",
        "--student is missing: policy to train: a folder or a Hub id",
        "--tail must be one of 'one-step' or 'jump', not 'jmp': did you mean `jump`?",
        f"{file}: unknown key `studnet`: did you mean `student`?", f"{file}: unknown key `zebra` in section `learn`",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"refresh_every": "0"}, "--refresh-every must be 1 or more"), ({"k": "2.5"}, "--k must be a whole number"),
        ({"teacher": "t", "refresh_every": "6", "reuse": "4"}, "refresh_every 6 must be a multiple of reuse 4"),
        ({"reuse": "2"}, "reuse is of new rollouts (--teacher, --scores-from); from a cache alone, use --epochs"),
        ({"refresh_every": "16"}, "refresh_every is of new rollouts (--teacher, --scores-from)"),
        ({"refresh_below_ess": "0.5"}, "refresh_below_ess is of new rollouts"),
        ({"teacher": "t", "refresh_below_ess": "0.5", "reuse": "4"}, "each used once: leave --reuse out"),
        ({"teacher": "t", "refresh_every": "2", "baseline": "leave-one-out"}, "set --samples to 2 or more"),
        ({"batch_size": "10", "samples": "4"}, "must be a multiple of samples 4"),
        ({"temperature": "0"}, "--temperature must be greater than 0"), ({"method": "ppo"}, "--method must be one of"),
        ({"greedy": True, "samples": "2"}, "set --samples to 1"), ({"top_p": "1.5"}, "--top-p must be 1.0 or less"),
        ({"scores_from": "cache", "teacher": "t"}, "leave --teacher out, and choose one with --scored-by"),
        ({"scores_from": "cache", "baseline": "leave-one-out"}, "set --samples to 2 or more"),
        ({"scores_timeout": "-1"}, "--scores-timeout must be 0.0 or more"),
        ({"method": "llmr", "k": "4"}, "method llmr is K = 1: leave --k out (it is 4), or use another --method"),
        ({"method": "kl", "teacher": "t"}, "method kl learns from teacher outputs in the cache: leave --teacher out"),
        ({"method": "kl", "scores_from": "cache"}, "learns from teacher outputs in the cache: leave --scores-from out"),
        ({"method": "seqkd", "policy": "s"}, "only those of --teacher-outputs: leave --policy out"),
        ({"method": "js", "batch_size": "9"}, "takes half of the 9 rollouts from the teacher"),
        ({"method": "tvd", "batch_size": "12", "samples": "4"}, "make half of --batch-size a multiple of --samples 4"),
        ({"method": "kl", "baseline": "mean"}, "method kl has no returns, so no baseline: leave --baseline out"),
        ({"method": "reverse-kl", "baseline": "mean"}, "method reverse-kl has no returns, so no baseline"),
        ({"method": "kl", "keep_top": "0"}, "--keep-top must be 1 or more"),
    ],
)  # fmt: skip
def test_rules(flags, message):
    (found,) = problems("learn", **LEARN, **flags)
    assert message in found


K_8, LLMR = "learn: {k: 8}\n", "learn: {k: 8, method: llmr}\n"
MIXED = "teacher: T\nlearn: {k: 8, baseline: mean, policy: p}\n"
NO_RETURNS = {"teacher": "T", "policy": "p", "baseline": "none"}


@pytest.mark.parametrize(
    ("text", "flags", "recipe", "found"),
    [
        (K_8, {"method": "ketchup"}, None, {"k": 8}), (K_8, {"method": "llmr"}, None, {"k": 1}),
        ("", {"method": "llmr"}, "europarl", {"k": 1}), (LLMR, {}, None, {"k": 1}),
        (LLMR, {"method": "ketchup"}, None, {"k": 8}), (LLMR, {"k": "1"}, None, {"k": 1}),
        (MIXED, {}, None, {"teacher": "T"}), (MIXED, {"method": "js"}, None, NO_RETURNS),
        (MIXED, {"method": "kl"}, None, {"teacher": None, "policy": None, "baseline": "none"}),
        (MIXED, {"method": "reverse-kl"}, None, NO_RETURNS),
        ("teacher: T\n", {"scores_from": "cache"}, None, {"teacher": None, "scores_from": "cache"}),
        ("scores_from: cache\n", {"teacher": "T"}, None, {"teacher": "T", "scores_from": None}),
        ("scores_from: cache\n", {}, "xsum", {"teacher": None, "scores_from": "cache"}),
    ],
)  # fmt: skip
def test_what_does_not_apply_may_stand_in_a_file(tmp_path, text, flags, recipe, found):
    """One file serves several methods and ways of scoring: a flag for one passes over what belongs to the other."""
    config = resolve("learn", yaml(tmp_path, text), LEARN | flags, recipe)
    assert {name: getattr(config, name) for name in found} == found


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [(LLMR, {"k": "8"}, "leave --k out"), (MIXED, {"method": "kl", "teacher": "T"}, "leave --teacher out")],
)
def test_what_does_not_apply_is_refused_as_a_flag(tmp_path, text, flags, message):
    assert message in problems("learn", yaml(tmp_path, text), **LEARN, **flags)[0]


def test_every_method_has_a_row_that_says_what_it_learns_from():
    assert set(METHODS) == set(get_args(Method))
    for rule in METHODS.values():
        assert rule.samples or rule.outputs
        assert set(rule.fixed) <= set(LearnConfig.model_fields)


def test_how_many_logits_a_method_needs():
    needed = {m: LearnConfig(**LEARN, method=m, keep_top=7).top_needed for m in get_args(Method)}
    assert needed == {"ketchup": 0, "llmr": 0, "seqkd": 0, "kl": 7, "reverse-kl": 7, "js": 7, "tvd": 7, "minillm": 7}
    assert LearnConfig(**LEARN, exact=True, keep_top=7).top_needed == 7


def test_minillm_is_a_member_of_the_family():
    config = LearnConfig(**LEARN, method="minillm")
    assert (config.weights, config.cost, config.exact) == ("mean", "kl", True)


def test_pretrain_takes_one_source():
    for flags in ({}, {"data": "d", "cache": "c"}):
        (found,) = problems("pretrain", model="m", out="o", **flags)
        assert "either --data" in found


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"k: [1", "not valid YAML"), (b"- a\n- b", "found a list"), (b"learn: 3", "section `learn` must hold"),
     (b"\xff\xfe\x00k", "can't be read"), (None, "no such config file")],
)  # fmt: skip
def test_unusable_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    assert message in problems("learn", tmp_path / "config.yaml", **LEARN)[0]


def test_batch_tokens_is_a_number_or_auto():
    options = {"teacher": "t", "cache": "c"}
    for given, taken in (("auto", "auto"), ("64", 64), (64, 64)):
        assert resolve("score", None, {**options, "batch_tokens": given}).batch_tokens == taken
    for given in ("0", 0, "-1", "2.5", 2.5, "Auto", "", True):
        (found,) = problems("score", **options, batch_tokens=given)
        assert found == f"--batch-tokens must be a whole number of 1 or more, or auto, not {given!r}"
    assert re.search(r"--batch-tokens +INT\|auto", run("score", "--help").stdout)


def test_every_option_has_a_help_text():
    fields = {(command, name): f for command, config in COMMANDS.items() for name, f in config.model_fields.items()}
    assert not [name for name, field in fields.items() if not field.description]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ketchup_cache", *arguments]
    wide = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=wide)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_names_every_flag_and_ends_in_examples(command):
    help_text = run(command, "--help").stdout
    for name in COMMANDS[command].model_fields:
        assert name.replace("_", "-") in help_text.replace("\n", " ") or name.upper() in help_text
    assert help_text.rstrip().splitlines()[-1].startswith("   ")
    panels = re.findall("─ ([A-Z][a-z ]+) ─", help_text)
    order = [panel for panel in ("Arguments", "Required", "Most used") if panel in panels]
    assert order == panels[: len(order)]
    assert panels[-1] == "General"
    assert f"ketchup-cache {command}" in help_text.split("Examples:")[1]


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("compact c --into d", "`ketchup-cache score --storage float16`"), ("ls c", "`ketchup-cache info CACHE`"),
        ("diff c d", "`ketchup-cache info CACHE OTHER`"), ("gc c", "`ketchup-cache verify CACHE --clean`"),
        ("score --watch c", "--follow with --cache"), ("score --idle-exit=3", "--until-idle"),
        ("learn --scorer watch", "--scores-from"), ("learn --scorer-timeout 3", "--scores-timeout"),
    ],
)  # fmt: skip
def test_what_went_away_says_what_to_use(capsys, words, instead):
    assert fails(capsys, *words.split()).endswith(f"is gone: use {instead}")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("leran", "`learn`"), ("train", "`learn` or `pretrain`"), ("generate", "`rollout`"),
        ("learn --learning-rate 1", "--lr"), ("learn --num_train_epochs=3", "--epochs"), ("learn --kk 1", "--k"),
        ("rollout --model-name-or-path x", "--student"), ("pretrain --model-name-or-path x", "--model"),
        ("learn --student s --cache c --method gkd", "`reverse-kl` or `js`"),
        ("learn --student s --cache c --weights flt", "`flat`"), ("recipes gsm8", "`gsm8k`"),
    ],
)  # fmt: skip
def test_words_of_other_tools_and_slips_are_understood(capsys, words, meant):
    assert fails(capsys, *words.split()).split(": did you mean ")[1] == f"{meant}?"


def test_keys_of_other_tools_in_a_file_are_understood(tmp_path):
    file = yaml(tmp_path, "output_dir: o\nlearn: {teacher_model_name_or_path: t, qqq: 1}")
    found = [problem.partition("unknown key ")[2] for problem in problems("learn", file, **LEARN)]
    assert found == [
        "`output_dir`: did you mean `out`?",
        "`teacher_model_name_or_path` in section `learn`: did you mean `teacher`?",
        "`qqq` in section `learn`",
    ]


def test_every_name_of_ours_that_help_and_hints_use_is_one():
    ours = {*COMMANDS, *METHODS, *(name for config in COMMANDS.values() for name in config.model_fields)}
    assert {name for names in ELSEWHERE.values() for name in names} | ADVANCED <= ours
    for command, names in MOST_USED.items():
        assert set(names) <= COMMANDS[command].model_fields.keys()
        assert not ADVANCED & set(names)


def test_env_names_what_is_installed(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == version("torch")
    assert "pytest" not in found["packages"]
    assert found["packages"].keys() >= {"peft", "obstore"}
    assert main(["env"]) == 0
    assert f"torch {version('torch')}" in capsys.readouterr().out


def test_errors_are_lines_with_exit_code_2():
    for arguments in (["learn", "--k", "0"], ["learn", "--kk", "1"], ["nonsense"], ["info", "/no/such/cache"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert all(line.startswith("ketchup-cache: ") for line in done.stderr.splitlines())
        assert "Traceback" not in done.stderr
    assert "Traceback" in run("--debug", "learn", "--k", "0").stderr


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"weights": "flat"}, {"weights": "flat", "lam": 0.25, "k": 4}),
        ({"method": "minillm"}, {"weights": "mean", "k": 4}),
        ({}, {"weights": "comb", "k": 8}),
    ],
)
def test_a_recipes_k_is_none_of_other_weights(flags, found):
    config = resolve("learn", None, LEARN | flags, "europarl")
    assert {name: getattr(config, name) for name in found} == found
    with pytest.raises(ConfigError, match="has no --k"):
        resolve("learn", None, LEARN | {"weights": "flat", "k": 8}, "europarl")


def test_a_message_names_an_argument_as_it_is_typed(capsys):
    for words, message in {
        ("export", "cache", "--to", "parquet"): "OUT is missing: new folder for the files",
        ("compare", "a"): "B is missing: outputs of another model for the same data",
        ("pull",): "URL is missing: source",
        ("export", "cache", "out"): "--to is missing",
    }.items():
        assert main([*words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "an alias"),
        ("k: " + "[" * 5_000 + "]" * 5_000, "recursion"),
        ("{" * 5_000, "not valid YAML"),
        ("k: 1\n" * 50_000, "more than 131,072 bytes"),
        ("k: " + "9" * 50_000, "not valid YAML"),
        ("k: 2026-99-99", "not valid YAML"),
        ("k: !!python/object/apply:os.system [ls]", "not valid YAML"),
        (None, "not a regular file"),
    ],
)
def test_hostile_files_are_one_line_at_once(tmp_path, text, message, capsys):
    file = tmp_path / "c.yaml"
    os.mkfifo(file) if text is None else file.write_text(text)
    began = time.process_time()
    assert message in fails(capsys, "learn", "--config", file)
    assert time.process_time() - began < 5
