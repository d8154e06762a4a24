"""Completions that a server samples: ids there and back, log-probabilities of the model's own pass, and no others."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import describe, verify
from ketchup_cache.config.commands import LearnConfig, RolloutConfig, ScoreConfig
from ketchup_cache.config.resolve import flag, resolve
from ketchup_cache.errors import ConfigError, KetchupError, MismatchError, ModelError, ServerError
from ketchup_cache.models import server as server_module
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts import rollout as rollout_module
from ketchup_cache.rollouts.engine import Engine
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from ketchup_cache.training.learn import learn
from tests.helpers.errors import fails, refuses
from tests.helpers.learning import Killed, metrics
from tests.helpers.models import ENDS, make_decoder, make_decoder_tokenizer, make_model, save_model, write_prompts
from tests.helpers.oracle import plain_logits, rows_of
from tests.helpers.server import Server, serving

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vllm-completion.json"
MODEL, TOKENIZER = make_model("qwen2", ends=ENDS), make_decoder_tokenizer()
PROMPTS = 9


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv(server_module.KEY, raising=False)
    monkeypatch.setattr(rollout_module, "ROLLOUTS_AT_ONCE", 12)


def saved(folder, model=MODEL):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("student"))


@pytest.fixture
def server():
    return Server(MODEL, TOKENIZER)


@pytest.fixture
def url(server):
    with serving(server) as address:
        yield address


@pytest.fixture
def asked(tmp_path, student, url):
    """Makes a config; `cache` by its name."""
    data = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)

    def make(cache="cache", **more) -> RolloutConfig:
        given = {"student": str(student), "data": str(data), "samples": 2, "max_new_tokens": 8, "device": "cpu"}
        given |= {"student_url": url, "student_name": "tiny", "in_flight": 4, "retry_for": 60, "idle_timeout": 20}
        return RolloutConfig(**(given | {"cache": tmp_path / cache} | more))

    return make


def rows_in(folder) -> dict[tuple[bytes, int], tuple[list[int], list[float], bool]]:
    """(prompt, which of its samples) → completion, log-probabilities, whether it finished."""
    cache, found = open_cache(folder), {}
    for id_, info in cache.rollouts():
        rollouts, prompts = cache.load_rollouts(id_), cache.load_prompts(info.prompts)
        for row, (place, tokens, logprob) in enumerate(rows_of(rollouts)):
            key = prompts.tokens[place].tobytes(), row % info.sampling.samples
            assert key not in found
            found[key] = tokens, logprob.tolist(), bool(rollouts.finished[row])
    return found


def plain(prompt: bytes, tokens: list[int], how: dict, model=MODEL) -> np.ndarray:
    """Log-probabilities by a forward pass over the row alone, and a sort."""
    logits = plain_logits(model, np.frombuffer(prompt, np.int32), tokens)[:, :60].double() / how.get("temperature", 1)
    for row in logits:
        order = row.argsort(descending=True)
        row[order[how.get("top_k") or 60 :]] = -torch.inf
        before = row.softmax(0)[order].cumsum(0) - row.softmax(0)[order]
        row[order[before >= how.get("top_p", 1)]] = -torch.inf
    return logits.log_softmax(-1)[range(len(tokens)), tokens].numpy()


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.6}, {"top_k": 5, "top_p": 0.8, "temperature": 1.5}, {"greedy": True, "samples": 1}],
    ids=str,
)
def test_what_is_stored_is_what_was_drawn_by_the_weights_of_the_student(asked, server, how):
    server.processed = True
    report = rollout(config := asked(**how))
    samples = how.get("samples", 2)
    assert (report.rollouts, report.prompts, report.already_there) == (PROMPTS * samples, PROMPTS, 0)
    drawn = {(tuple(body["prompt"]), body["seed"]): body for body in server.requests}
    rows = rows_in(config.cache)
    assert len(drawn) == PROMPTS * samples == len(rows)
    ended = 0
    for (prompt, _), (tokens, logprob, finished) in rows.items():
        assert [i in ENDS for i in tokens[:-1]] == [False] * (len(tokens) - 1)
        assert (tokens[-1] in ENDS) == finished == (len(tokens) < 8 or finished)
        ended += finished
        if "greedy" in how:
            best = plain_logits(MODEL, np.frombuffer(prompt, np.int32), tokens)[:, :60].argmax(1)
            assert (tokens, any(logprob)) == (best.tolist(), False)
        else:
            np.testing.assert_allclose(logprob, plain(prompt, tokens, how), atol=1e-4)
    assert report.finished == ended > 0
    of_samples = [{tuple(rows[key][0]) for key in rows if key[0] == prompt} for prompt, _ in rows]
    assert samples == 1 or sum(map(len, of_samples)) > 1.5 * len(of_samples)  # a seed for each
    assert report.engine["mean"] < report.engine["largest"] < 1e-4
    assert verify(open_cache(config.cache), deep=True).ok
    assert rollout(config).already_there == PROMPTS * samples  # and no request more
    assert len({body["seed"] for body in server.requests}) == PROMPTS * samples


def test_a_row_does_not_depend_on_what_else_is_asked(asked, tmp_path):
    rollout(asked())
    rollout(asked("one", in_flight=1, rollout_batch=3))
    for part in (1, 2):
        rollout(asked("shards", shard=f"{part}/2"))
    rollout(asked("seed", seed=1))
    whole = rows_in(tmp_path / "cache")
    for name in ("one", "shards"):
        other = rows_in(tmp_path / name)
        assert {key: row[0] for key, row in other.items()} == {key: row[0] for key, row in whole.items()}
    assert rows_in(tmp_path / "seed").keys() == whole.keys()
    assert sum(rows_in(tmp_path / "seed")[key][0] == row[0] for key, row in whole.items()) < len(whole) / 2


def test_ids_of_padding_rows_are_never_drawn(asked, server, tmp_path):
    wide = make_decoder("wide")
    with torch.no_grad():
        wide.lm_head.weight[60:] *= 4
    server.model, server.vocab = wide, 72
    refuses(ServerError, "an id that the tokenizer does not have, of 60", rollout, asked())
    rollout(asked("wide", student=str(saved(tmp_path / "student", wide)), max_mismatch=5))
    assert max(max(tokens) for tokens, *_ in rows_in(tmp_path / "wide").values()) < 60
    assert server.requests[-1]["logit_bias"] == {str(i): -100 for i in range(60, 72)}


def test_the_mismatch_is_measured_filed_and_shown(asked, server, capsys):
    """Against a plain pass; of the engine's log-probabilities, which are stored as they are."""
    server.bends = lambda logprob, body: logprob * 1.02
    report = rollout(config := asked())
    apart = np.concatenate([np.array(row[1]) - plain(key[0], row[0], {}) for key, row in rows_in(config.cache).items()])
    assert report.engine["mean"] == pytest.approx(np.abs(apart).mean(), rel=1e-2)
    assert report.engine["mean"] > 0.01
    assert report.engine["largest"] == pytest.approx(np.abs(apart).max(), rel=1e-2)
    ((_, info),) = open_cache(config.cache).rollouts()
    assert info.engine.model_dump() == report.engine | {"far": 0.0, "engine": "tiny"}
    said = f"tiny: its log-probabilities differ by {report.engine['mean']:.2g} nats on average"
    assert said in str(report)
    assert said in str(describe(open_cache(config.cache)))


def test_other_weights_are_refused_at_once(asked, server, tmp_path):
    server.model = make_model("qwen2", seed=5)
    what = (
        r"^http\S+: its log-probabilities of tokens that it drew differ by \d\S* nats \(mean\) from those of \S+ here"
    )
    refuses(ServerError, what + ", more than --max-mismatch 0.1: serve these weights as tiny$", rollout, asked())
    assert len(server.requests) == 8 < 2 * PROMPTS
    assert not open_cache(tmp_path / "cache").rollouts()
    server.model = MODEL
    message = "serve these weights as tiny, and start it with --logprobs-mode processed_logprobs"
    refuses(ServerError, message, rollout, asked(temperature=0.5))


ONCE = {"429": (429, {"retry-after": "0"}, "slow"), "503": (503, {}, ""), "closed": "close", "slow": 2.0}


@pytest.mark.parametrize("fault", ONCE)
def test_an_outage_is_waited_for(asked, server, fault, tmp_path):
    rollout(asked("whole"))
    begun = len(server.requests)
    server.fault = lambda number: ONCE[fault] if number in (begun + 3, begun + 11) else None
    rollout(asked(idle_timeout=1 if fault == "slow" else 20))
    assert rows_in(tmp_path / "cache") == rows_in(tmp_path / "whole")


def answer_with(**fields):
    return lambda answer: {**answer, "choices": [answer["choices"][0] | fields]}


def logprobs(*values):
    return answer_with(token_ids=[1], logprobs={"token_logprobs": list(values)})


@pytest.mark.parametrize(
    ("fault", "changes", "message"),
    [
        ((503, {}, "<html>"), None, r"status 503 \(<html>\); see whether it runs, then run this again to go on"),
        ((401, {}, "no"), None, rf"status 401 \(no\); set {server_module.KEY}"),
        ((307, {"location": "http://elsewhere"}, ""), None, r"status 307 \(http://elsewhere\)"),
        ((200, {}, " " * 2_000_000), None, "more than .* bytes"),
        (None, lambda answer: {}, "not as asked"),
        (None, answer_with(prompt_token_ids=[3]), "token ids, and read .* or others"),
        (None, answer_with(prompt_token_ids=None), "no token ids"),
        (None, answer_with(token_ids=None), "not as asked"),
        (None, answer_with(token_ids=["1"]), "no token ids"),
        (None, answer_with(token_ids=[]), "log-probabilities of 0 tokens"),
        (None, answer_with(token_ids=[2] * 9), "log-probabilities of 9 tokens, 8 at most"),
        (None, answer_with(token_ids=[60], logprobs={"token_logprobs": [-1]}), "tokenizer does not have, of 60"),
        (None, answer_with(token_ids=[1, 2], logprobs={"token_logprobs": [-1, -1]}), "it goes on after token 1"),
        (None, answer_with(token_ids=[2], logprobs={"token_logprobs": [-1]}), "it ends after 1 tokens by itself"),
        (None, logprobs(), "0 log-probabilities of 1 tokens"),
        (None, logprobs(None), "NaN, infinite or above 0"),
        (None, logprobs(0.5), "NaN, infinite or above 0"),
        (None, logprobs("x"), "not as asked"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_and_what_came_before_is_kept(asked, server, tmp_path, fault, changes, message):
    rollout(asked("whole"))
    begun = len(server.requests)

    def broken() -> bool:
        return len(server.requests) > begun + 15

    server.fault = lambda number: fault if broken() else None
    server.changes = lambda answer: changes(answer) if changes and broken() else answer
    line = refuses(ServerError, message, rollout, asked(retry_for=5 if fault and fault[0] == 503 else 60))
    assert line.startswith("http")
    kept = rows_in(tmp_path / "cache")
    assert 12 <= len(kept) < 2 * PROMPTS  # of the second twelve, whole prompts
    server.fault, server.changes = (lambda number: None), (lambda answer: answer)
    before = len(server.requests)
    assert rollout(asked()).already_there == len(kept)
    assert len({body["seed"] for body in server.requests[before:]}) == 2 * PROMPTS - len(kept)
    assert rows_in(tmp_path / "cache") == rows_in(tmp_path / "whole")


def test_killed_and_resumed(asked, server, tmp_path, monkeypatch):
    rollout(asked("whole"))
    monkeypatch.setattr(rollout_module, "TOKENS_PER_SEGMENT", 1)
    commit, done = Cache.commit_rollouts, []

    def dying(*given):
        if done:
            raise Killed
        done.append(commit(*given))

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "commit_rollouts", dying)
        with pytest.raises(Killed):
            rollout(asked())
    before = len(server.requests)
    assert rollout(asked()).already_there == 12
    assert len({body["seed"] for body in server.requests[before:]}) == 2 * PROMPTS - 12
    assert rows_in(tmp_path / "cache") == rows_in(tmp_path / "whole")


def test_what_an_engine_can_not_do_is_one_line(asked, server, tmp_path, capsys):
    t5 = save_model(tmp_path / "t5")
    refuses(ModelError, "is an encoder-decoder, which vLLM does not serve; leave --student-url out", rollout,
            asked(student=str(t5)))  # fmt: skip
    server.longest = 17
    refuses(MismatchError, "are 17 tokens, and .* takes 16: start it with --max-model-len 18", rollout, asked())
    assert not server.requests
    server.name = "other"
    refuses(ModelError, "has no model tiny; it has other: set --student-name", rollout, asked())
    base = {"student": "s", "data": "d", "cache": "c", "student_url": "http://h/v1", "student_name": "n"}
    for more, message in (
        ({"calculator": True}, "calculator writes into a completion"),
        ({"engine": "ray"}, "student_url has a server sample, and --engine ray workers"),
        ({"student_name": ""}, "student_url and student_name go together"),
        ({"student_url": "http://me:secret@h"}, "student_url must be like http://host:8000/v1, without a user"),
    ):
        refuses(ConfigError, message, resolve, "rollout", None, base | more)
    words = ["rollout", "--student", t5, "--data", asked().data, "--cache", tmp_path / "no", "--device", "cpu"]
    assert "encoder-decoder" in fails(capsys, *words, "--student-url", asked().student_url, "--student-name", "tiny")


@pytest.mark.timeout(400)
def test_two_processes_draw_what_one_does(asked, server, tmp_path):
    rollout(config := asked("one"))
    given = {"cache": tmp_path / "two", "in_flight": 2} | {
        name: getattr(config, name)
        for name in ("student", "data", "samples", "max_new_tokens", "student_url", "student_name", "device")
    }
    words = [str(word) for name, value in given.items() for word in (flag(name), value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    begun = len(server.requests)
    done = subprocess.run([sys.executable, *launcher, "-m", "ketchup_cache", "rollout", *words], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows_in(tmp_path / "two") == rows_in(tmp_path / "one")
    assert len({body["seed"] for body in server.requests[begun:]}) == 2 * PROMPTS


def test_learn_weighs_by_what_the_engine_drew_with(asked, server, tmp_path):
    """On-policy, a ratio is the weights' probability over the engine's."""
    server.bends = lambda logprob, body: logprob - 0.05
    config = asked(samples=1)
    rollout(config)
    score(ScoreConfig(teacher=str(saved(tmp_path / "teacher", make_decoder("qwen2", seed=2))), cache=config.cache,
                      device="cpu"))  # fmt: skip
    for importance in (True, False):
        learn(LearnConfig(student=config.student, cache=config.cache, out=tmp_path / f"run-{importance}", steps=1,
                          batch_size=4, device="cpu", importance=importance))  # fmt: skip
    with_, without = (metrics(tmp_path / f"run-{importance}")[0] for importance in (True, False))
    assert with_["ratio_mean"] == without["ratio_mean"] == pytest.approx(math.exp(0.05), rel=1e-4)
    assert with_["loss"] == pytest.approx(without["loss"] * math.exp(0.05), rel=1e-3)


def test_the_key_goes_nowhere_else(asked, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(server_module.KEY, "sk-secret")
    rollout(asked())
    assert server.keys == {"Bearer sk-secret"}
    server.fault = lambda number: (403, {}, "Bearer sk-secret is not known")
    with pytest.raises(KetchupError, match="Bearer … is not known") as caught:
        rollout(asked("other"))
    assert "sk-secret" not in str(caught.value) + capsys.readouterr().err
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in files if b"sk-secret" in path.read_bytes() or b"127.0.0.1" in path.read_bytes()]
    assert json.loads(json.dumps(rollout(asked()).to_dict()))["engine"]["engine"] == "tiny"


def test_answers_of_a_real_vllm():
    """Recorded by `python -m benchmarks.engine --record`, with the log-probabilities of the model in process."""
    recorded = json.loads(FIXTURE.read_text())
    asked, (choice,) = recorded["asked"], recorded["answer"]["choices"]
    engine = Engine.__new__(Engine)
    engine._sampling, engine._eos = Sampling(max_new_tokens=8), asked["stop_token_ids"]
    engine._head = SimpleNamespace(vocab_size=49_152, projection=SimpleNamespace(weight=np.empty((49_152, 0))))
    assert asked == engine._asking() | {name: asked[name] for name in ("model", "prompt", "seed")}
    tokens, logprob = engine._read(choice, asked["prompt"])
    assert len(tokens) == 8
    np.testing.assert_allclose(logprob, recorded["in_process"], atol=1e-4)
