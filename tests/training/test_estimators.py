"""The family of policy gradients against its definition, with every completion of a small vocabulary enumerated."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from ketchup_cache import k_step_returns
from ketchup_cache.config.options import LossOptions
from ketchup_cache.models.head import Head
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.training.policy_gradient import learning_signal, policy_gradient, policy_gradient_step
from ketchup_cache.types import Prompts, Ragged, Rollouts, ScoredRollouts, Scores, TopLogits
from tests.helpers.learning import CapturedGradient
from tests.helpers.models import make_t5
from tests.helpers.returns import LITERAL

VOCAB, EOS, LONGEST = 4, 1, 3
PROMPT = [2, 3]
COMPLETIONS = [
    row
    for n in range(1, LONGEST + 1)
    for row in product(range(VOCAB), repeat=n)
    if EOS not in row[:-1] and (row[-1] == EOS or n == LONGEST)
]


@cache
def student():
    return make_t5(seed=1, vocab_size=VOCAB, d_model=8, scale=0.1)


@cache
def teacher_logits(prefix: tuple) -> np.ndarray:
    rng = np.random.default_rng([len(prefix), *prefix])
    return rng.normal(3, 2, VOCAB).astype(np.float32).astype(np.float64)


def scored(rows, logprob, keep_top: int) -> ScoredRollouts:
    completions = Ragged.from_rows(rows, np.int32)
    logits = np.stack([teacher_logits(row[:t]) for row in rows for t in range(len(row))])
    order = np.argsort(-logits, axis=1)
    sorted_ = np.take_along_axis(logits, order, 1)
    lse = np.log(np.exp(logits).sum(1))
    rest = np.full(len(logits), -np.inf)
    if keep_top < VOCAB:
        rest = np.log(np.exp(sorted_[:, keep_top:]).sum(1))
    finished = np.array([row[-1] == EOS for row in rows])
    final = [0.0 if row[-1] == EOS else teacher_logits(row).max() for row in rows]
    top = TopLogits(sorted_[:, :keep_top].astype(np.float32), order[:, :keep_top].astype(np.int32), rest.astype("f4"))
    values = logits[np.arange(len(logits)), completions.values], logits.max(1), lse, logits.mean(1), np.array(final)
    scores = Scores(*(v.astype(np.float32) for v in values), top=top if keep_top else None)
    forced = np.zeros(len(logits), np.bool_)
    rollouts = Rollouts(np.zeros(len(rows), np.int64), completions, logprob.astype("f4"), forced, finished)
    return ScoredRollouts(Prompts(np.zeros((1, 16), np.uint8), Ragged.from_rows([PROMPT], np.int32)), rollouts, scores)


@cache
def policy():
    """In float64: the model, and log π of every state, with the graph."""
    model, table = copy.deepcopy(student()).double(), {}
    for row in product(range(VOCAB), repeat=LONGEST - 1):
        logits = model(input_ids=torch.tensor([PROMPT]), decoder_input_ids=torch.tensor([[0, *row]])).logits[0]
        for t in range(LONGEST):
            table.setdefault(row[:t], logits[t].log_softmax(0))
    return model, table


def probability(row, start: int = 0) -> float:
    table = policy()[1]
    return float(np.exp(sum(float(table[row[:t]][row[t]].detach()) for t in range(start, len(row)))))


def estimate(row, t: int, options: LossOptions) -> float:
    """now_t − Σ_{i>t} w_{i−t} c_i, with the teacher's log-probability for q."""
    table, last = policy()[1], len(row) - 1
    q = [float(teacher_logits(row[:i])[row[i]]) for i in range(len(row))]
    m = [float(teacher_logits(row[:i]).max()) for i in range(len(row))]
    lse = [float(np.log(np.exp(teacher_logits(row[:i])).sum())) for i in range(len(row))]
    log_pi = [float(table[row[:i]][row[i]].detach()) for i in range(len(row))]
    kl = options.cost == "kl"
    cost = [log_pi[i] - q[i] + lse[i] if kl else m[i] - q[i] for i in range(len(row))]
    now = q[t] - lse[t] - (log_pi[t] if kl else 0)
    if options.weights == "comb" and options.tail == "one-step":
        return LITERAL["one-step"](q, m, options.k)[t] - lse[t]
    weigh = {
        "comb": lambda j: float(j % options.k == 0),
        "flat": lambda j: options.lam,
        "gae": lambda j: options.lam**j,
        "mean": lambda j: 1 / (last - t),
    }[options.weights]
    ends = options.end_weight is not None and row[-1] == EOS
    weight = lambda i: options.end_weight if ends and i == last else weigh(i - t)  # noqa: E731
    return now - sum(weight(i) * cost[i] for i in range(t + 1, len(row)))


def definition(options: LossOptions) -> dict[str, torch.Tensor]:
    """Σ_s P(s) Σ_a ∇π(a|s) Q(s, a), where Q is the mean of `estimate` over all that can follow."""
    model, table = policy()
    surrogate = torch.zeros((), dtype=torch.float64)
    for state, log_pi in table.items():
        if EOS in state:
            continue
        q = []
        for action in range(VOCAB):
            begun = (*state, action)
            rows = [row for row in COMPLETIONS if row[: len(begun)] == begun]
            q.append(sum(probability(row, len(begun)) * estimate(row, len(state), options) for row in rows))
        surrogate = surrogate + probability(state) * (log_pi.exp() * torch.tensor(q)).sum()
    model.zero_grad()
    surrogate.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected(options: LossOptions, completions=COMPLETIONS) -> dict[str, torch.Tensor]:
    """Σ over all completions of their probability times what the program adds for one of them."""
    model = copy.deepcopy(student())
    learner = Learner(model, Head.of(model, VOCAB), CapturedGradient(model), options)
    table, total = policy()[1], {}
    for row in completions:
        log_pi = np.array([float(table[row[:t]][row[t]].detach()) for t in range(len(row))])
        policy_gradient(learner, scored([row], log_pi, VOCAB), 0)
        for name, p in model.named_parameters():
            total[name] = total.get(name, 0) - p.grad.double() * probability(row) * len(row)  # of the sum, not the mean
            p.grad = None
    return total


def assert_same(one, other, tolerance: float = 2e-5):
    size = max(float(value.abs().max()) for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance * size)


MEMBERS = [
    {"k": 1},
    {"k": 2},
    {"k": 2, "tail": "jump"},
    {"k": 2, "tail": "jump", "end_weight": 1.0},
    {"weights": "flat", "lam": 0.25},
    {"weights": "flat", "lam": 0.25, "end_weight": 1.0},
    {"weights": "gae", "lam": 0.7},
    {"weights": "gae", "lam": 0.5, "cost": "kl"},
    {"weights": "mean"},
    {"weights": "flat", "lam": 0.0, "cost": "kl"},
]


@pytest.mark.parametrize("exact", [0, 2, VOCAB])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_the_expected_gradient_is_the_definition(member, exact):
    """For every number of logits kept: 0 is the token drawn alone."""
    given = {"exact": True, "keep_top": exact} if exact else {}
    options = LossOptions(**member, **given, importance=False)
    assert_same(definition(options), expected(options))


def test_the_exact_first_step_without_a_future_is_the_gradient_of_reverse_kl():
    """Σ_s P(s) ∇KL(π‖p), with the states as constants."""
    model, table = policy()
    loss = torch.zeros((), dtype=torch.float64)
    for state, log_pi in table.items():
        if EOS not in state:
            log_p = torch.tensor(teacher_logits(state)).log_softmax(0)
            loss = loss + probability(state) * (log_pi.exp() * (log_pi - log_p)).sum()
    model.zero_grad()
    loss.backward(retain_graph=True)
    wanted = {name: -p.grad for name, p in model.named_parameters() if p.grad is not None}
    options = LossOptions(weights="flat", lam=0.0, cost="kl", exact=True, keep_top=VOCAB, importance=False)
    assert_same(wanted, expected(options))


def test_flat_is_the_mean_of_the_shifted_combs_and_a_mix_of_q_and_the_one_step_return():
    rng = np.random.default_rng(0)
    q, lengths, k = rng.normal(size=(5, 12)), np.array([12, 1, 7, 0, 9]), 4
    m = q + rng.exponential(size=q.shape)
    flat = k_step_returns(q, m, lengths, weights="flat", lam=1 / k)
    gap = np.where(np.arange(12) < lengths[:, None], m - q, 0)
    shifted = []
    for shift in range(1, k + 1):  # lands on t + shift, t + shift + k, …
        future = np.zeros_like(q)
        for t in range(12):
            future[:, t] = gap[:, t + shift :: k].sum(1)
        shifted.append(q - future)
    inside = np.arange(12) < lengths[:, None]
    np.testing.assert_allclose(flat[inside], np.mean(shifted, 0)[inside], atol=1e-12)
    one = k_step_returns(q, m, lengths)
    np.testing.assert_allclose(flat[inside], ((1 - 1 / k) * q + one / k)[inside], atol=1e-12)


def test_gae_is_the_one_of_schulman_with_the_largest_q_as_critic():
    """A_t = Σ_j λ^j δ_{t+j}, δ_t = r_t + V_{t+1} − V_t, V = max q, r_t = q_t − m_{t+1}, V = 0 after the end."""
    rng = np.random.default_rng(1)
    q, lam = rng.normal(size=9), 0.8
    m = q + rng.exponential(size=9)
    after = np.append(m[1:], 0.0)
    delta = (q - after) + after - m
    wanted = [sum(lam ** (i - t) * delta[i] for i in range(t, 9)) for t in range(9)]
    got = k_step_returns(q[None], m[None], [9], weights="gae", lam=lam, normalization="advantage")
    np.testing.assert_allclose(got[0], wanted, atol=1e-12)


def test_centred_costs_are_free_on_average_but_for_the_end():
    rows = [(2, 3, EOS), (3, 2, 2), (EOS,), (2, EOS)]
    batch = scored(rows, np.zeros(9), 0)
    options = LossOptions(weights="flat", lam=1.0, normalization="raw", cost="centred")
    gap = batch.scores.max_q.astype(np.float64) - batch.scores.q
    middle = [1, 4, 5]  # of rows 0 and 1: neither a first token nor an EOS
    price = gap[middle].mean()
    got = learning_signal(batch, options).advantage
    q = batch.scores.q
    wanted = [q[0] - (gap[1] - price) - gap[2], q[1] - gap[2], q[2], q[3] - (gap[4] + gap[5] - 2 * price)]
    wanted += [q[4] - (gap[5] - price), q[5], q[6], q[7] - gap[8], q[8]]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "min-variance"])
def test_a_baseline_of_the_exact_step_is_of_its_future(baseline):
    """Which has the same advantage in every state without a future; so there it changes nothing."""
    model = copy.deepcopy(student())
    options = LossOptions(weights="flat", lam=0.0, exact=True, keep_top=VOCAB)
    learner = Learner(model, Head.of(model, VOCAB), CapturedGradient(model), options)
    batch = scored([(2, 3, EOS), (3, EOS)], np.full(5, -1.0), VOCAB)
    policy_gradient_step(learner, batch, 0)
    plain = learner.optimizer.gradient
    other = Learner(model, learner.head, CapturedGradient(model), options.model_copy(update={"baseline": baseline}))
    policy_gradient_step(other, batch, 0)
    for name, value in plain.items():
        torch.testing.assert_close(other.optimizer.gradient[name], value, rtol=0, atol=1e-7)


def test_the_anchor_adds_the_cross_entropy_of_the_outputs_to_the_gradient_of_the_others():
    """However the two kinds lie in the batch. The cross-entropy is that of the model's own forward pass."""
    samples, outputs = [(2, 3, EOS), (3, EOS)], [(2, EOS), (0, 2, 3)]
    table, anchored = policy()[1], 0.7

    def gradient(options: LossOptions, rows, *from_teacher) -> tuple[dict[str, torch.Tensor], float]:
        model = copy.deepcopy(student())
        learner = Learner(model, Head.of(model, VOCAB), CapturedGradient(model), options)
        logprob = np.array([float(table[row[:t]][row[t]].detach()) for row in rows for t in range(len(row))])
        found = policy_gradient_step(learner, scored(rows, logprob, VOCAB), 0, *from_teacher)
        return learner.optimizer.gradient, found.loss

    options = LossOptions(weights="gae", lam=0.7, exact=True, keep_top=VOCAB)
    plain, loss = gradient(options, samples)
    mixed = [samples[0], outputs[0], outputs[1], samples[1]]
    kinds = np.array([False, True, True, False])
    got, anchored_loss = gradient(options.model_copy(update={"anchor": anchored}), mixed, kinds)
    model = policy()[0]
    model.zero_grad()
    entropy = -sum(table[row[:t]][row[t]] for row in outputs for t in range(len(row))) / 5
    (anchored * entropy).backward(retain_graph=True)
    wanted = {name: plain[name].double() + p.grad for name, p in model.named_parameters() if name in plain}
    assert_same({name: value.double() for name, value in got.items()}, wanted)
    assert anchored_loss == pytest.approx(loss + anchored * float(entropy.detach()), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "flat", "k": 8}, "weights flat has no --k"),
        ({"lam": 0.5}, "weights comb has no --lam"),
        ({"k": 2, "end_weight": 1.0}, "set --tail jump"),
    ],
)
def test_options_of_other_weights_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**given)
