"""How many of the teacher's logits are enough for the divergences: `python -m benchmarks.keep_top [--prompts N]`.

Against the divergences over full distributions, for each N: the relative error of their mean, the relative error of the
gradient with respect to the student's logits (‖g_N − g‖ / ‖g‖ over all tokens), and what the kept logits take on disk.
On a shipped task, with the teacher's greedy outputs and the student's samples of held-out prompts; and on made-up
distributions over 32,000 tokens. Beside that: what keeping logits costs while scoring, and what the min-variance
baseline costs while learning, as ratios of times taken in turn.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import in_turn, options, publish, sample, t5, table
from ketchup_cache import open_cache
from ketchup_cache.cache.zarr_files import encode
from ketchup_cache.config.commands import RolloutConfig, ScoreConfig
from ketchup_cache.config.options import LossOptions
from ketchup_cache.method import divergences
from ketchup_cache.models.forward import Batch, completion_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from ketchup_cache.shipped import task
from ketchup_cache.training.optimizer import Learner, Optimizer
from ketchup_cache.training.policy_gradient import policy_gradient_step
from ketchup_cache.types import Scores, TopLogits

METHODS = ("kl", "reverse-kl", "js", "tvd")
ENOUGH = (0.1, 0.01)
"""Largest relative errors, of value and gradient alike, for which the smallest N that keeps them is named."""
CHUNK = 64


@dataclass
class Part:
    """Teacher and student in the same states. n states, V tokens.

    scores: of all V logits. logits: [n, V] float32 of the student. from_teacher: whether they are states of teacher
    outputs.
    """

    scores: Scores
    logits: Tensor
    from_teacher: bool


def shipped(name: str, prompts: int) -> list[Part]:
    """A shipped teacher and pre-distilled student, in the states that `learn` would see."""
    folder = task(name)
    teacher, student = str(folder / "teacher"), str(folder / "predistilled")
    model = load_model(student, device="cpu")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        common = {"data": str(folder / "dev.jsonl"), "limit": prompts, "cache": path, "device": "cpu"}
        rollout(RolloutConfig(student=teacher, greedy=True, **common))
        rollout(RolloutConfig(student=student, **common))
        score(ScoreConfig(teacher=teacher, cache=path, device="cpu", keep_top=10**6))
        cache, parts = open_cache(path), []
        for ref in cache.scored():
            part = cache.load_scored(ref)
            rollouts = part.rollouts
            head = Head.of(model, part.scores.keep_top)
            batch = Batch(part.prompts.tokens, rollouts.prompt_index, rollouts.completions)
            with torch.no_grad():
                logits = head.logits(completion_states(model, batch))
            parts.append(Part(part.scores, logits, ref.policy.name == teacher))
    return parts


def made_up(vocab: int, tokens: int) -> list[Part]:
    """Logits that fall off with the rank as in natural text (Zipf, exponent 1), with noise; each state is more or less
    certain. The student's are the teacher's with noise of its own, and less certain."""
    rng = np.random.default_rng(0)
    parts = []
    for from_teacher in (True, False):
        certainty = rng.uniform(1, 3, (tokens, 1))
        base = -np.log(np.argsort(rng.random((tokens, vocab)), axis=1) + 1)
        p = (certainty * base + rng.normal(0, 1, (tokens, vocab))).astype(np.float32)
        s = (0.8 * p + rng.normal(0, 1, (tokens, vocab))).astype(np.float32)
        ids = np.argsort(-p, axis=1, kind="stable").astype(np.int32)
        top_q = np.take_along_axis(p, ids, 1)
        total = np.logaddexp.reduce(p.astype(np.float64), axis=1).astype(np.float32)
        nothing = np.full(tokens, -np.inf, np.float32)
        scores = Scores(
            top_q[:, 0], top_q[:, 0], total, p.mean(1), np.zeros(1, np.float32), TopLogits(top_q, ids, nothing)
        )
        parts.append(Part(scores, torch.from_numpy(s), from_teacher))
    return parts


def exact(method: str, part: Part, rows: slice, logits: Tensor) -> Tensor:
    """[n], over full distributions, in float64, by their definitions."""
    q = torch.tensor(part.scores.top.q[rows]).double()
    ids = torch.tensor(part.scores.top.ids[rows]).long()
    log_p = torch.empty_like(q).scatter_(1, ids, q).log_softmax(1)
    log_s = logits.double().log_softmax(1)
    p, s = log_p.exp(), log_s.exp()
    if method == "kl":
        return (p * (log_p - log_s)).sum(1)
    if method == "reverse-kl":
        return (s * (log_s - log_p)).sum(1)
    if method == "tvd":
        return (p - s).abs().sum(1) / 2
    log_m = torch.logaddexp(log_p, log_s) - np.log(2)
    return (p * (log_p - log_m)).sum(1) if part.from_teacher else (s * (log_s - log_m)).sum(1)


def lumped(method: str, part: Part, rows: slice, logits: Tensor, few: Scores) -> Tensor:
    """[n], as `learn` computes it."""
    teacher = divergences.teacher_buckets(
        torch.tensor(few.top.q[rows]), torch.tensor(few.top.rest_logsumexp[rows]), logits.shape[1]
    )
    student = divergences.student_buckets(logits, torch.tensor(few.top.ids[rows]).long())
    return terms_on(part)[method](teacher, student)


def terms_on(part: Part) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Of each method that learns from such states."""
    place = 0 if part.from_teacher else 1
    return {method: terms[place] for method, terms in divergences.TERMS.items() if terms[place]}


def value_and_gradient(part: Part, rows: slice, terms: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    logits = part.logits[rows].clone().requires_grad_()
    value = terms(logits).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient.double()


def measure(parts: list[Part]) -> dict:
    """For each N: of each method, value and relative errors; and bytes per token of the arrays that N adds."""
    vocab, tokens = parts[0].logits.shape[1], sum(len(part.logits) for part in parts)
    tops = [*(n for n in (2**i for i in range(20)) if n < vocab), vocab]
    rows_of = [(p, slice(i, i + CHUNK)) for p in parts for i in range(0, len(p.logits), CHUNK)]
    exact_value, norm, value, difference = ({} for _ in range(4))
    for method in METHODS:
        for part, rows in rows_of:
            if method not in terms_on(part):
                continue
            v, g = value_and_gradient(part, rows, lambda x: exact(method, part, rows, x))  # noqa: B023
            exact_value[method] = exact_value.get(method, 0) + v
            norm[method] = norm.get(method, 0) + float(g.square().sum())
            for n in tops:
                few = part.scores.with_top(n)
                v, h = value_and_gradient(part, rows, lambda x: lumped(method, part, rows, x, few))  # noqa: B023
                value[method, n] = value.get((method, n), 0) + v
                difference[method, n] = difference.get((method, n), 0) + float((h - g).square().sum())
    count = {m: sum(len(p.logits) for p in parts if m in terms_on(p)) for m in METHODS}
    rows = [
        {
            "keep_top": n,
            "bytes_per_token": sum(stored_bytes(part.scores.with_top(n)) for part in parts) / tokens,
            "teacher_mass": float(np.mean(np.concatenate([mass(part.scores.with_top(n)) for part in parts]))),
            "value_error": {m: abs(value[m, n] / exact_value[m] - 1) for m in METHODS},
            "gradient_error": {m: (difference[m, n] / norm[m]) ** 0.5 for m in METHODS},
        }
        for n in tops
    ]
    worst = {r["keep_top"]: max(*r["value_error"].values(), *r["gradient_error"].values()) for r in rows}
    return {
        "vocabulary": vocab,
        "tokens": tokens,
        "exact": {m: exact_value[m] / count[m] for m in METHODS},
        "rows": rows,
        "enough": {f"{e:.0%}": min(n for n, error in worst.items() if error < e) for e in ENOUGH},
    }


def mass(scores: Scores) -> np.ndarray:
    """[n], the teacher's probability of the kept tokens."""
    return np.exp(scores.top.q.astype(np.float64) - scores.logsumexp[:, None]).sum(1)


def stored_bytes(scores: Scores) -> int:
    """Of the arrays that are there because of --keep-top, compressed as a segment has them."""
    vocab_bytes = np.uint16 if scores.top.ids.max(initial=0) < 2**16 else np.uint32
    arrays = {"top_q": scores.top.q, "top_ids": scores.top.ids.astype(vocab_bytes)}
    if np.isfinite(scores.top.rest_logsumexp).all():
        arrays["rest_logsumexp"] = scores.top.rest_logsumexp
    return sum(len(data) for data in encode(arrays).values())


def report(name: str, found: dict) -> None:
    exact = ", ".join(f"{m.upper()} {v:.4f}" for m, v in found["exact"].items())
    enough = "; ".join(f"all errors below {e} from N = {n:,}" for e, n in found["enough"].items())
    print(f"\n{name}: {found['tokens']:,} tokens, V = {found['vocabulary']:,}; per token {exact}; {enough}.\n")
    columns = [f"{m.upper()}{w}" for w in ("", " ∇") for m in METHODS]
    rows = []
    for row in found["rows"]:
        errors = [*row["value_error"].values(), *row["gradient_error"].values()]
        shown = [f"{error:.1%}" if error > 1e-3 else f"{error:.0e}" for error in errors]
        rows.append((f"{row['keep_top']:,}", f"{row['bytes_per_token']:,.0f}", f"{row['teacher_mass']:.2%}", *shown))
    print(table(("N", "bytes/token", "teacher's mass", *columns), rows))


def costs(states: int) -> dict[str, float]:
    """Time, relative to the same without: of the head's reductions, T5-small's shape, and of the extra pass
    for the min-variance baseline, against a whole optimizer step of a 2-layer T5 with T5's vocabulary."""
    torch.manual_seed(0)
    model = t5({"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 8}, vocab_size=32_100)
    head = Head.of(model, 32_100)
    hidden, targets = torch.randn(states, 512), torch.randint(32_100, (states,))
    reduce = in_turn(
        {"0": lambda: head.reduce(hidden, targets), "64": lambda: head.reduce(hidden, targets, keep_top=64)}, 3
    )
    batch = sample(0, 16)
    plain = LossOptions(k=2, lr=1e-9, weight_decay=0)
    optimizer = Optimizer(model, plain, 99)
    ways = {"none": plain, "min-variance": plain.model_copy(update={"baseline": "min-variance"})}
    learners = {name: Learner(model, head, optimizer, options) for name, options in ways.items()}
    step = in_turn({name: lambda it=it: policy_gradient_step(it, batch, 0) for name, it in learners.items()}, 3)
    return {
        "reduce, keep_top 64 / 0": reduce["64"] / reduce["0"],
        "optimizer step, min-variance / none": step["min-variance"] / step["none"],
    }


def main() -> None:
    chosen = options(__doc__)
    results = {"translate": measure(shipped("translate", 10 if chosen.short else 100))}
    report("translate", results["translate"])
    made = (1_000, 32) if chosen.short else (32_000, 128)
    results["made up"] = measure(made_up(*made))
    report("made up", results["made up"])
    ratios = costs(128 if chosen.short else 1024)
    print()
    for name, ratio in ratios.items():
        print(f"time, {name}: {ratio:.2f}")
    publish("keep_top", chosen, **results, time=ratios)


if __name__ == "__main__":
    main()
