"""The case study, all of it, on a tiny model of five layers; its page."""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest

import examples.smollm2.__main__ as study
from ketchup_cache.cli import main
from ketchup_cache.models.load import load_model
from tests.helpers.models import MARKED, VOCAB, WORDS, chat_tokenizer, save_decoder

NOUNS = WORDS[18:22]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Options of the study; its commands run in this process."""

    def ketchup(*words: object) -> str:
        with redirect_stdout(StringIO()) as out:
            assert main([str(word) for word in words]) == 0
        return out.getvalue()

    monkeypatch.setattr(study, "ketchup", ketchup)
    monkeypatch.setattr(study, "PROMPT_TOKENS", 24)
    monkeypatch.setattr(study, "SYSTEM", "small dog")
    rows = [{"prompt": f"{a} {b} cat . {b} sees {a} .", "target": f"{a} {b}"} for a in NOUNS for b in NOUNS]
    rows[1] = {"prompt": " ".join(["cat"] * 40) + " . the dog .", "target": "cat"}  # its first sentence is too long
    for split in study.SIZES:
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = chat_tokenizer(MARKED)
    teacher = save_decoder(
        tmp_path / "teacher", "llama", tokenizer=tokenizer, vocab_size=VOCAB + 4, num_hidden_layers=5
    )
    return ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--teacher", str(teacher), "--limit", "5",
            "--epochs", "1", "--steps", "2"]  # fmt: skip


def test_it_runs_and_its_prompts_fit(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "ENOUGH", 0.0)
    monkeypatch.setattr(study, "ROWS", {name: study.ROWS[name] for name in ("LLMR, mean", "exact")})
    study.main(given)
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["teacher", "start", *study.ROWS]
    teacher, student = (load_model(str(folder), device="cpu") for folder in (given[5], tmp_path / "work/student"))
    kept = [teacher.model.layers[i] for i in range(4)]
    for layer, whole in zip(student.model.layers, kept, strict=True):
        assert (layer.mlp.up_proj.weight == whole.mlp.up_proj.weight).all()
    made = [json.loads(line) for line in (tmp_path / "work/train.jsonl").read_text().splitlines()]
    texts = [row["messages"][1]["content"] for row in made]
    a, c = NOUNS[0], NOUNS[2]
    assert texts[:2] == [f"{a} {a} cat . {a} sees {a} .", f"{a} {c} cat . {c} sees {a} ."]
    assert len(texts) == 5
    for row in made:
        ids = chat_tokenizer(MARKED).apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
        assert len(ids) <= 24


def test_a_start_that_is_not_good_enough_is_refused(given, monkeypatch):
    monkeypatch.setattr(
        study, "measured", lambda model, name, *_: {"metrics": {"rougeL": 10 if name == "start" else 20}}
    )
    with pytest.raises(SystemExit, match=r"a ROUGE-L of 10.0 on the dev set, below 12.0, 60% of the teacher's"):
        study.main(given)


def test_the_table_of_the_page_is_that_of_the_results():
    if not study.RESULTS.exists():
        pytest.skip("no results yet")
    shown = study.PAGE.read_text().partition(study.BEGIN)[2].partition(study.END)[0]
    assert shown.strip() == study.drawn(json.loads(study.RESULTS.read_text()))
