"""The card of a trained model, read back by a renderer of Markdown."""

import html
import json
import re
import shutil

from markdown_it import MarkdownIt

from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.text.tokens import visible
from ketchup_cache.training.learn import learn
from ketchup_cache.training.pretrain import pretrain
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails
from tests.helpers.learning import config, run
from tests.helpers.models import write_prompts

HOSTILE = "<img src=x onerror=alert(1)> | `a` **b** [c](d) https:evil www.evil.org $x$ \u202e\x1b[31m ~~e~~"


def rows(folder):
    """Of the tables: what → all values."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    _, front, body = text.split("---\n", 2)
    assert front.splitlines()[0] == "library_name: transformers"
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(body)
    assert not re.search("<(?!/?(h1|h2|p|table|thead|tbody|tr|th|td|code)>)", rendered)
    cells = [re.findall("<td>(.*?)</td>", row) for row in rendered.split("<tr>")]
    found = {}
    for what, value in (pair for pair in cells if len(pair) == 2):
        found.setdefault(html.unescape(what), []).append(html.unescape(value))
    return found


def test_a_card_says_where_the_model_comes_from(tmp_path, folders):
    made, student = make_cache(tmp_path / "cache", *folders), tmp_path / HOSTILE
    shutil.copytree(folders[0], student)
    dev = {"eval_data": str(write_prompts(tmp_path / "dev.jsonl", 4)), "eval_every": 1, "metric": "chrf,exact"}
    learn(given := config(tmp_path, folders, student=str(student), lr=1e-9, max_new_tokens=5, **dev))
    last, best, teacher = rows(given.out / "last"), rows(given.out / "best"), made.teachers()[0]
    fingerprint = weights_fingerprint(folders[0])
    assert last["trained from"] == best["trained from"] == [f"{visible(str(student))} ({fingerprint})"]
    assert last["teacher"][0] == f"{teacher.name} ({teacher.fingerprint})"
    assert last["after"] == ["3 of 3 optimizer steps"]
    assert last["prompts"][0].startswith("made up (")
    assert all(id_[:12] in last["cache"][0] for id_ in made.segment_ids())
    assert best["chrf_signature"][0].startswith("nrefs:1|")
    assert f"chrf on {tmp_path / 'dev.jsonl'}" in best
    assert (last["k"], last["student"], last["method"]) == (["4"], [visible(str(student))], ["ketchup"])
    assert "torch " in last["made by"][0]


def test_a_pretrained_model_has_one_too(tmp_path, folders):
    data = write_prompts(tmp_path / "d.jsonl", 4)
    pretrain(PretrainConfig(model=str(folders[0]), data=str(data), out=tmp_path / "run", epochs=1, device="cpu"))
    assert rows(tmp_path / "run" / "last")["references"][0].startswith(f"{data} (")


def test_evaluations_go_into_the_card_each_data_once(tmp_path, folders, capsys):
    make_cache(tmp_path / "cache", *folders)
    learn(given := config(tmp_path, folders, max_new_tokens=5))
    best, before = given.out / "last", rows(given.out / "last")
    files = [write_prompts(tmp_path / name, 4, seed=seed) for seed, name in enumerate(("t.jsonl", "`x` <b> u.jsonl"))]
    wanted = []
    for file, metric in ((files[0], "bleu"), (files[1], "chrf"), (files[0], "chrf")):
        words = ("--model", best, "--data", file, "--metrics", metric, "--max-new-tokens", 5, "--device", "cpu")
        run("evaluate", *words, "--card", "--json")
        wanted.append(json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"])
    found = rows(best)
    assert {name: found[name] for name in before} == before
    assert found["chrf"] == [f"{one['chrf']:.4f}" for one in wanted[1:]]
    assert found["chrf_signature"][0].startswith("nrefs:1|")
    assert "bleu" not in found
    part = ("--model", best, "--data", files[0], "--card", "--shard", "1/2", "--device", "cpu")
    assert "--shard makes those of a part" in fails(capsys, "evaluate", *part)
    learn(given)  # the run is as it was
    assert fails(capsys, "evaluate", "--model", folders[0], "--data", files[0], "--card", "--device", "cpu").endswith(
        "has no README.md; give the folder of a trained model, as run/best"
    )
