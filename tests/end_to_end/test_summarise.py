"""The summarisation task: what its script makes, what its summaries say, and that its splits are apart."""

from __future__ import annotations

import json
import re

import pytest

from ketchup_cache.config.commands import EvaluateConfig
from ketchup_cache.report.evaluate import evaluate
from ketchup_cache.shipped import task

TASK = task("summarise")
SPLITS = ("train", "prompts", "dev", "test")
RANK = "rescued stole broke found built sold painted cleaned".split()
"""Past tenses, the most newsworthy first."""
SAYS = {
    "rescued": "save rescue rescued", "stole": "steal take stolen", "broke": "break destroy broken",
    "found": "find discover found", "built": "build make built", "sold": "sell trade sold",
    "painted": "paint colour painted", "cleaned": "clean wash cleaned",
}  # fmt: skip


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / f"{name}.jsonl").read_text().splitlines()]


def content(document: str) -> tuple[set[str], set[str], str, str]:
    """What a summary has to say, read off the report by other means than the script's: trades of the actor and
    the helper, verbs that may be used, the things, the place."""
    trade: dict[str, str] = {}
    sentences, last = [], ""
    for text in document.removesuffix(" .").split(" . "):
        words = text.split()
        if words[0] == "the":
            trade[words[2]] = words[1]
            words = words[2:]
        name = last if words[0] in ("she", "he") else words[0]
        last = name
        sentences.append((name, words[1:]))
    main = min((i for i, (_, w) in enumerate(sentences) if w[0] in RANK), key=lambda i: RANK.index(sentences[i][1][0]))
    actor, words = sentences[main]
    people = {trade[actor]}
    if main + 1 < len(sentences) and sentences[main + 1][1][0] == "helped":
        people.add(trade[sentences[main + 1][0]])
    place = re.search(r" in the (\w+) ", document)
    assert place
    return people, set(SAYS[words[0]].split()), " ".join(words[1:3]), place.group(1)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_summaries_say_who_did_the_most_newsworthy_thing_and_where(split):
    for row in rows(split)[:2000]:
        people, verbs, what, place = content(row["prompt"])
        words = row["target"].split()
        stems = {form for word in words for form in (word, word.removesuffix("s"), word.removesuffix("es"))}
        assert people <= set(words), row
        assert verbs & stems, row
        assert what in row["target"], row
        assert f"in {place}" in row["target"], row
        assert ("and" in words) == (len(people) == 2), row


def test_summaries_need_selection_aggregation_and_more_than_copying():
    """The main event is often not the first, there is often a helper, and every wording occurs."""
    found = rows("dev")
    first = sum(RANK.index(row["prompt"].split()[3]) == min(
        RANK.index(word) for word in row["prompt"].split() if word in RANK) for row in found)  # fmt: skip
    share = {
        "first": first,
        "helper": sum(" and " in row["target"] for row in found),
        "passive": sum(" by " in row["target"] for row in found),
        "pronoun": sum(" . she " in row["prompt"] or " . he " in row["prompt"] for row in found),
        "place first": sum(row["target"].startswith("in ") for row in found),
    }
    bounds = {"first": (0.3, 0.6), "helper": (0.1, 0.4), "pronoun": (0.3, 0.6)}
    bounds |= {"passive": (0.13, 0.27), "place first": (0.13, 0.27)}
    for name, (low, high) in bounds.items():
        assert low <= share[name] / len(found) <= high, (name, share[name])


def test_tokens_are_words_and_lengths_are_within_the_limits():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TASK / "tokenizer")
    assert len(tokenizer) <= 130
    for split in SPLITS:
        for row in rows(split):
            for key, limit in (("prompt", 60), ("target", 16)):
                if key in row:
                    ids = tokenizer(row[key]).input_ids
                    assert tokenizer.unk_token_id not in ids, row
                    assert len(ids) == len(row[key].split()) + 1 <= limit, row


def test_teacher_is_good_and_the_student_has_something_to_learn():
    """Exact match has a ceiling of about 42 %: the likelier verb (70 %) and form (60 %), both drawn at random."""
    scores = {
        model: evaluate(
            EvaluateConfig(model=str(TASK / model), data=str(TASK / "dev.jsonl"), metrics="rouge,exact",
                           max_new_tokens=24, rollout_batch=200, device="cpu")
        )
        for model in ("teacher", "predistilled")
    }  # fmt: skip
    teacher, student = scores["teacher"], scores["predistilled"]
    assert teacher.metrics["exact"] >= 37
    assert teacher.metrics["rougeL"] - 22 <= student.metrics["rougeL"] <= teacher.metrics["rougeL"] - 14
    assert student.finished > 0.99


def test_one_recipe_of_the_student():
    """The script, the folder's page and the paper's runs, which make students of other lengths by it, say the same."""
    from benchmarks.paper.runs import words_of
    from benchmarks.paper.settings import TASKS
    from ketchup_cache.data.summarise import make_task

    words = make_task.PRETRAIN.split()
    said = dict(zip(words[::2], words[1::2], strict=True))
    run = list(words_of(TASKS["summarise"].pretrain))
    assert {name: said[name] for name in run[::2] if name != "--lr"} == {
        name: value for name, value in zip(run[::2], run[1::2], strict=True) if name != "--lr"
    }
    assert float(said["--lr"]) == TASKS["summarise"].pretrain["lr"]
    assert set(said) == set(run[::2])
    page = " ".join((TASK / "README.md").read_text().replace("\\\n", " ").split())
    assert make_task.PRETRAIN in page
    for option in make_task.ROLLOUT.split("--")[1:]:
        assert f"--{option.strip()}" in page


def test_teacher_says_what_happened():
    """Whatever the wording: people, event, things and place, on reports that it has not seen."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(TASK / "teacher"),
        AutoTokenizer.from_pretrained(TASK / "teacher"),
    )
    found = rows("test")[:200]
    inputs = tokenizer([row["prompt"] for row in found], padding=True, return_tensors="pt")
    texts = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=24), skip_special_tokens=True)
    right = 0
    for text, row in zip(texts, found, strict=True):
        people, verbs, what, place = content(row["prompt"])
        stems = {form for word in text.split() for form in (word, word.removesuffix("s"), word.removesuffix("es"))}
        right += people <= set(text.split()) and bool(verbs & stems) and what in text and f"in {place}" in text
    assert right >= 0.95 * len(found)
