"""Prompts from files: the same examples from every format, and one line for everything that is wrong with them."""

import csv
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, call

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ketchup_cache.config.options import DataOptions
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.text import prompts as prompts_module
from ketchup_cache.text.prompts import Example, tokenize_prompts, without_duplicates
from ketchup_cache.text.read import data_info, read_examples
from tests.helpers import gsm8k
from tests.helpers.errors import refuses
from tests.helpers.models import WORDS, make_tokenizer

TEXTS = [
    "the cat sees {two} dogs", "2020-01-01", "007", "NA", 'a "quoted, text"', "line one\nline two",
    "next\u2028line \x85 é 日本", "null", "1e5",
]  # fmt: skip
TARGETS = ["t1", "2020-01-02", "008", "NaN", "x,y", "a\nb", "ü", "None", "true"]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def options(data: object, **changes: object) -> DataOptions:
    return DataOptions(data=str(data), **changes)


def error_of(data: object, *, need_target: bool = False, **changes: object) -> str:
    return refuses(DataError, ".", read_examples, options(data, **changes), need_target=need_target)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv", "D.PARQUET"])
def test_every_format_gives_exactly_the_texts_in_it(tmp_path, name):
    folder = tmp_path / "run[1] *"  # the library would read these as a pattern
    folder.mkdir()
    rows = [{"prompt": p, "target": t, "n": i} for i, (p, t) in enumerate(zip(TEXTS, TARGETS, strict=True))]
    path, lines = folder / name, jsonl(folder / "d.jsonl", *rows)
    if name == "d.jsonl.gz":
        path.write_bytes(gzip.compress(lines.read_bytes()))
    elif name == "d.csv":
        with path.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened, lineterminator="\n").writerows([rows[0].keys(), *(row.values() for row in rows)])
    elif name == "D.PARQUET":
        pq.write_table(pa.Table.from_pylist(rows), path)
    examples = read_examples(options(path), need_target=True)
    assert [(e.prompt, e.target, e.row) for e in examples] == [*zip(TEXTS, TARGETS, range(1, 10), strict=True)]


def test_text_that_looks_like_something_else_stays_text_where_all_rows_do(tmp_path):
    """A column of dates or numbers alone is what type inference falls for."""
    for texts in (["2020-01-01", "2020-01-02 10:00"], ["007", "010"], ["true", "false"], ["NA"]):
        rows = [{"prompt": text, "target": text} for text in texts]
        (table := tmp_path / "d.csv").write_text("prompt,target\n" + "".join(f"{t},{t}\n" for t in texts))
        for path in (jsonl(tmp_path / "d.jsonl", *rows), table):
            examples = read_examples(options(path), need_target=True)
            assert [(e.prompt, e.target) for e in examples] == [(t, t) for t in texts]


def test_ids_are_hashes_of_the_rendered_prompt(tmp_path):
    (example,) = read_examples(options(jsonl(tmp_path / "d.jsonl", {"prompt": "é cat"}), template="say: {prompt}!"))
    assert (example.id, example.target) == (hashlib.sha256("say: é cat!".encode()).digest()[:16], None)


def test_limit_blank_lines_and_bom(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"prompt": "a"}\r\n\r\n  \r\n{"prompt": "b"}\r\n{"prompt": "c"}\r\n{"prompt": ')
    assert [(e.prompt, e.row) for e in read_examples(options(path, limit=2))] == [("a", 2), ("b", 5)]
    assert [(e.prompt, e.row) for e in read_examples(options(path, skip=1, limit=1))] == [("b", 5)]
    assert "line 7: not valid JSON" in error_of(path)
    assert "holds no rows after the first 9" in error_of(jsonl(path, {"prompt": "a"}), skip=9)


def test_a_changed_file_is_seen_and_nothing_is_left_behind(tmp_path):
    """In a process of its own, because the library reads its cache folder's name at import."""
    program = (
        "import sys, json, tempfile; from pathlib import Path\n"
        "from ketchup_cache.errors import DataError\n"
        "from ketchup_cache.text.read import read_examples; from ketchup_cache.config.options import DataOptions\n"
        "for text in ('one', 'two'):\n"  # same length, and within the resolution of a time stamp
        "    for name, content in (('d.jsonl', json.dumps({'prompt': text})), ('d.csv', 'prompt\\n' + text + '\\n')):\n"
        "        Path(name).write_text(content)\n"
        "        assert [e.prompt for e in read_examples(DataOptions(data=name))] == [text]\n"
        "Path('bad.csv').write_text('prompt\\na\\nb,c\\n')\n"
        "try: read_examples(DataOptions(data='bad.csv'))\n"
        "except DataError: pass\n"  # which the library also logs
    )
    (work := tmp_path / "work").mkdir()
    (home := tmp_path / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    done = subprocess.run([sys.executable, "-c", program], cwd=work, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p for p in home.rglob("*") if p.is_file()] == []


# ------------------------------------------------------------------------------------------------------- template


def test_template_takes_other_columns_and_leaves_braces_in_the_data_alone(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", {"question": "{hint} {prompt} {{", "hint": "{question}", "prompt": "not this"})
    (example,) = read_examples(options(path, prompt_field="question", template="{{Q}}: {prompt} [{hint}] {prompt}"))
    assert example.prompt == "{Q}: {hint} {prompt} {{ [{question}] {hint} {prompt} {{"


@pytest.mark.parametrize(
    "template", ["no field", "{{prompt}}", "{prompt} {", "{prompt} }", "{prompt} {}", "{prompt!r}", "{prompt:>9}"]
)
def test_bad_template(tmp_path, template):
    with pytest.raises(ConfigError) as caught:
        read_examples(options(jsonl(tmp_path / "d.jsonl", {"prompt": "a"}), template=template))
    (problem,) = caught.value.problems
    assert problem.startswith("--template")


def test_template_with_a_column_that_is_not_there(tmp_path):
    message = error_of(path := jsonl(tmp_path / "d.jsonl", {"prompt": "a", "x": "b"}), template="{prompt}{y}")
    assert message == f"{path}: line 1: no field 'y'; it has 'prompt', 'x': set --template"


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a"', "not valid JSON (Expecting ',' delimiter, column 15)"),
        ('{"prompt": "a"}}', "not valid JSON (Extra data, column 16)"), ("[" * 99999, "not readable as JSON"),
        ('{"prompt": ' + "1" * 9999 + "}", "not readable as JSON"), ('["a"]', "not a JSON object"),
        ('{"text": "a", "n": 1}', "no field 'prompt'; it has 'text', 'n': set --prompt-field"),
        ("{}", "no field 'prompt'; it has none"), ('{"prompt": null}', "'prompt' is null"),
        ('{"prompt": 5.5}', "'prompt' is of type float, not text"),
        ('{"prompt": ["a"]}', "message 1 has no role"), ('{"prompt": " \\n\\t"}', "'prompt' is blank"),
        ('{"prompt": "a \\ud800"}', "'prompt' holds half a character"),
    ],
)  # fmt: skip
def test_bad_line(tmp_path, row, message):
    (path := tmp_path / "d.jsonl").write_text('{"prompt": "fine"}\n' + row + '\n{"prompt": "fine"}\n')
    assert error_of(path).startswith(f"{path}: line 2: {message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [({}, "no field 'target'"), ({"target": None}, "'target' is null"), ({"target": " "}, "'target' is blank")],
)
def test_missing_target_matters_only_where_it_is_needed(tmp_path, row, message):
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "a", "target": "b"}, {"prompt": "c"} | row)
    assert [e.target for e in read_examples(options(path))] == ["b", None]
    assert error_of(path, need_target=True).startswith(f"{path}: line 2: {message}")


def parquet(prompts: object) -> bytes:
    pq.write_table(pa.table({"prompt": prompts}), file := pa.BufferOutputStream())
    return file.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", ": is empty"), ("d.jsonl", b"\n \n", ": holds no rows"),
        ("d.csv", b"prompt,target\n", ": holds no rows"),
        ("d.csv", b"\n\n", ": can't be read (No columns to parse from file)"),
        ("d.csv", b"prompt,target\na,b,c\n", ": rows have more cells than the header names"),
        ("d.csv", b"prompt,target\na,b\na,b,c\n", ": can't be read (Error tokenizing data. C error: Expected 2 fields"),
        ("d.csv", b"prompt,target\na,b\n,x\n", ": row 2: 'prompt' is blank"),
        ("d.csv", b"text,target\na,b\n", ": row 1: no field 'prompt'; it has 'text', 'target'"),
        ("d.csv", b'prompt\n"a\n', ": can't be read ("),
        ("d.jsonl", b'{"prompt": "\xff"}\n', ": can't be read ('utf-8' codec can't decode byte 0xff"),
        ("d.csv", b"prompt\n\xff\n", ": can't be read ('utf-8' codec can't decode byte 0xff"),
        ("d.jsonl.gz", b"not gzip", ": can't be read (Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], ": can't be read (Compressed file"),
        ("d.parquet", b"not parquet at all", ": can't be read ("),
        ("d.parquet", parquet(pa.array([], pa.string())), ": holds no rows"),
        ("d.parquet", parquet(["a", None]), ": row 2: 'prompt' is null"),
        ("d.parquet", parquet([1.5, 2.5]), ": row 1: 'prompt' is of type float, not text"),
        ("d.txt", b"a\n", ": unknown kind of file; give a .jsonl, .jsonl.gz, .json, .csv or .parquet file"),
    ],
)  # fmt: skip
def test_bad_file(tmp_path, name, content, message):
    (path := tmp_path / name).write_bytes(content)
    verbosity = datasets.logging.get_verbosity()
    with pytest.raises(DataError) as caught:  # held: its traceback keeps alive what was not closed
        read_examples(options(path))
    assert str(caught.value).startswith(f"{path}{message}")
    assert datasets.logging.get_verbosity() == verbosity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"{name}: no such file") for name in ("missing.jsonl", "data/train.txt", "/no/b/c")),
        ("squad", "squad: no such file (a Hugging Face dataset is named owner/name)"),
        ("x" * 999, "x" * 999 + ": no such file (a Hugging Face dataset is named owner/name)"),
        ("folder", "folder: is a folder; give a .jsonl, .jsonl.gz, .json, .csv or .parquet file"),
        ("https://user:SECRET@host/d.jsonl",
         "https://host/d.jsonl: addresses are not read; download the file and give its path"),
    ],
)  # fmt: skip
def test_names_that_are_no_file(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert error_of(name) == message


def test_hub_dataset(monkeypatch):
    """The Hub itself is not asked: what is asked of the library, and what becomes of its answer and its errors."""
    asked = Mock(return_value=[{"prompt": "a"}, {"prompt": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", asked)
    hub = options("owner/name-1.5:en-nl", split="validation", limit=1)
    examples = read_examples(hub)
    assert [e.prompt for e in examples] == ["a"]
    read_examples(options("owner/name"))
    calls = [call("owner/name-1.5", "en-nl", split="validation"), call("owner/name", None, split="train")]
    assert asked.call_args_list == calls
    assert data_info(examples, hub, make_tokenizer()).name == "owner/name-1.5:en-nl [validation]"

    asked.side_effect = ConnectionError("Couldn't reach 'owner/name' on the Hub\nmany more lines")
    assert error_of("owner/name", split="dev") == (
        "owner/name: no such file, and the Hugging Face Hub does not give split 'dev' of such a dataset "
        "(Couldn't reach 'owner/name' on the Hub many more lines)"
    )


# ----------------------------------------------------------------------------------------- duplicates, fingerprint


def of(*texts: str) -> list[Example]:
    return [Example(text, None, row) for row, text in enumerate(texts, start=1)]


def test_duplicates_first_wins():
    one, *others = of("a", "b", "a", "b", "c")
    with_targets = [replace(one, target="1"), others[0], replace(others[1], target="2"), *others[2:]]
    assert without_duplicates(with_targets) == [replace(one, target="1"), *of("b", "c")]


def test_data_fingerprint_is_of_the_texts_in_order(tmp_path):
    def fingerprint(*texts: str) -> str:
        return data_info(of(*texts), options("d.jsonl"), make_tokenizer()).fingerprint

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    different = (("ab", "c"), ("c", "ab"), ("a", "bc"), ("abc",), ("ab", "c", ""))
    assert len({fingerprint(*texts) for texts in different}) == 5
    rendered = options(jsonl(tmp_path / "d.jsonl", {"q": "a"}), prompt_field="q", template="x {prompt}")
    info = data_info(read_examples(rendered), rendered, make_tokenizer())
    assert (info.fingerprint, info.name, info.template) == (fingerprint("x a"), rendered.data, "x {prompt}")


# ------------------------------------------------------------------------------------------------------- tokens

ID = {word: i for i, word in reversed(list(enumerate(["<pad>", "</s>", "<unk>", *WORDS])))}


def tokens_of(examples, *, tokenizer=None, **changes: object) -> list[list[int]]:
    """That all examples are kept, and the token ids of each."""
    kept = tokenize_prompts(examples, tokenizer or make_tokenizer(), options("d.jsonl", **changes))
    prompts = kept.prompts
    assert kept.examples == examples
    assert prompts.tokens.values.dtype == np.int32
    assert [row.tobytes() for row in prompts.ids] == [e.id for e in examples]
    return [row.tolist() for row in prompts.tokens]


def ids(*texts: str) -> list[list[int]]:
    return [[ID[word] for word in text.split()] for text in texts]


def test_tokens_are_those_of_the_tokenizer_with_eos():
    assert tokens_of(of("the cat", "zzz dog", "bird")) == ids("the cat </s>", "<unk> dog </s>", "bird </s>")


LONG = of("the cat", "the cat sees two dogs", "a cat sees")


def test_long_prompt_refused():
    hint = "raise --max-prompt-tokens, or set --long-prompts to truncate or drop"
    with pytest.raises(DataError, match=f"^d.jsonl: row 2: the prompt has 6 tokens, more than 4: {hint}$"):
        tokens_of(LONG, max_prompt_tokens=4)
    assert len(tokens_of(LONG, max_prompt_tokens=6)) == 3


def test_long_prompt_truncated_keeps_eos():
    cut = {"max_prompt_tokens": 4, "long_prompts": "truncate"}
    assert tokens_of(LONG, **cut) == ids("the cat </s>", "the cat sees </s>", "a cat sees </s>")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # one that adds no EOS
    assert tokens_of(LONG[1:2], tokenizer=tokenizer, **cut | {"max_prompt_tokens": 3}) == ids("the cat sees")


def test_what_is_cut_is_the_longest_text_of_the_data(tmp_path, capsys):
    """The template stays, with a cue at its end, and how many were cut is said."""
    long, short = ("the cat sees two dogs", "a bird"), ("the cat", "a dog")
    rows = [long, ("the cat", "a bird sees the two dogs"), short]
    data = jsonl(tmp_path / "d.jsonl", *({"prompt": p, "more": m} for p, m in rows))
    given = options(data, template="two {more} sees {prompt} dog", max_prompt_tokens=8, long_prompts="truncate")
    kept = tokenize_prompts(read_examples(given), make_tokenizer(), given)
    expected = ids(
        "two a bird sees the cat dog </s>", "two a bird sees the cat dog </s>", "two a dog sees the cat dog </s>"
    )
    assert [row.tolist() for row in kept.prompts.tokens] == expected
    assert kept.cut == 2
    assert "2 of 3 prompts have more than 8 tokens and are cut (--max-prompt-tokens, --long-" in capsys.readouterr().err
    given = given.model_copy(update={"max_prompt_tokens": 4})
    with pytest.raises(
        DataError, match=r"row 1: the template alone takes more than 4 tokens: raise --max-prompt-tokens"
    ):
        tokenize_prompts(read_examples(given), make_tokenizer(), given)


def test_references_in_a_column_that_is_not_there_or_is_no_text(tmp_path):
    """A number is an answer. What can be written in several ways is refused. A nearly right name is asked about."""
    rows = jsonl(tmp_path / "n.jsonl", {"prompt": "the cat", "target": 42}, {"prompt": "a dog", "target": -7})
    assert [e.target for e in read_examples(options(rows))] == ["42", "-7"]
    for value, kind in ((4.5, "float"), ([1.5], "float"), (True, "bool")):
        with pytest.raises(DataError, match=f"line 1: 'target' is of type {kind}, not text"):
            read_examples(options(jsonl(tmp_path / "b.jsonl", {"prompt": "the cat", "target": value})))
    named = jsonl(tmp_path / "t.jsonl", {"prompt": "the cat", "targets": "a dog"})
    with pytest.raises(DataError, match=r"no field 'target': did you mean 'targets'\? set --target-field"):
        read_examples(options(named))
    asked = jsonl(tmp_path / "q.jsonl", {"text": "the cat", "id": 0})  # the prompts are not what is nearly `target`
    for more in ({}, {"target_field": ""}):
        (example,) = read_examples(options(asked, prompt_field="text", **more))
        assert (example.prompt, example.target) == ("the cat", None)
    bare = jsonl(tmp_path / "p.jsonl", {"prompt": "the cat", "x": "a dog"})
    assert [e.target for e in read_examples(options(bare))] == [None]
    with pytest.raises(DataError, match="no field 'answer': it has 'prompt', 'x'; set --target-field"):
        read_examples(options(bare, target_field="answer"))


def test_long_prompt_dropped(capsys):
    dropping = options("d.jsonl", max_prompt_tokens=4, long_prompts="drop")
    repeated = [*LONG, LONG[1], LONG[0]]
    found = tokenize_prompts(repeated, make_tokenizer(), dropping)
    assert (found.examples, found.cut) == ([LONG[0], LONG[2], LONG[0]], 0)
    assert [row.tobytes() for row in found.prompts.ids] == [e.id for e in found.examples]
    assert "d.jsonl: 2 of 5 prompts have more than 4 tokens and are left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="no prompt left: all 3 have more than 2 tokens"):
        tokenize_prompts(LONG, make_tokenizer(), dropping.model_copy(update={"max_prompt_tokens": 2}))


def test_more_prompts_than_are_tokenised_at_once(monkeypatch):
    monkeypatch.setattr(prompts_module, "TOKENIZE_AT_ONCE", 2)
    assert tokens_of(of(*WORDS[:7])) == ids(*(f"{word} </s>" for word in WORDS[:7]))


def test_dotted_names_read_parts_of_a_column(tmp_path):
    """As Europarl's `translation: {en, nl}`; a column that has the dotted name itself comes first."""
    pairs = [("yes", "ja"), ("no", "nee")]
    file = jsonl(tmp_path / "pairs.jsonl", *({"translation": {"en": en, "nl": nl}} for en, nl in pairs))
    columns = {"prompt_field": "translation.en", "target_field": "translation.nl"}
    assert [(e.prompt, e.target) for e in read_examples(options(file, **columns))] == pairs
    assert "line 1: no field 'translation.fr'" in error_of(file, prompt_field="translation.fr")
    jsonl(file, {"a.b": "flat", "a": {"b": "deep"}})
    assert read_examples(options(file, prompt_field="a.b"))[0].prompt == "flat"


# -------------------------------------------------- the paper's third task, where a copy lies beside the repository

PINNED_IDS = "900990d9a7f18f3381733fee5221d92e0d2019ec5cd428f7d2d2017f3378bf21"


def of_gsm8k(split: str, **changes: object) -> DataOptions:
    return options(gsm8k.FOLDER / f"{split}.jsonl", prompt_field="question", target_field="answer", **changes)


@gsm8k.NEEDED
@pytest.mark.parametrize(("split", "rows"), [("test", 1319), ("train", 7473)])
def test_question_by_question(split, rows):
    examples, lines = read_examples(of_gsm8k(split), need_target=True), gsm8k.rows(split)
    assert len(examples) == rows
    assert [(e.prompt, e.target) for e in examples] == [(line["question"], line["answer"]) for line in lines]
    assert [e.id for e in examples] == [hashlib.sha256(line["question"].encode()).digest()[:16] for line in lines]
    assert all(re.search(r"#### -?[\d,.]+$", e.target) for e in examples)


@gsm8k.NEEDED
def test_ids_are_stable():
    """Pinned: rollouts in existing caches are found again by these."""
    plain, rendered = read_examples(of_gsm8k("test")), read_examples(of_gsm8k("test", template="Q: {prompt}\nA:"))
    assert len(without_duplicates(plain)) == len(without_duplicates(rendered)) == 1319
    assert rendered[0].id == hashlib.sha256(f"Q: {plain[0].prompt}\nA:".encode()).digest()[:16]
    assert hashlib.sha256(b"".join(e.id for e in plain)).hexdigest() == PINNED_IDS
