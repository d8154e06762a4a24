"""A teacher behind a server: the scores of the model in process, and no others."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ketchup_cache import open_cache, provenance
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cli import main
from ketchup_cache.config.commands import AnalyzeConfig, EvaluateConfig, LearnConfig
from ketchup_cache.config.resolve import resolve
from ketchup_cache.errors import CacheError, ConfigError, MismatchError, ModelError, ServerError
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models import server as server_module
from ketchup_cache.report.analyze import analyze
from ketchup_cache.scoring.score import Scorer, follow, score
from ketchup_cache.sharing.transfer import copy
from ketchup_cache.training.learn import learn
from ketchup_cache.types import Ragged
from tests.helpers.errors import refuses
from tests.helpers.learning import Killed
from tests.helpers.models import make_decoder, make_decoder_tokenizer, save_decoder, save_model, write_prompts
from tests.helpers.oracle import make_rollouts, plain_logits, plain_scores, random_rollouts
from tests.helpers.scoring import add_rollouts, options
from tests.helpers.server import Server, serving

MODEL, TOKENIZER = make_decoder("qwen2"), make_decoder_tokenizer()
FIXTURE = Path(__file__).parents[1] / "fixtures" / "vllm-answers.json"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv(server_module.KEY, raising=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def server():
    return Server(MODEL, TOKENIZER)


@pytest.fixture
def url(server):
    with serving(server) as address:
        yield address


@pytest.fixture
def rollouts(cache):
    """(prompts, rollouts) that are in the cache."""
    made = random_rollouts(0, 24, prompts=6)
    add_rollouts(cache, *made, tokenizer=TOKENIZER)
    return made


def asked(cache, teacher, url, **more):
    given = {"teacher_url": url, "teacher_name": "tiny", "in_flight": 4, "retry_for": 30, "idle_timeout": 2}
    return options(cache, teacher, **(given | more))


def compare(cache, rollouts, rows=None):
    """That what is in the cache are log-probabilities of the model's own forward pass, and K-step returns its own."""
    prompts, drawn = rollouts
    plain, seen = plain_scores(MODEL, prompts, drawn), 0
    cache.refresh()
    for ref in cache.scored() if cache.teachers() else ():
        span, of = slice(ref.row_start, ref.row_stop), cache.load_scored(ref)
        mine, theirs = of.scores, plain.take(drawn.completions, span)
        np.testing.assert_allclose(mine.q, theirs.q - theirs.logsumexp, atol=1e-5)
        np.testing.assert_allclose(mine.max_q, theirs.max_q - theirs.logsumexp, atol=1e-5)
        for k in (1, 2, 4):
            a, b = (rollout_returns(of.rollouts, x, [k], normalization="logprob")[0] for x in (mine, theirs))
            np.testing.assert_allclose(a, b, atol=1e-4)
        seen += ref.rows
    assert seen == (len(drawn) if rows is None else rows)


@pytest.mark.parametrize(("old", "tokenizes", "top"), [(False, True, 0), (False, False, 5), (True, False, 0)])
def test_scores_are_those_of_a_plain_forward_pass(cache, teacher, server, url, rollouts, old, tokenizes, top):
    server.old, server.tokenizes = old, tokenizes
    report = score(asked(cache, teacher, url, keep_top=top))
    assert (report.computed + report.copied, report.batch_tokens) == (24, None)
    compare(cache, rollouts)
    assert not [body for body in server.requests if isinstance(body["prompt"], str) and body.get("logprobs")]
    (info,) = cache.teachers()
    assert (info.name, info.dtype, info.served.form) == ("tiny", "served", "echo" if old else "prompt_logprobs")
    assert verify(cache, deep=True).ok
    prompts, drawn = rollouts
    (ref,) = cache.scored(keep_top=top)
    mine = cache.load_scores(ref.scores_id)
    if top:
        rows = zip(drawn.prompt_index, drawn.completions, strict=True)
        logprob = torch.cat([plain_logits(MODEL, prompts[i], row).double().log_softmax(-1) for i, row in rows])
        largest, ids = logprob.sort(descending=True)
        assert np.array_equal(mine.top.ids, ids[:, :top])
        np.testing.assert_allclose(mine.top.q, largest[:, :top], atol=1e-5)
        np.testing.assert_allclose(mine.top.rest_logsumexp, largest[:, top:].logsumexp(1), atol=1e-3)
    for place in np.flatnonzero(~drawn.finished):  # the state after the cut is that before a token more
        whole = [[*drawn.completions[place], 5]]
        one = plain_scores(MODEL, prompts, make_rollouts([drawn.prompt_index[place]], whole, [True]))
        assert mine.final_max_q[place] == pytest.approx(one.max_q[-1] - one.logsumexp[-1], abs=1e-5)


def answer_with(**fields):
    """A change of the first choice of an answer."""
    return lambda answer: {**answer, "choices": [answer["choices"][0] | fields]}


def spoiled(value):
    """A change of one log-probability of the last token."""

    def change(answer):
        answer["choices"][0]["prompt_logprobs"][-1] = {k: {"logprob": value} for k in map(str, range(60))}
        return answer

    return change


HTML = "<html>\x1b[31m\x07<b>Bad\r\ngateway</b></html>"
ONCE = {
    "429": (429, {"retry-after": "0"}, "slow down"), "500": (500, {}, HTML), "503": (503, {}, ""), "closed": "close",
    "slow": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("fault", ONCE)
def test_an_outage_is_waited_for(cache, teacher, server, url, rollouts, fault):
    scorer = Scorer(asked(cache, teacher, url))
    before = len(server.requests)
    server.fault = lambda number: ONCE[fault] if number in (before + 3, before + 4) else None
    scorer.ensure(cache)
    compare(cache, rollouts)


@pytest.mark.parametrize(
    ("fault", "changes", "message"),
    [
        ((503, {}, HTML), None, r"status 503 \(<html>�\[31m�<b>Bad gateway"),
        ((429, {"retry-after": "3600"}, "later"), None, r"status 429 \(later\); see whether it runs"),
        ("close", None, "RemoteProtocolError: .*; see whether it runs, then run this again to go on"),
        ((200, {}, HTML), None, "an answer is no JSON"),
        ((200, {}, "[" * 20_000), None, "an answer is no JSON"),
        ((200, {}, " " * 2_000_000), None, "an answer has more than .* bytes"),
        ((401, {}, "no"), None, rf"status 401 \(no\); set {server_module.KEY}"),
        ((307, {"location": "http://elsewhere/v1"}, ""), None, r"status 307 \(http://elsewhere/v1\)"),
        ((200, {}, "[1]"), None, "an answer is not as asked"),
        (None, lambda answer: {}, "not as asked"),
        (None, lambda answer: {**answer, "choices": answer["choices"] * 2}, "not as asked"),
        (None, lambda answer: answer | {"usage": {"prompt_tokens": 99}}, "token ids, and read 99"),
        (None, answer_with(prompt_token_ids=[1]), "token ids, and read .* or others"),
        (None, answer_with(prompt_logprobs=[None]), "log-probabilities of 1 positions for"),
        (None, spoiled(float("nan")), "NaN, infinite or above 0"),
        (None, spoiled(float("-inf")), "NaN, infinite or above 0"),
        (None, spoiled(0.5), "NaN, infinite or above 0"),
        (None, spoiled("x"), "not as asked"),
        (None, spoiled(None), "not as asked"),
        (None, answer_with(logprobs={"top_logprobs": [{"a": float("nan")}]}), "NaN, infinite or above 0"),
        (None, lambda a: answer_with(prompt_logprobs=[{"59": {"logprob": -9}}] * a["usage"]["prompt_tokens"])(a),
         "which it was sent, is not in it"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_and_what_came_before_is_kept(
    cache, teacher, server, url, rollouts, fault, changes, message
):
    scorer = Scorer(asked(cache, teacher, url, retry_for=2))
    began = len(server.requests)

    def broken() -> bool:
        return len(server.requests) > began + 6

    server.fault = lambda number: fault if broken() else None
    server.changes = lambda answer: changes(answer) if changes and broken() else answer
    refuses(ServerError, message, scorer.ensure, cache)
    if fault and fault[0] == 429:
        assert len(server.requests) <= began + 6 + 4  # an hour is more than there is: nothing was asked again
    cache.refresh()
    there = sum(manifest.rows for _, manifest in cache.manifests("scores"))
    assert 2 <= there < 24  # six answers, of which two may be left with a gap before them, and copies
    compare(cache, rollouts, there)
    server.fault, server.changes = (lambda number: None), (lambda answer: answer)
    before = len(server.requests)
    assert scorer.ensure(cache).already == there
    assert len(server.requests) - before <= 24 - there  # only what was not kept
    compare(cache, rollouts)


def test_probabilities_that_add_up_to_more_than_1(cache, teacher, server, url, rollouts):
    scorer = Scorer(asked(cache, teacher, url, keep_top=5))
    server.changes = spoiled(-0.1)
    refuses(ServerError, "add up to more than 1", scorer.ensure, cache)


def retokenized(ids):
    return TOKENIZER(TOKENIZER.decode(ids))["input_ids"]


def replica(logprob, body, state=[0]):  # noqa: B006
    state[0] += 1
    return (logprob * (1 + 0.05 * (state[0] % 2))).log_softmax(-1)


@pytest.mark.parametrize(
    ("how", "message", "more"),
    [
        ({"reads": retokenized}, "log-probabilities|token ids, and read", {}),
        ({"reads": lambda ids: [3, *ids]}, r"it was sent 48 token ids, and read 49 or others", {}),
        ({"reads": lambda ids: ids[-32:]}, r"it was sent 48 token ids, and read 32", {}),
        ({"bends": lambda x, body: (x / max(body["temperature"], 0.01)).log_softmax(-1)},
         "at another temperature, its answer to a row differs by .* nats .*--logprobs-mode raw_logprobs", {}),
        ({"bends": replica}, "asked again, its answer to a row differs by .*--max-disagreement 0.01: send all", {}),
        ({"most": 4}, "does not give the 5 largest log-probabilities.*--max-logprobs 5", {"keep_top": 5}),
        ({"old": True}, "the 5 largest log-probabilities of .* by id .*lower --keep-top", {"keep_top": 5}),
        ({"old": True, "changes": lambda a: a | {"choices": [{}]}}, "the 1 largest .*by echo: .*serve it by vLLM", {}),
        ({"name": "other"}, "has no model tiny; it has other: set --teacher-name", {}),
        ({"tokenizer": make_decoder_tokenizer(["x", "The", "cat"])}, "its tokenizer is not that of", {}),
        ({"tokenizes": False, "tokenizer": lambda text, **_: {"input_ids": [3, 4]}}, "tokenizer is not that of", {}),
    ],
)  # fmt: skip
def test_the_self_test_refuses_before_anything_is_scored(cache, teacher, server, url, rollouts, how, message, more):
    for name, value in how.items():
        setattr(server, name, value)
    refuses((ModelError, MismatchError), message, score, asked(cache, teacher, url, **more))
    assert not cache.manifests("scores")


def test_the_disagreement_is_filed_and_rows_among_others_are_compared(cache, teacher, server, url, rollouts, capsys):
    server.bends = replica
    score(asked(cache, teacher, url, max_disagreement=1))
    (info,) = open_cache(cache.path).teachers()
    assert 0.01 < info.served.disagreement < 1
    assert f"differ by {info.served.disagreement:.1g} nats" in capsys.readouterr().err
    open_now = []

    def crowded(logprob, body):
        open_now.append(1)
        server_module.time.sleep(0.02)
        many = len(open_now) > 1
        open_now.pop()
        return (logprob * (1.1 if many else 1)).log_softmax(-1)

    server.bends = crowded
    refuses(ModelError, "among others, its answer to a row differs", score, asked(cache, teacher, url))


def test_dead_gone_and_wrong_addresses_are_one_line(cache, teacher, rollouts, tmp_path, capsys):
    refuses(ServerError, r"^http://127.0.0.1:1/v1/models: ConnectError: .*see whether it runs", score,
            asked(cache, teacher, "http://127.0.0.1:1/v1"))  # fmt: skip
    for url in ("http://me:secret@host/v1", "http://host/v1?key=secret", "ftp://host"):
        with pytest.raises(ConfigError) as caught:
            resolve("score", None, {"cache": "c", "teacher_url": url, "teacher_name": "t"})
        assert caught.value.problems == [
            "teacher_url must be like http://host:8000/v1, without a user, a password or a query"
        ]
    refuses(ConfigError, "go together", resolve, "score", None, {"cache": "c", "teacher_url": "http://h/v1"})
    refuses(ConfigError, "--teacher is missing: frozen model", resolve, "score", None, {"cache": "c"})
    t5 = save_model(tmp_path / "t5")
    refuses(ModelError, "no log-probabilities of an encoder-decoder", score, asked(cache, t5, "http://127.0.0.1:1/v1"))
    refuses(CacheError, "tokenizer of its rollouts is not here; give --teacher", score, asked(cache, "", "http://h"))


def test_rows_that_are_too_long_are_not_sent(cache, teacher, server, url):
    add_rollouts(
        cache, Ragged.from_rows([[5] * 60], np.int32), make_rollouts([0], [[5, 6, 7, 8]], [False]), tokenizer=TOKENIZER
    )
    scorer = Scorer(asked(cache, teacher, url))
    before = len(server.requests)
    refuses(MismatchError, r"rollout row 0 has 64 tokens .* takes 63: raise its --max-model-len", scorer.ensure, cache)
    assert len(server.requests) == before


def test_killed_and_resumed_gives_the_same_bytes(cache, teacher, server, url, rollouts, tmp_path, monkeypatch):
    how = {"commit_tokens": 20}
    whole = open_cache(tmp_path / "whole", create=True)
    copy(cache.path, whole.path)
    score(asked(whole, teacher, url, **how))
    commit, done = Cache.commit_scores, []

    def dying(*given):
        if len(done) == 2:
            raise Killed
        done.append(commit(*given))

    monkeypatch.setattr(Cache, "commit_scores", dying)
    with pytest.raises(Killed):
        score(asked(cache, teacher, url, **how))
    monkeypatch.setattr(Cache, "commit_scores", commit)
    before = len(server.requests)
    score(asked(cache, teacher, url, **how))
    assert len(server.requests) - before < 24 + 52
    files = [
        sorted(
            (m.info.row_start, sorted((n, f.sha256) for n, f in c.manifest(id_).files.items()))
            for id_, m in c.manifests("scores")
        )
        for c in (open_cache(cache.path), open_cache(whole.path))
    ]
    assert files[0] == files[1]
    assert len(files[0]) > 3


def test_who_the_teacher_is(cache, teacher, server, url, rollouts, tmp_path, monkeypatch):
    """Whoever scores with the same server shares scores; another model of the same name does not pass."""
    score(asked(cache, teacher, url))
    (first,) = open_cache(cache.path).teachers()
    server.bends = lambda logprob, body: (logprob * 1.006).log_softmax(-1)  # as after a restart on another GPU
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "SAME_ANSWERS", 0.05)  # a mean crosses the edge of a whole nat on the way
        assert score(asked(cache, teacher, url)).already == 24
        assert Scorer(asked(cache, teacher, url)).info.fingerprint != first.fingerprint
    server.bends = lambda logprob, body: (logprob * 0.97).log_softmax(-1)  # as another quantisation
    refuses(MismatchError, "two models have scored under this name", score, asked(cache, teacher, url))
    other = open_cache(tmp_path / "other", create=True)
    copy(cache.path, other.path, only={id_ for id_, _ in cache.rollouts()})
    score(asked(other, teacher, url))
    assert other.teachers()[0].fingerprint == first.fingerprint
    copy(other.path, cache.path)
    refuses(MismatchError, "two models have scored under this name", open_cache(cache.path).select_teacher, None)
    server.model = make_decoder("qwen2", seed=5)
    server.bends = lambda logprob, body: logprob
    third = open_cache(tmp_path / "third", create=True)
    copy(cache.path, third.path, only={id_ for id_, _ in cache.rollouts()})
    score(asked(third, teacher, url))
    assert third.teachers()[0].fingerprint != first.fingerprint


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    cache, teacher, server, url, rollouts, monkeypatch, capsys
):
    monkeypatch.setenv(server_module.KEY, "sk-secret")
    score(asked(cache, teacher, url))
    assert server.keys == {"Bearer sk-secret"}
    add_rollouts(cache, *random_rollouts(1, 4), policy=1, tokenizer=TOKENIZER)
    scorer = Scorer(asked(cache, teacher, url))
    server.fault = lambda number: (403, {}, "Bearer sk-secret is not known")
    line = refuses(ServerError, rf"Bearer … is not known\); set {server_module.KEY}", scorer.ensure, cache)
    assert "sk-secret" not in line + capsys.readouterr().err
    assert not [path for path in cache.path.rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]
    monkeypatch.setenv(server_module.KEY, "sk-\nsecret")
    assert "secret" not in refuses(ModelError, "no header may have", Scorer, asked(cache, teacher, url))


def test_learn_and_evaluate_by_a_server(cache, teacher, server, url, tmp_path):
    data = write_prompts(tmp_path / "data.jsonl", 8)
    student = save_decoder(tmp_path / "student", seed=1)
    main(
        [
            "rollout",
            "--student",
            str(student),
            "--data",
            str(data),
            "--cache",
            str(cache.path),
            "--max-new-tokens",
            "6",
            "--device",
            "cpu",
        ]
    )
    there = {"teacher_url": url, "teacher_name": "tiny"}
    runs = {}
    for name, how in (("process", {"teacher": str(teacher)}), ("server", there)):
        own = open_cache(tmp_path / name, create=True)
        copy(cache.path, own.path)
        given = {
            "student": str(student),
            "cache": own.path,
            "out": tmp_path / f"run-{name}",
            "batch_size": 4,
            "steps": 4,
            "lr": 1e-3,
        }
        given |= {"refresh_every": 2, "max_new_tokens": 6, "eval_data": str(data), "metric": "return", "device": "cpu"}
        runs[name] = learn(LearnConfig(**given, **how))
        evaluated = evaluate(
            EvaluateConfig(model=str(student), data=str(data), max_new_tokens=6, metrics="exact", device="cpu", **how)
        )
        runs[name] = runs[name].returns, runs[name].dev["best"]["metrics"]["return"], evaluated.returns.mean
    for mine, theirs in zip(runs["server"], runs["process"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert evaluated.returns.teacher == "tiny"
    message = "teacher tiny was behind a server, which gives log-probabilities: --{} needs .*; use --"
    server.model = make_decoder("qwen2", seed=5)
    given |= {"steps": 6}
    refuses(MismatchError, "run-server: has learned from teacher .* is another", learn, LearnConfig(**given, **how))
    own, base = {"cache": tmp_path / "server"}, {"student": str(student), "batch_size": 4, "device": "cpu"}
    for options_, word in (
        ({"normalization": "centred"}, "normalization centred"),
        ({"normalization": "raw"}, "normalization raw"),
        ({"unfinished": "zero"}, "unfinished zero"),
    ):
        for how in ({}, there, {"scores_from": "cache"}):
            refuses(
                MismatchError,
                message.format(word),
                learn,
                LearnConfig(**own, **base, out=tmp_path / "no", **options_, **how),
            )
        refuses(MismatchError, message.format(word), analyze, AnalyzeConfig(**own, **options_))
    refuses(
        MismatchError,
        message.format("normalization centred"),
        evaluate,
        EvaluateConfig(model=str(student), data=str(data), normalization="centred", **there),
    )
    analyze(AnalyzeConfig(**own))
    assert main(["export", str(own["cache"]), str(tmp_path / "rows"), "--to", "parquet"]) == 0
    rows = pq.read_table(tmp_path / "rows" / "rows.parquet").to_pydict()
    assert set(rows["mean_q"]) == {None} != set(map(bool, rows["q"]))


def test_follow_waits_for_its_server(cache, teacher, server, url, rollouts):
    scorer = Scorer(asked(cache, teacher, url, follow=True, poll=0.01, until_idle=0.5, retry_for=1))
    before = len(server.requests)
    server.fault = lambda number: (503, {}, "restarting") if before < number < before + 30 else None
    report = follow(cache, scorer)
    compare(cache, rollouts)
    assert report.segments >= 1


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_what_a_real_vllm_answered(cache, teacher, server, url, form):
    """Recorded by `python -m benchmarks.served --record`, with the log-probabilities of the model in process."""
    recorded = json.loads(FIXTURE.read_text())
    server.old = form == "echo"
    scorer = Scorer(asked(cache, teacher, url))
    server.fault = lambda number: recorded[form]
    ids, n = recorded["ids"], recorded["prompt"]
    prompts, drawn = Ragged.from_rows([ids[:n]], np.int32), make_rollouts([0], [ids[n:]], [False])
    mine = scorer.scores(prompts, drawn)
    for name, wanted in recorded["in_process"].items():
        np.testing.assert_allclose(getattr(mine, name), wanted, atol=2e-5)
    server.fault = lambda number: (400, {}, recorded["refused"])
    refuses(ServerError, "greater than max allowed: 20", scorer.scores, prompts, drawn)
