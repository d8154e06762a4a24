"""Divergences off the largest logits, against torch's own over full distributions; and the min-variance baseline."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from ketchup_cache.method import divergences as d
from ketchup_cache.method.baselines import min_variance_baseline
from ketchup_cache.method.losses import squared_score

V = 9


def full(name: str, p_logits: torch.Tensor, s_logits: torch.Tensor) -> torch.Tensor:
    """Over whole distributions, in float64, by torch's own kl_div."""
    p, s = p_logits.double().log_softmax(1), s_logits.double().log_softmax(1)
    if name == "tvd":
        return (p.exp() - s.exp()).abs().sum(1) / 2
    m = ((p.exp() + s.exp()) / 2).log()
    of, to = {"forward_kl": (p, s), "reverse_kl": (s, p), "js_teacher_half": (p, m), "js_student_half": (s, m)}[name]
    return F.kl_div(to, of, reduction="none", log_target=True).sum(1)  # KL(of‖to)


def ours(name: str, p_logits: torch.Tensor, s_logits: torch.Tensor, top: int) -> torch.Tensor:
    top_q, top_ids = p_logits.topk(top, dim=1)
    rest = p_logits.scatter(1, top_ids, -torch.inf).logsumexp(1)
    teacher = d.teacher_buckets(top_q, rest, p_logits.shape[1])
    return getattr(d, name)(teacher, d.student_buckets(s_logits, top_ids))


def lumped(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the buckets, one row at a time."""
    rests = [[i for i in range(logits.shape[1]) if i not in keep] for keep in ids.tolist()]
    rows = zip(logits.double(), ids, rests, strict=True)
    return torch.stack([torch.cat([row[keep], row[rest].logsumexp(0, keepdim=True)]) for row, keep, rest in rows])


NAMES = ("forward_kl", "reverse_kl", "js_teacher_half", "js_student_half", "tvd")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.3, 3.0, 20.0])
@pytest.mark.parametrize("top", [1, 3, V - 1, V])
def test_values_and_gradients_equal_the_full_ones(name, scale, top):
    g = torch.Generator().manual_seed(7)
    p = torch.randn(40, V, generator=g) * scale
    s = (torch.randn(40, V, generator=g) * scale).requires_grad_()
    value = ours(name, p, s, top)
    ids = p.topk(top, dim=1).indices
    plain = full(name, p, s) if top == V else full(name, lumped(p, ids), lumped(s, ids))
    # float32 log π near -100 is rounded by 4e-6, so π by a share of that, and reverse KL multiplies π with such numbers
    rounding = 3 if name == "reverse_kl" else 1
    torch.testing.assert_close(value.double(), plain, rtol=rounding * 1e-6, atol=1e-6)
    (ours_grad,) = torch.autograd.grad(value.sum(), s)
    (plain_grad,) = torch.autograd.grad(plain.sum(), s)
    atol = 3e-6 * max(1.0, float(plain.detach().max()) if name == "reverse_kl" else 1.0)
    torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "tvd"])
def test_more_logits_never_lower_it(name):
    g = torch.Generator().manual_seed(3)
    p, s = (torch.randn(50, V, generator=g) * 3 for _ in range(2))
    names = [name] if name != "js" else ["js_teacher_half", "js_student_half"]
    values = torch.stack([sum(ours(one, p, s, top) for one in names) / len(names) for top in range(1, V + 1)])
    assert (values.diff(dim=0) > -1e-5).all()
    assert (values[0] < values[-1] - 1e-3).any()


def six(largest: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-largest, largest, width=32), min_size=6, max_size=6)


@given(six(200), six(1e4), st.integers(1, 6), st.sampled_from(NAMES))
@settings(max_examples=300)
def test_no_nan_whatever_the_tail(p, s, top, name):
    p_logits, s_logits = torch.tensor([p]), torch.tensor([s], requires_grad=True)
    value = ours(name, p_logits, s_logits, top)
    (gradient,) = torch.autograd.grad(value.sum(), s_logits)
    assert torch.isfinite(gradient).all()
    # float32 numbers near 1e4 are 1e-3 apart, and these are logarithms
    largest = {"js_teacher_half": np.log(2) + 1e-4, "js_student_half": np.log(2) + 1e-4, "tvd": 1 + 2e-3}
    assert -1e-4 <= float(value.detach()) <= largest.get(name, np.finfo(np.float32).max)


def test_a_tail_without_mass_adds_nothing():
    p = torch.tensor([[200.0, 0.0, -50.0]])  # float32: exp(-200) is 0
    assert d.teacher_buckets(p[:, :1], p[:, 1:].logsumexp(1), 3).tolist() == [[0.0, -200.0]]
    nothing = torch.tensor([-torch.inf])
    assert d.teacher_buckets(p[:, :1], nothing, 3).tolist() == [[0.0, -torch.inf]]
    s = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    value = ours("forward_kl", p, s, 1)
    assert float(value.detach()) == pytest.approx(-float(s.detach().log_softmax(1)[0, 0]), rel=1e-6)


def test_what_the_teacher_rules_out_has_a_price():
    """Finite, and the gradient takes the student's mass away from it."""
    p, s = torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    teacher = d.teacher_buckets(p, torch.tensor([-torch.inf]), 3)
    value = d.reverse_kl(teacher, d.student_buckets(s, torch.arange(3)[None]))
    mass = s.detach().softmax(1)[0]
    rest = sum(float(mass[i] * (mass[i].log() - p.log_softmax(1)[0, i])) for i in (0, 2))
    assert float(value.detach()) == pytest.approx(rest + float(mass[1] * (mass[1].log() - d.FLOOR)), rel=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert float(gradient[0, 1]) > 100
    assert (gradient[0, [0, 2]] < 0).all()


def test_squared_score_is_the_norm_of_the_gradient():
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(30, V, generator=g) * 4).requires_grad_()
    targets = torch.randint(V, (30,), generator=g)
    logprob = logits.log_softmax(1).gather(1, targets[:, None])
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    torch.testing.assert_close(squared_score(logits.detach(), targets), gradient.square().sum(1), rtol=1e-4, atol=1e-6)


def test_min_variance_baseline_has_the_least_variance():
    """Σ w (G − b)² of each step is the second moment of the gradient; no b on a grid does better."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 2, (24, V)))
    targets = torch.tensor(rng.integers(0, V, 24))
    score = (F.one_hot(targets, V) - logits.softmax(1)).numpy().reshape(8, 3, V)
    returns, real = rng.normal(-3, 4, (8, 3)), rng.random((8, 3)) < 0.8
    weight = squared_score(logits, targets).numpy().reshape(8, 3)
    found = min_variance_baseline(returns, real, weight)
    assert (found == found[0]).all()
    for t in range(3):
        rows = np.flatnonzero(real[:, t])
        moment = lambda b, t=t, rows=rows: np.square((returns[rows, t] - b)[:, None] * score[rows, t]).sum()  # noqa: E731
        grid = np.linspace(found[0, t] - 2, found[0, t] + 2, 4001)
        assert abs(grid[np.argmin([moment(b) for b in grid])] - found[0, t]) < 2e-3
    assert (min_variance_baseline(returns, real, np.zeros((8, 3))) == 0).all()
