"""`report`: the page in a browser. Its numbers are those of `k_step_returns`, it loads nothing, no text is markup."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache import k_step_returns
from ketchup_cache.cli import main
from ketchup_cache.report import page
from ketchup_cache.training.learn import learn
from ketchup_cache.training.records import sealed
from tests.helpers.browser import CHROMIUM, Page, data_of
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails
from tests.helpers.learning import config, metrics
from tests.helpers.models import VOCAB, write_prompts
from tests.helpers.oracle import row_logits

NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u202e\x1b[31m {{DATA}}"
ROWS = (
    "[...document.querySelectorAll('#tokens table tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
)

CROSSING = """[...document.querySelectorAll('#bias svg')].flatMap(figure => {
  const boxes = [...figure.querySelectorAll('.label')].map(label => label.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom));
}).length"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folders):
    """Two, of one cache."""
    base = tmp_path_factory.mktemp("page")
    made, data = make_cache(base / "cache", *folders, samples=3), write_prompts(base / "dev.jsonl", 8)
    for name, given in (("one", {"k": 1}), ("flat", {"weights": "flat", "lam": 0.5})):
        given |= {"eval_data": str(data), "eval_every": 1, "metric": "chrf", "max_new_tokens": 5, "batch_size": 6}
        learn(config(base, folders, out=base / name, **given))
    return made, base / "one", base / "flat"


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("html") / "runs.html"
    assert main(["report", *map(str, runs[1:]), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Opens pages one after another."""
    opened = []

    def show(path):
        opened.append(Page(path, tmp_path_factory.mktemp("profile")))
        return opened[-1]

    yield show
    for one in opened:
        one.close()


def test_the_page_in_the_docs_has_the_script_of_today():
    """`make demo-report` makes it anew; its data are of a machine that may be another."""
    made = Path(__file__).parents[2] / "docs/demo-report.html"
    assert page._html(data_of(made)) == made.read_bytes()


@NEEDED
def test_the_page_computes_what_k_step_returns_computes(written, runs, browser):
    shown, data, checked = browser(written), data_of(written), set()
    known = {(row.completion_tokens.tobytes(), row.prompt_tokens.tobytes()): row for row in runs[0].rows()}
    options = [
        {"k": 1}, {"k": 2}, {"k": 3, "normalization": "centred"}, {"k": 2, "tail": "jump", "normalization": "raw"},
        {"k": 2, "tail": "jump", "end_weight": 0.5}, {"k": 50, "normalization": "advantage", "unfinished": "zero"},
        {"weights": "flat", "lam": 0.3}, {"weights": "gae", "lam": 0.7, "unfinished": "drop"}, {"weights": "mean"},
        {"weights": "gae", "lam": 0.9, "end_weight": 0, "normalization": "centred"},
    ]  # fmt: skip
    start = {"k": 4, "weights": "comb", "lam": 0.25, "end_weight": None, "tail": "one-step"}
    start |= {"normalization": "logprob", "unfinished": "bootstrap"}
    seen = set()
    for i, how in enumerate(options * 2):
        number = (5 * i + 1) % len(data["rollouts"])
        shown.give("rollout", number)
        for key, value in (start | how).items():
            shown.give({"end_weight": "end"}.get(key, key), "" if value is None else value)
        ids = np.int32(data["rollouts"][number]["ids"])
        true = next(row for (tokens, _), row in known.items() if tokens == ids.tobytes())
        arrays = {
            name: np.asarray(getattr(true, name), np.float64)[None] for name in ("q", "max_q", "mean_q", "logsumexp")
        }
        more = {"lengths": [len(ids)], "finished": np.array([true.finished]), "final_max_q": [true.final_max_q]}
        expected = k_step_returns(**arrays, **more, **(start | how))[0]
        rows = shown.run(ROWS)
        assert [row[0] for row in rows] == data["rollouts"][number]["tokens"]
        np.testing.assert_allclose([float(row[4]) for row in rows], expected, rtol=2e-5, atol=2e-5, err_msg=str(how))
        np.testing.assert_allclose([float(row[1]) for row in rows], true.q, rtol=1e-5)
        checked.add(tuple(expected))
        seen.add(true.finished)
    assert len(checked) > len(options)  # a switch changes the numbers
    assert seen == {True, False}
    assert shown.complaints == []
    assert shown.loaded == [written.resolve().as_uri()]


@NEEDED
def test_a_student_gives_its_probabilities_and_the_ratios_that_training_takes(written, runs, browser, tmp_path):
    assert main(["report", str(runs[1]), "--student", "last", "--out", str(tmp_path / "r.html")]) == 0
    shown, rows = browser(tmp_path / "r.html"), data_of(tmp_path / "r.html")["rollouts"]
    model = AutoModelForSeq2SeqLM.from_pretrained(runs[1] / "last").eval()
    known = {row.completion_tokens.tobytes(): row for row in runs[0].rows()}
    facts = "[...document.querySelectorAll('#detail div')].map(div => div.innerText.split('\\n'))"
    ratios = []
    for number in (0, 7, 17):
        true = known[np.int32(rows[number]["ids"]).tobytes()]
        logits = row_logits(model, true.prompt_tokens, true.completion_tokens)[:, :VOCAB]
        expected = logits.log_softmax(1)[range(len(logits)), true.completion_tokens.astype(int)].detach().numpy()
        np.testing.assert_allclose(rows[number]["student_logprob"], expected, atol=2e-5)
        shown.give("rollout", number)
        told = dict(pair for pair in shown.run(facts) if len(pair) == 2)
        ratios.append(np.exp(expected[0] - true.behavior_logprob[0]))
        assert float(told["student's probability, last model"]) == pytest.approx(np.exp(expected[0]), rel=6e-3)
        assert float(told["importance ratio"].partition(" ")[0]) == pytest.approx(ratios[-1], rel=6e-3)
        assert ("(counts as 2)" in told["importance ratio"]) == (ratios[-1] > 2)
    assert len(set(ratios)) > 1
    plain = dict(pair for pair in browser(written).run(facts) if len(pair) == 2)
    assert plain["importance ratio"] == "see report --student"
    assert shown.complaints == []


def fits(shown, width, dark=False):
    """Whether the page does not scroll sideways with all that folds open, tables have boxes of their own, and no code
    breaks."""
    shown.look(width, dark)
    shown.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert shown.run(
        "document.querySelectorAll('table').length === document.querySelectorAll('.scroll > table').length"
    )
    assert shown.run(
        "[...document.querySelectorAll('.scroll')].every(b => b.getBoundingClientRect().right <= innerWidth)"
    )
    assert (
        shown.run("[...document.querySelectorAll('code')].map(code => code.getClientRects().length).join('')").strip(
            "1"
        )
        == ""
    )
    return shown.run("document.scrollingElement.scrollWidth <= innerWidth")


@NEEDED
def test_it_fits_in_both_themes_and_is_used_by_keyboard(written, browser):
    shown, papers = browser(written), set()
    for width in (1280, 400):
        for dark in (False, True):
            assert fits(shown, width, dark)
            assert shown.run(CROSSING) == 0
            papers.add(shown.run("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2
    shown.run("document.querySelector('.tokens [tabindex=\"0\"]').focus()")
    for key in ("End", "ArrowLeft", "ArrowRight"):
        shown.send("Input.dispatchKeyEvent", type="keyDown", key=key)
        at = shown.run("[...document.querySelectorAll('.tokens span')].indexOf(document.activeElement)")
        count = shown.run("document.querySelectorAll('.tokens span').length")
        assert at == count - 1 - (key == "ArrowLeft")
        assert f"{at + 1} of {count}" in shown.run("document.getElementById('detail').textContent")
    shown.run("document.querySelector('.charts svg').focus()")
    shown.send("Input.dispatchKeyEvent", type="keyDown", key="Home")
    first = data_of(written)["runs"][0]["curves"]["variance"][1][0]  # the first chart: the rollouts stay the same
    assert f"step 0: one {float(f'{first:.4g}'):g}" in shown.run(
        "document.querySelector('.charts figcaption').textContent"
    )
    gains = "[...document.querySelectorAll('.sample h3')].map(h => Number(h.textContent.match(/\\(([^)]*)\\)/)[1]))"
    assert (found := shown.run(gains)) == sorted(found, reverse=True)
    drawn = "[...document.querySelectorAll('#%s svg text')].map(text => text.textContent).join()"
    curves, bias = (shown.run(drawn % section) for section in ("curves", "bias"))
    shown.run("document.querySelector('#curves input').click()")  # without the first run, the axes fit the other
    assert shown.run("document.querySelectorAll('#curves figure .c0').length") == 0
    assert shown.run(drawn % "curves") != curves
    assert shown.run(drawn % "bias") == bias
    shown.run("document.querySelector('#curves input').click()")
    assert shown.run(drawn % "curves") == curves
    assert shown.complaints == []


@NEEDED
def test_every_point_of_bias_and_variance_is_in_the_table(written, browser):
    shown = browser(written)
    (policy,) = data_of(written)["bias"]
    rows = shown.run(
        "[...document.querySelectorAll('#bias tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )
    points = [("comb", f"K={p['k']}", p) for p in policy["by_k"]]
    points += [(p["weights"], f"λ={p['lam']:.3g}", p) for name in ("flat", "gae") for p in policy["by_weights"]
               if p["weights"] == name]  # fmt: skip
    assert len(points) > 8
    shown_as = [[f"{p[key]:.4g} ± {p[f'{key}_se']:.2g}" for key in ("bias", "variance")] for *_, p in points]
    assert [row[:2] for row in rows] == [[*names] for *names, _ in points]
    for row, texts in zip(rows, shown_as, strict=True):
        for cell, text in zip(row[2:], texts, strict=True):
            assert [float(part) for part in cell.split(" ± ")] == [float(part) for part in text.split(" ± ")]
    labels = shown.run("[...document.querySelectorAll('#bias .label')].map(label => label.textContent)")
    assert 0 < len(labels) <= len(points)
    assert {*labels} <= {row[1] for row in rows}


@NEEDED
def test_a_broken_run_leaves_the_frames_and_long_names_fit(written, browser, tmp_path):
    data = data_of(written)
    broken = data["runs"][0]["curves"]["variance"][1]
    broken[-1] *= 100
    data["runs"][0]["name"] = "n" * 120
    (tmp_path / "r.html").write_bytes(page._html(data))
    shown, height = browser(tmp_path / "r.html"), "document.querySelector('.charts .c1').getBBox().height"
    away = "[...document.querySelectorAll('.away')].map(one => one.textContent)"
    assert fits(shown, 400)
    assert fits(shown, 1280)
    assert shown.run(away) == ["Values outside the frame: " + "n" * 120]
    assert shown.run(height) > 20
    shown.run("document.getElementById('every').click()")
    assert shown.run(away) == []
    assert shown.run(height) < 2
    assert shown.complaints == []


@NEEDED
def test_nothing_of_a_text_is_markup(written, runs, browser, tmp_path):
    bad = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(runs[1], bad, symlinks=True)
    for name, keys in (("outputs-best", ("prompt", "output")), ("samples", ("prompt", "completion"))):
        rows = [json.loads(line) for line in (bad / f"{name}.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(row | dict.fromkeys(keys, HOSTILE)) + "\n" for row in rows)
        (bad / f"{name}.jsonl").write_text(text)
    assert main(["report", str(bad), "--out", str(tmp_path / "bad.html")]) == 0
    data = data_of(tmp_path / "bad.html")
    data["rollouts"][0] |= {"tokens": [HOSTILE] * len(data["rollouts"][0]["ids"]), "policy": HOSTILE, "prompt": HOSTILE}
    data["notes"].append(HOSTILE)
    (tmp_path / "worse.html").write_bytes(page._html(data))
    for name in ("bad.html", "worse.html"):
        raw = (tmp_path / name).read_text(encoding="utf-8")
        assert raw.count("</script>") == 2
        assert not [c for c in raw if c not in "\n" and not c.isprintable()]
        shown = browser(tmp_path / name)
        assert shown.run("document.querySelectorAll('img, script').length") == 2
        assert "<img src=x onerror=alert(1)><!--<script>⟨U+202E⟩⟨U+001B⟩[31m {{DATA}}" in shown.run(
            "document.body.innerText"
        )
        assert shown.complaints == []
        assert len(shown.loaded) == 1


def test_curves_are_thinned_to_means_and_five_long_runs_fit(runs, tmp_path):
    record = json.loads((runs[1] / "config.json").read_text())
    row = {"id": "0", "prompt": "p" * 4000, "output": "日" * 2000, "target": "t" * 4000, "finished": True}
    for i in range(5):
        (out := tmp_path / f"run{i}").mkdir()
        (out / "config.json").write_bytes(sealed({k: v for k, v in record.items() if k != "sha256_of_this"}))
        line = metrics(runs[1])[0]
        lines = (json.dumps(line | {"step": step, "entropy": step + i / 7}) for step in range(10_000))
        (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        for name in ("start", "best"):
            (out / f"outputs-{name}.jsonl").write_text((json.dumps(row) + "\n") * 200)
    words = [str(tmp_path / f"run{i}") for i in range(5)]
    assert main(["report", *words, "--out", str(tmp_path / "r.html")]) == 0
    data = data_of(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size <= 5_000_000
    assert len(data["samples"]) == 500
    x, y = data["runs"][3]["curves"]["entropy"]
    assert len(x) == 500
    assert x[7] == pytest.approx(np.mean(range(140, 160)))
    assert y[7] == pytest.approx(np.mean(range(140, 160)) + 3 / 7, rel=1e-4)
    assert data["notes"][0].startswith("run0 has no token view (")


def test_what_is_no_run_is_one_line(capsys, tmp_path, runs):
    assert "is no folder of a run" in fails(capsys, "report", tmp_path, "--out", tmp_path / "r.html")
    (tmp_path / "config.json").write_bytes(sealed({"options": {}, "resolved": {}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": []}\n[1]\n')
    assert "is no folder of a run" in fails(capsys, "report", tmp_path, "--out", tmp_path / "r.html")
    assert "RUNS is missing" in fails(capsys, "report", "--out", tmp_path / "r.html")


def test_a_sample_shows_all_of_its_references(tmp_path):
    rows = [{"id": "1", "prompt": "p", "output": "a", "targets": ["a b", "c"], "target": "a b"}]
    for name in ("start", "best"):
        (tmp_path / f"outputs-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, (sample,) = page._samples(tmp_path, {"metric": ("chrf",)}, 5)
    assert sample["reference"] == "a b\nc"


@NEEDED
def test_the_page_says_which_is_best_by_how_much_and_what_alarms_mean(written, browser, tmp_path):
    data = data_of(written)
    runs, line = data["runs"], {"length_mean": 9.0, "best": False, "variants": {}}
    runs[0]["name"], runs[1]["name"] = "one", "two"
    for run, values in zip(runs, ((20.0, 24.5, 22.0), (20.0, 20.0, 3.0)), strict=True):
        run["config"]["options"] |= {"metric": ["bleu"], "eval_data": "dev.jsonl"}
        steps = zip((0, 4, 8), values, strict=True)
        run["dev"] = [line | {"step": step, "metrics": {"bleu": value}} for step, value in steps]
        run["dev"][1 if values[1] > values[0] else 0]["best"] = True
    runs[1]["config"]["options"]["metric"] = ["chrf", "bleu"]  # they are compared by the one that both have
    for record in runs[1]["dev"]:
        record["metrics"] = {"chrf": 50.0, **record["metrics"]}
    runs[1]["alarms"] = [{"name": "length", "step": 4, "text": "it <b>went</b> from 9 to 2 tokens; lower --lr"}]
    (tmp_path / "r.html").write_bytes(page._html(data))
    shown = browser(tmp_path / "r.html")
    text = shown.run("document.getElementById('summary').innerText")
    assert "bleu 24.5 at step 4, 4.5 better than its start and 4.5 better than two" in text
    assert "Never better than their start: two." in text
    assert "two, length (step 4): it <b>went</b> from 9 to 2 tokens; lower --lr" in text
    assert shown.run("document.querySelectorAll('tr.best').length") == 1
    runs[0]["dev"][1]["metrics"]["bleu"] = 19.0
    (tmp_path / "r.html").write_bytes(page._html(data))
    shown = browser(tmp_path / "r.html")
    assert "No run is ever better on the dev set than its start." in shown.run("document.body.innerText")
    assert shown.run("document.querySelectorAll('tr.best').length") == 0


@NEEDED
def test_it_prints(written, browser):
    paper = base64.b64decode(browser(written).send("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", paper)) > 1
