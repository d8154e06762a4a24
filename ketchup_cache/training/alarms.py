"""Alarms: what goes wrong in a run of `learn`, said once each, with the remedy. docs/training.md has the thresholds.

They follow from the lines of metrics.jsonl and dev.jsonl alone, so a run that was killed and goes on knows them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.config.methods import METHODS
from ketchup_cache.config.values import LOWER_IS_BETTER

WINDOW = 10
"""Optimizer steps that a mean is of."""
LENGTH_DRIFT = 0.1
"""Relative change of the mean length since the start."""
ENTROPY_LEFT = 0.5
"""Share of the start's entropy per token."""
OFTEN_CUT = 0.2
"""Share of rollouts that were cut at the length limit."""
LOW_ESS = 0.3
"""Effective sample size of the importance ratios, as a share."""
REPETITION = 0.2
"""Share of 4-grams that came before in the same completion; and twice the start's."""
MOSTLY_TAIL = 0.6
"""Share of tokens among the last K of their completion."""
WORSE = 0.02
"""Relative loss of the dev metric since its best, in two evaluations one after the other."""
BELOW = 0.05
"""Relative loss of the dev metric since the start, in two evaluations one after the other."""
FALL = 0.1
"""Relative fall of the return since the start."""
ERRORS = 5.0
"""A change counts when it is larger than this many of its standard errors: it is looked for after every step."""

STOP = "lower --lr, or stop earlier (--eval-data with --patience)"
TEXTS = {
    "dropped": "{share:.0%} of the first rollouts were cut at --max-new-tokens and are dropped, so the student learns "
    "from short ones alone; raise --max-new-tokens, or keep them with --unfinished bootstrap",
    "tails": "{share:.0%} of the tokens are among the last {k} of their completion, where K = {k} steps one by one as "
    "K = 1 does; choose a smaller --k, or --tail jump",
    "unfinished": "{share:.0%} of the rollouts are cut at --max-new-tokens {longest}; raise it, or pre-distil the "
    "student for longer so that it learns to stop",
    "ess": "the effective sample size is {ess:.2f}: the rollouts are another policy's; lower --refresh-every, --reuse "
    "or --lr, or make rollouts of this student",
    "entropy": "the student's entropy fell from {before:.2f} to {now:.2f} nats per token, it explores less; " + STOP,
    "repetition": "{now:.0%} of the 4-grams of a rollout came before in it ({before:.0%} at the start); " + STOP,
    "length": "the mean length of {whose} went from {before:.1f} to {now:.1f} tokens ({change:+.0%}), and a return is "
    "a sum over them; try --baseline leave-one-out, " + STOP,
    "return": "the return of {whose} fell from {before:.2f} to {now:.2f}, the student gets worse; try a larger "
    "--batch-size, another --k, --baseline or --method, " + STOP,
    "worse": "{name} on the dev set is worse than at the start, in two evaluations ({before:.2f}, {value:.2f} now): "
    "keep best/; try a fifth of --lr, more --warmup, another --baseline or --method, " + STOP,
    "hacked": "the return rises ({before:.2f} → {now:.2f}) while {name} on the dev set falls ({best:.2f} at step {at}, "
    "{value:.2f} now): the student exploits the reward; keep best/, try another --k, --baseline or --method, " + STOP,
}
Line = Mapping[str, Any]
Values = dict[str, Any]
"""What stands in the text of an alarm."""


@dataclass(frozen=True)
class Alarm:
    """name: one word. step: of the optimizer, after which it was raised. text: what is wrong, and what to do."""

    name: str
    step: int
    text: str


@dataclass
class Alarms:
    """Fed with every line of metrics and every evaluation, in order. Each returns the alarms that it raises."""

    config: LearnConfig
    raised: dict[str, Alarm] = field(default_factory=dict)
    _lines: list[Line] = field(default_factory=list)
    _start: int = 0
    """Number of steps that learned from the start's own rollouts."""
    _phases: list[int] = field(default_factory=list)
    """At which of the lines new rollouts came."""
    _dev: list[Line] = field(default_factory=list)
    _returns: list[list[float]] = field(default_factory=list)
    """At each evaluation the mean return on the dev set, where that is measured; else those of the rollouts of each
    refresh since the last evaluation."""

    def step(self, line: Line) -> list[Alarm]:
        """After an optimizer step. line: of metrics.jsonl."""
        self._lines.append(line)
        if line["refreshed"]:
            self._phases.append(len(self._lines) - 1)
        if self._start == len(self._lines) - 1 and not (self._start and line["refreshed"]):
            self._start += 1
        return self._raise(line["step"], self._of_steps())

    def dev(self, record: Line) -> list[Alarm]:
        """After an evaluation. record: of dev.jsonl."""
        since = self._dev[-1]["step"] if self._dev else 0
        self._dev.append(record)
        if (value := record["metrics"].get("return")) is not None:
            self._returns.append([value])
        else:
            self._returns.append(_of_phases([m for m in self._lines if m["step"] >= since]))
        return self._raise(record["step"], self._of_dev())

    def _raise(self, step: int, found: Iterator[tuple[str, Values]]) -> list[Alarm]:
        new = [Alarm(name, step, TEXTS[name].format(**values)) for name, values in found if name not in self.raised]
        self.raised |= {alarm.name: alarm for alarm in new}
        return new

    def _of_steps(self) -> Iterator[tuple[str, Values]]:
        config, line = self.config, self._lines[-1]
        if len(self._lines) == 1 and METHODS[config.method].step == "policy_gradient":
            if config.unfinished == "drop" and line["unfinished"] >= OFTEN_CUT:
                yield "dropped", {"share": line["unfinished"]}
            if config.k > 1 and config.tail == "one-step" and line["tail"] >= MOSTLY_TAIL:
                yield "tails", {"share": line["tail"], "k": config.k}
        if len(self._lines) < WINDOW:
            return
        first = self._lines[: WINDOW if config.offline else max(WINDOW, self._start)]
        last = self._lines[-WINDOW:]
        if (share := _mean(last, "unfinished") or 0) >= OFTEN_CUT:
            yield "unfinished", {"share": share, "longest": config.max_new_tokens}
        if (ess := _mean(last, "ess")) is not None and ess < LOW_ESS:
            yield "ess", {"ess": ess}
        before, now, error = _change(_values(first, "entropy"), _values(last, "entropy"))
        if now < ENTROPY_LEFT * before and before - now > ERRORS * error:
            yield "entropy", {"before": before, "now": now}
        if config.offline or len(self._lines) < len(first) + WINDOW:
            return
        before, now = _mean(first, "repetition") or 0, _mean(last, "repetition") or 0
        if now >= max(REPETITION, 2 * before):
            yield "repetition", {"before": before, "now": now}
        before, now, error = _change(_values(first, "length_mean"), _values(last, "length_mean"))
        if abs(now - before) > max(LENGTH_DRIFT * before, ERRORS * error):
            yield "length", {"whose": "the rollouts", "before": before, "now": now, "change": now / before - 1}
        if (some := min(WINDOW, len(self._phases) // 2)) > 2:
            first, last = self._lines[: self._phases[some]], self._lines[self._phases[-some] :]
            before, now, error = _change(_of_phases(first), _of_phases(last))
            if before - now > max(FALL * abs(before), ERRORS * error):
                yield "return", {"whose": "new rollouts", "before": before, "now": now}

    def _of_dev(self) -> Iterator[tuple[str, Values]]:
        before, now = self._dev[0]["length_mean"], self._dev[-1]["length_mean"]
        if abs(now - before) > LENGTH_DRIFT * before:
            whose = "the outputs on the dev set"
            yield "length", {"whose": whose, "before": before, "now": now, "change": now / before - 1}
        if "return" in self._dev[0]["metrics"] and len(self._dev) > 2:
            (before,), *_, (last,), (now,) = self._returns
            if before - max(last, now) > FALL * abs(before):
                yield "return", {"whose": "the outputs on the dev set", "before": before, "now": now}
        name = next(iter(self._dev[0]["metrics"]))
        values = np.array([record["metrics"][name] for record in self._dev])
        signed = -values if name in LOWER_IS_BETTER else values
        if name != "return" and len(values) > 2 and signed[0] - signed[-2:].max() > BELOW * abs(values[0]):
            yield "worse", {"name": name, "before": values[0], "value": values[-1]}
        best = int(signed.argmax())
        if name == "return" or best > len(values) - 3 or signed[-2:].max() >= signed[best] - WORSE * abs(values[best]):
            return
        # no rollouts came before the start
        measured = "return" in self._dev[0]["metrics"]
        then, since = self._returns[best if measured else max(best, 1)], self._returns[-1]
        enough = measured or (min(len(then), len(since)) > 2 and not self.config.offline)
        before, now, error = _change(then, since)
        if enough and now - before > ERRORS * error:
            numbers = {"best": values[best], "at": self._dev[best]["step"], "value": values[-1]}
            yield "hacked", {"name": name, "before": before, "now": now, **numbers}


def _values(lines: list[Line], name: str) -> list[float]:
    return [value for line in lines if (value := line.get(name)) is not None]


def _mean(lines: list[Line], name: str) -> float | None:
    values = _values(lines, name)
    return float(np.mean(values)) if values else None


def _change(before: list[float], now: list[float]) -> tuple[float, float, float]:
    """Both means, and the standard error of their difference; all 0 where there is nothing to compare."""
    if not before or not now:
        return 0.0, 0.0, 0.0
    first, last = np.array(before), np.array(now)
    error = np.hypot(*(part.std() / max(len(part) - 1, 1) ** 0.5 for part in (first, last)))
    return float(first.mean()), float(last.mean()), float(error)


def _of_phases(lines: list[Line]) -> list[float]:
    """Mean return of the rollouts of each refresh: other prompts, so the steps of one are no independent values."""
    phases: list[list[float]] = []
    for line in lines:
        if line["refreshed"] or not phases:
            phases.append([])
        phases[-1] += _values([line], "return_mean")
    return [float(np.mean(phase)) for phase in phases if phase]
