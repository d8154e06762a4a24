"""`show`: rows against the cache's own reader and plain decoding; hostile text never reaches the terminal."""

import json

import numpy as np
import pytest
from rich.console import Console

from ketchup_cache import k_step_returns
from ketchup_cache.cli import main
from ketchup_cache.report import show as module
from ketchup_cache.text.tokens import pieces, visible
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails
from tests.helpers.models import make_tokenizer, train_byte_level

HOSTILE = "a\x1b[31mred\x07 \u202edlrow\u2066 \x9b2J \u200b\nrow 9 — policy x"


@pytest.fixture(scope="module")
def made(tmp_path_factory, folders):
    return make_cache(tmp_path_factory.mktemp("show") / "cache", *folders, segments=2)


def shown(capsys, *words):
    capsys.readouterr()
    assert main(["show", *map(str, words)]) == 0
    return capsys.readouterr().out


def steers(text):
    """What may not reach a terminal; line feeds end lines of ours."""
    return [c for c in text if c != "\n" and not c.isprintable()]


def test_rows_of_a_cache_are_those_of_its_reader(capsys, made, folders):
    words = made.path, "--tokenizer", folders[0], "--k", 2, "--normalization", "centred"
    rows = json.loads(shown(capsys, *words, "--rows", "3:9", "--json"))["rows"]
    tokenizer, wanted = make_tokenizer(), list(made.rows())[3:9]
    assert [row["row"] for row in rows] == [3, 4, 5, 6, 7, 8]  # over the border of two segments
    for row, true in zip(rows, wanted, strict=True):
        for name in ("q", "max_q", "behavior_logprob"):
            np.testing.assert_array_equal(np.float32(row[name]), getattr(true, name))
        given = [np.float64(array)[None] for array in (true.q, true.max_q)]
        options = {"normalization": "centred", "mean_q": np.float64(true.mean_q)[None], "finished": [true.finished]}
        returns = k_step_returns(*given, [len(true.q)], k=2, **options)[0]
        np.testing.assert_allclose(row["returns"], returns, atol=1e-9)
        assert row["ids"] == true.completion_tokens.tolist()
        assert row["completion"] == tokenizer.decode(row["ids"])
        assert row["ending"].startswith("finished" if true.finished else "unfinished")
    plain = shown(capsys, *words, "--rows", 3)
    assert "\x1b" not in plain
    assert f"scored by {wanted[0].teacher}" in plain
    assert f"{rows[0]['returns'][0]:.2f} (K = 2)" in plain


def test_a_run_is_shown_with_its_own_estimator_and_rows_without_scores_say_so(capsys, tmp_path, made, folders):
    from tests.helpers.models import write_prompts

    write_prompts(tmp_path / "d.jsonl", 3)
    words = ["--student", str(folders[0]), "--device", "cpu", "--cache", str(tmp_path / "c"), "--max-new-tokens", "4"]
    assert main(["rollout", *words, "--data", str(tmp_path / "d.jsonl"), "--samples", "2"]) == 0
    assert "; not scored" in shown(capsys, tmp_path / "c")
    assert main(["score", "--teacher", str(folders[1]), "--cache", str(tmp_path / "c"), "--device", "cpu"]) == 0
    out, how = tmp_path / "run", ["--weights", "flat", "--lam", "0.5", "--batch-size", "2"]
    assert main(["learn", *words, *how, "--out", str(out)]) == 0
    rows = json.loads(shown(capsys, out, "--rows", ":2", "--json"))["rows"]
    assert all(row["how"]["weights"] == "flat" and row["how"]["lam"] == 0.5 for row in rows)
    assert "(flat weights, λ = 0.5)" in shown(capsys, out)
    (out / "pins.json").write_text(json.dumps({"cache": "s3://elsewhere/x", "segments": made.segment_ids()}))
    assert "not in this folder (s3://elsewhere/x)" in fails(capsys, "show", out)
    (out / "pins.json").unlink()
    assert "has read no cache" in fails(capsys, "show", out)


@pytest.mark.parametrize("color", ["gap", "return"])
def test_tokens_are_shaded_on_a_terminal_only(capsys, monkeypatch, made, folders, color):
    words = made.path, "--tokenizer", folders[0], "--color", color
    plain = shown(capsys, *words)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(module, "Console", lambda: Console(force_terminal=True, color_system="256"))
    coloured = shown(capsys, *words)
    assert "\x1b[30;48;5;209m" in coloured
    assert all(part[: part.index("m")] in ("0", "30;48;5;230", "30;48;5;223", "30;48;5;216", "30;48;5;209")
               for part in coloured.split("\x1b[")[1:])  # fmt: skip
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(capsys, *words) == plain


def test_data_is_cut_and_ended_as_a_model_is_given_it(capsys, tmp_path, folders):
    rows = [{"prompt": "a cat sees dog bird", "target": "two big dog"}, {"prompt": "cat", "target": "the dog"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = tmp_path / "d.jsonl", "--tokenizer", folders[0], "--template", "the {prompt}", "--max-prompt-tokens", 5
    assert "more than 5" in fails(capsys, "show", *words)
    words = *words, "--long-prompts", "truncate", "--max-new-tokens", 3
    first, second = json.loads(shown(capsys, *words, "--json"))["rows"]
    assert (first["prompt"], first["about"]["prompt"]) == (
        "the a cat sees </s>",
        "5 tokens, cut at --max-prompt-tokens",
    )
    assert (first["reference"], first["ending"]) == ("two big dog", "cut")
    assert (second["reference"], second["ending"]) == ("the dog </s>", "finished")
    text = shown(capsys, *words, "--rows", "1:")
    assert text.splitlines()[0] == "row 1"
    assert "reference (3 tokens, finished)" in text
    assert "the a cat sees dog bird" in shown(capsys, *words[:1], "--template", "the {prompt}", "--rows", 0)
    assert "--tokenizer" in fails(capsys, "show", words[0], "--chat")


def test_nothing_in_a_text_steers_the_terminal(capsys, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": HOSTILE, "target": HOSTILE}) + "\n")
    row = {"id": "0", "prompt": HOSTILE, "output": HOSTILE, "target": HOSTILE, "finished": False}
    (tmp_path / "o.jsonl").write_text(json.dumps(row) + "\n")
    for name, parts in (("d.jsonl", 2), ("o.jsonl", 3)):
        text = shown(capsys, tmp_path / name)
        assert not steers(text)
        assert text.count("a⟨U+001B⟩[31mred⟨U+0007⟩ ⟨U+202E⟩dlrow⟨U+2066⟩ ⟨U+009B⟩2J ⟨U+200B⟩↵\n") == parts
        assert [line for line in text.splitlines() if line.startswith("row")] == ["row 0"]
    assert "unfinished: cut at the length limit" in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        assert not steers(shown(capsys, tmp_path / "o.jsonl", "--json"))


def test_the_tokenizer_must_be_the_one_that_made_the_ids(capsys, tmp_path, made, folders):
    other = make_tokenizer(["other", "words"])
    other.save_pretrained(tmp_path / "other")
    assert "give a model that has it with --tokenizer" in fails(capsys, "show", made.path)
    assert "another tokenizer" in fails(capsys, "show", made.path, "--tokenizer", tmp_path / "other")
    assert "no such rows" in shown(capsys, made.path, "--tokenizer", folders[0], "--rows", "99:")


def test_a_character_of_several_tokens_is_with_its_last():
    tokenizer, text = train_byte_level(["ab"], 262), "a🐈b"
    ids = tokenizer(text)["input_ids"]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🐈", "b", "</s>"]
    assert pieces(tokenizer, ids[:3]) == ["a", "", "�"]
    assert visible("é\t🐈") == "é⇥🐈"
