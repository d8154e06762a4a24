"""`learn` by an engine: at every refresh it has the student's weights as they are, or the run ends in one line."""

import pytest
import torch

from ketchup_cache import open_cache
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.config.resolve import resolve
from ketchup_cache.errors import ConfigError, ModelError, ServerError
from ketchup_cache.models import server as server_module
from ketchup_cache.models.fingerprint import state_fingerprint
from ketchup_cache.training.learn import learn
from tests.helpers.errors import refuses
from tests.helpers.learning import assert_same_weights, killed_before, metrics
from tests.helpers.models import ENDS, make_decoder, make_decoder_tokenizer, make_model, save_model, write_prompts
from tests.helpers.oracle import plain_logits, rows_of
from tests.helpers.server import Server, serving
from tests.rollouts.test_engine import saved


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server():
    made = Server(make_model("qwen2", seed=7), make_decoder_tokenizer())  # whoever had it before
    made.dev = True
    return made


@pytest.fixture
def url(server):
    with serving(server) as address:
        yield address


@pytest.fixture
def asked(tmp_path, url):
    """Makes the config of a run with a cache of its own, which holds prompts and nothing else."""
    from tests.training.test_onpolicy import fill

    write_prompts(tmp_path / "d.jsonl", 24)
    student = saved(tmp_path / "student", make_model("qwen2", ends=ENDS))
    teacher = saved(tmp_path / "teacher", make_decoder("qwen2", seed=2))

    def make(name: str, **more) -> LearnConfig:
        given = {"student": str(student), "teacher": str(teacher), "cache": tmp_path / f"{name}-cache", "steps": 6}
        fill({"--student": student, "--cache": given["cache"]}, tmp_path)
        given |= {"out": tmp_path / name, "batch_size": 8, "samples": 2, "refresh_every": 2, "max_new_tokens": 6}
        given |= {"lr": 3e-3, "device": "cpu", "checkpoint_every": 1, "student_url": url, "student_name": "tiny"}
        return LearnConfig(**(given | {"in_flight": 4} | more))

    return make


@pytest.mark.parametrize("how", [{}, {"lora_rank": 2}], ids=str)
def test_the_engine_has_the_weights_of_every_refresh(asked, server, tmp_path, how):
    if how:
        pytest.importorskip("peft")
    report = learn(config := asked("run", **how))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["engine_s"]] == [0, 2, 4]
    assert all(line["engine_s"] <= line["sample_s"] for line in lines if line["refreshed"])
    assert report.engine_s == pytest.approx(sum(line["engine_s"] for line in lines))
    assert not (tmp_path / "run" / "engine").exists()
    # its models are those that the policies of the cache are named by, and drew what is in it
    cache, models = open_cache(config.cache), {state_fingerprint(model): model for model in server.updates}
    steps = {}
    for id_, info in cache.rollouts():
        if info.policy.step is None:
            continue
        rollouts, prompts = cache.load_rollouts(id_), cache.load_prompts(info.prompts).tokens
        model = server.updates[info.policy.step // 2].eval()
        assert how or models[info.policy.fingerprint] is model
        for place, tokens, logprob in rows_of(rollouts):
            plain = plain_logits(model, prompts[place], tokens)[:, :60].log_softmax(-1)[range(len(tokens)), tokens]
            assert logprob == pytest.approx(plain.numpy(), abs=1e-4)
        assert info.engine.largest < 1e-3
        steps[info.policy.step] = len(rollouts)
    assert steps == {2: 16, 4: 16}
    for line in lines:
        assert (line["behavior_kl"] < 1e-8) == line["refreshed"]
        if line["refreshed"]:
            assert line["ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_killed_and_resumed_gives_the_same_weights(asked, tmp_path):
    learn(asked("whole"))
    with killed_before(3):
        learn(asked("run"))
    assert learn(asked("run")).resumed_from == 3
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_weights_that_do_not_arrive_are_refused(asked, server, tmp_path):
    """By a server that says they do: at the first refresh by the mismatch, and later where they have hardly moved."""
    server.dev = False
    what = r"its log-probabilities of tokens that it drew differ by .* serve these weights as tiny$"
    refuses(ServerError, what, learn, asked("first", refresh_every=2))
    server.dev = True
    before = Server.answer

    def deaf(self, path, body):
        self.dev = len(self.updates) < 2
        return before(self, path, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "answer", deaf)
        what = "answers as with the weights that it had before, not as with those that it was given; see its log"
        refuses(ServerError, what, learn, asked("later", lr=1e-4))
    server.dev = True
    assert learn(asked("later", lr=1e-4)).resumed_from == 4  # of the refresh where it ended, and on it goes


def test_rounding_of_the_engine_is_not_taken_for_old_weights(asked, server, tmp_path):
    """Weights that have moved by less than its rounding pass; and so do weights that have not moved."""
    noise = torch.Generator().manual_seed(0)
    server.bends = lambda logprob, body: logprob - 0.02 * torch.rand(logprob.shape, generator=noise)
    learn(asked("little", lr=1e-7))
    learn(asked("more", lr=1e-2))


def test_what_can_not_be_is_one_line(asked, server, tmp_path):
    server.dev = None
    what = (
        r"takes no new weights \(http\S+/collective_rpc: status 404 \(Not Found\)\): start a vLLM with VLLM_SERVER_DEV"
    )
    refuses(ModelError, what, learn, asked("run"))
    t5 = save_model(tmp_path / "t5")
    refuses(ModelError, "t5: is an encoder-decoder, which vLLM does not serve", learn, asked("t5").model_copy(
        update={"student": str(t5)}))  # fmt: skip
    given = {"student": "s", "cache": "c", "student_url": "http://h/v1", "student_name": "n"}
    refuses(ConfigError, "is of new rollouts", resolve, "learn", None, given)
    refuses(ConfigError, "which --fsdp keeps in parts", resolve, "learn", None, given | {"teacher": "t", "fsdp": True})
    (tmp_path / "all.yaml").write_text("student_url: http://h/v1\nstudent_name: n\nrefresh_every: 4\n")
    offline = resolve("learn", tmp_path / "all.yaml", {"student": "s", "cache": "c"})
    assert (offline.student_url, offline.refresh_every) == ("", 16)
    served = {"student": "s", "cache": "c", "teacher_url": "http://t/v1", "teacher_name": "t"}
    assert resolve("learn", tmp_path / "all.yaml", served).refresh_every == 4
