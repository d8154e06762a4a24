"""The judge against a scripted server that speaks the protocol."""

import itertools
import json
import re
import socket
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from examples.judge import JudgeConfig, JudgeError, judge, main, queries, verdict, wilson
from ketchup_cache.errors import ConfigError, DataError
from tests.helpers.errors import refuses

pytest.importorskip("openai")
SECRET = "sk-very-secret"


class Handler(BaseHTTPRequestHandler):
    """`server.reply(text, n)` answers the n-th request with a text, or (status, headers, body), or None to hang up."""

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["content-length"]))), self.server
        text = body["messages"][0]["content"]
        with server.lock:
            server.texts.append(text)
            server.keys.add(self.headers["authorization"])
            number = len(server.texts)
        found = server.reply(text, number)
        if found is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(found, str):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": found}}
            reply = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
            found = 200, {"content-type": "application/json"}, json.dumps(reply)
        self.send_response(found[0])
        for name, value in found[1].items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(found[2].encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts servers with a `reply` (`Handler`) at their `url`, which keep the `texts` of requests and their `keys`."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with ExitStack() as stack:

        def start(reply):
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            stack.callback(server.shutdown)
            server.reply, server.texts, server.keys, server.lock = reply, [], set(), threading.Lock()
            server.url = f"http://127.0.0.1:{server.server_port}/v1"
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return server

        yield start


@pytest.fixture
def config(tmp_path):
    def make(server, ours=6, theirs=None, **options):
        """ours, theirs: outputs; a number stands for so many good ones."""
        ours = [f"good {i}" for i in range(ours)] if isinstance(ours, int) else ours
        theirs = theirs or [f"poor {i}" for i in range(len(ours))]
        for name, outputs in (("ours", ours), ("theirs", theirs)):
            rows = [{"id": "0", "prompt": f"text {i}", "output": o, "target": None} for i, o in enumerate(outputs)]
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"answers": tmp_path / "answers.jsonl", "retries": 2, "timeout": 20, "base_url": server.url} | options
        return JudgeConfig(system=tmp_path / "ours", baseline=tmp_path / "theirs", judge_model="m", **options)

    return make


def prefers(word):
    """A fair judge: finds the letter of the candidate that holds the word."""

    def reply(text, number):
        (letter,) = re.findall(rf"\[([AB])\]\n{word}", text)
        return f"One is better than A or B.\nPreferred: {letter}"

    return reply


FAIR = prefers("good")


def test_a_fair_judge_and_the_four_queries(serve, config):
    server = serve(FAIR)
    result = judge(config(server))
    assert [(a.win_rate, a.won, a.tied, a.lost, a.unreadable) for a in result.aspects] == [(100.0, 6, 0, 0, 0)] * 3
    assert (result.asked, result.cached, len(server.texts)) == (6 * 3 * 4, 0, 72)
    shown = Counter(tuple(re.findall(r"\[([AB])\]\n(good|poor) 0", text)) for text in server.texts)
    orders = {(("A", "good"), ("B", "poor")), (("B", "poor"), ("A", "good"))}
    orders |= {(("B", "good"), ("A", "poor")), (("A", "poor"), ("B", "good"))}
    assert {key: n for key, n in shown.items() if key} == dict.fromkeys(orders, 3)
    assert server.keys == {f"Bearer {SECRET}"}
    assert judge(config(serve(prefers("poor")), judge_tokens=99)).aspects[0].win_rate == 0


@pytest.mark.parametrize("taste", ["A", "B", "first", "last"])
def test_a_taste_for_a_letter_or_a_place_gives_exactly_one_half(serve, config, taste):
    def reply(text, number):
        letters = re.findall(r"\[([AB])\]", text)
        return f"Preferred: {taste if taste in 'AB' else letters[0 if taste == 'first' else 1]}"

    for aspect in judge(config(serve(reply))).aspects:
        assert (aspect.win_rate, aspect.tied) == (50.0, 6)
        assert (aspect.low, aspect.high) == tuple(100 * x for x in wilson(0.5, 6))


def test_a_rerun_costs_nothing_and_a_killed_run_goes_on(serve, config):
    server = serve(FAIR)
    first = config(server)
    judge(first)
    lines = first.answers.read_bytes().splitlines(keepends=True)
    again = judge(first)
    assert (again.asked, again.cached, len(server.texts)) == (0, 72, 72)
    first.answers.write_bytes(b"".join(lines[:40]) + lines[40][:30])  # killed while it wrote a line
    rest = judge(first)
    assert (rest.asked, rest.cached) == (32, 40)
    assert judge(first).asked == 0
    assert judge(replace(first, judge_model="other")).asked == 72
    assert judge(replace(first, judge_temperature=0.5)).asked == 72
    assert SECRET not in first.answers.read_text()


def test_busy_broken_and_cut_connections_are_tried_again(serve, config):
    bad = {1: (429, {"retry-after": "0"}, "{}"), 3: (500, {}, "oops"), 5: None}
    server = serve(lambda text, number: bad[number] if number in bad else FAIR(text, number))
    result = judge(config(server, ours=2, concurrency=1, aspects=["quality"]))
    assert result.aspects[0].win_rate == 100
    assert len(server.texts) == 8 + 3


FAILS = [((401, {}, json.dumps({"error": {"message": SECRET}})), "HTTP 401")]
FAILS += [((500, {}, ""), "HTTP 500"), (None, "no connection")]


@pytest.mark.parametrize(("reply", "message"), FAILS)
def test_what_fails_for_good_is_one_line_without_the_key_and_keeps_answers(serve, config, capsys, reply, message):
    server = serve(lambda text, number: FAIR(text, number) if number <= 5 else reply)
    caught = refuses(JudgeError, message, judge, config(server, concurrency=1, retries=0))
    assert SECRET not in caught
    assert len(config(server).answers.read_text().splitlines()) == 5


def test_unreadable_answers_are_counted_and_their_pairs_left_out(serve, config):

    def reply(text, number):
        return "I can't say." if "[A]\ngood 0" in text and "quality" in text else FAIR(text, number)

    result = judge(config(serve(reply)))
    quality, rest, _ = result.aspects
    assert (quality.unreadable, quality.left_out, quality.won, quality.win_rate) == (2, 1, 5, 100)
    assert (rest.unreadable, rest.left_out, rest.won) == (0, 0, 6)
    assert "2 unreadable answers, 1 pairs left out" in str(result)
    nothing = judge(config(serve(lambda text, number: "?"), judge_temperature=1.0))
    assert nothing.aspects[0].win_rate is None
    assert json.loads(json.dumps(nothing.to_dict(), allow_nan=False))["aspects"][0]["left_out"] == 6
    with pytest.raises(JudgeError, match="not an answer"):
        judge(config(serve(lambda t, n: (200, {"content-type": "application/json"}, "{}")), judge_tokens=9))


def test_identical_outputs_are_ties_and_a_subset_depends_on_the_seed(serve, config, tmp_path):
    server = serve(FAIR)
    result = judge(config(server, ours=["good 0", "same", "good 2"], theirs=["poor 0", "same", "poor 2"]))
    assert (result.identical, result.asked) == (1, 24)
    assert result.aspects[0].win_rate == pytest.approx(250 / 3)
    chosen = []
    for seed in (0, 0, 1):
        server, answers = serve(FAIR), tmp_path / f"answers-{len(chosen)}"
        judge(config(server, ours=40, limit=5, seed=seed, answers=answers))
        chosen.append({re.search(r"text (\d+)", text)[1] for text in server.texts})
    assert chosen[0] == chosen[1] != chosen[2]
    assert {len(c) for c in chosen} == {5}


def test_files_that_do_not_belong_together_and_no_endpoint_are_refused(serve, config, monkeypatch):
    asked = config(serve(FAIR))
    text = asked.baseline.read_text()
    for content, message in (
        (text.replace("text 3", "text 9"), "output 4 has another prompt"),
        ("\n".join(text.splitlines()[:5]), r"\(6 outputs\) .* \(5\): output 6 has .* or is missing"),
        ("", "holds no outputs"),
        ('{"prompt": "x"}\n', "line 1: no prompt and output"),
        ("nonsense\n", "line 1: no prompt and output"),
    ):
        asked.baseline.write_text(content)
        refuses(DataError, message, judge, asked)
    asked.baseline.write_text(text)
    asked.answers.write_text('{"other": 1}\n')
    refuses(DataError, "not an answer of a judge", judge, asked)
    asked.answers.unlink()
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    refuses(ConfigError, "no endpoint", judge, replace(asked, base_url=None))


VERDICTS = {
    "A is worse.\nPreferred: B": 0.0, "x\n**Preferred: A**": 1.0, "Preferred: <A>": 1.0, "Preferred: Summary A.": 1.0,
    "Preferred: A\nNo.\npreferred: B": 0.0, "(B)": 0.0, "Preferred: tie": 0.5, "Preferred: A or B": None,
    "Preferred: <A or B>": None, "A is good": None, "Preferred: C": None, "": None,
}  # fmt: skip


@pytest.mark.parametrize("answer", VERDICTS)
def test_verdicts(answer):
    assert verdict(answer, True) == VERDICTS[answer]
    assert verdict(answer, False) == (None if VERDICTS[answer] is None else 1 - VERDICTS[answer])


def test_the_interval_is_the_published_one_and_every_question_names_its_aspect():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for kind, aspect in itertools.product(("summary", "translation"), ("quality", "informativeness", "coherence")):
        assert all(kind in text and aspect in text for text, _ in queries(aspect, kind, "p", "x", "y"))


def test_command_line(serve, config, capsys):
    asked = config(serve(FAIR))
    arguments = [str(asked.system), str(asked.baseline), "--judge-model", "m", "--base-url", asked.base_url]
    assert main([*arguments, "--answers", str(asked.answers), "--aspects", "coherence", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aspects"][0]["win_rate"] == 100
    assert main([str(asked.system), "absent", "--judge-model", "m"]) == 2
    assert capsys.readouterr().err == "judge: absent: can't be read (No such file or directory)\n"
    for wrong in (["--aspects", "beauty"], ["--aspects"], ["--judge-tokens", "0"], ["--limit", "-1"]):
        refuses(SystemExit, "2", main, [*arguments, *wrong])
