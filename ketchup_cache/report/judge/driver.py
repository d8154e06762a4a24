"""Driver of `judge`: win rates of one system's outputs over another's, by an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ketchup_cache.config.commands import JudgeConfig
from ketchup_cache.console import progress
from ketchup_cache.errors import ConfigError, DataError, JudgeError
from ketchup_cache.report.judge.answers import Answers, key
from ketchup_cache.report.judge.queries import queries, verdict


@dataclass(frozen=True)
class WinRate:
    """One aspect. The unit is the pair: its score is the mean of its four verdicts (1 win, 0.5 tie, 0 loss).

    win_rate: mean score in percent. low, high: its 95 % Wilson interval over pairs, too wide rather than too narrow
        where the four verdicts of a pair disagree. None where no pair counts.
    won, tied, lost: pairs by score, above, at and below one half. Identical outputs are ties, not asked about.
    left_out: pairs without four readable answers; with fewer, a taste for a place or a letter would not cancel.
    """

    aspect: str
    win_rate: float | None
    low: float | None
    high: float | None
    won: int
    tied: int
    lost: int
    left_out: int
    unreadable: int


@dataclass(frozen=True)
class Judgement:
    """pairs: those judged; identical: of these, pairs of equal outputs. asked: queries sent now; cached: known."""

    system: str
    baseline: str
    model: str
    pairs: int
    identical: int
    asked: int
    cached: int
    aspects: tuple[WinRate, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.system} over {self.baseline}, judged by {self.model}: {self.pairs:,} pairs "
            f"({self.identical:,} identical), {self.asked:,} queries, {self.cached:,} from --answers",
            f"  {'':<16} {'win rate':>9} {'95 % interval':>16} {'won':>6} {'tied':>6} {'lost':>6}",
        ]
        for a in self.aspects:
            rate = "–" if a.win_rate is None else f"{a.win_rate:.2f} %"
            interval = "–" if a.low is None else f"{a.low:.2f} – {a.high:.2f}"
            lines.append(f"  {a.aspect:<16} {rate:>9} {interval:>16} {a.won:>6,} {a.tied:>6,} {a.lost:>6,}")
            if a.unreadable:
                lines[-1] += f"   {a.unreadable:,} unreadable answers, {a.left_out:,} pairs left out"
        return "\n".join(lines)


def judge(config: JudgeConfig) -> Judgement:
    """Ask about every pair; answers are kept in `config.answers` as they come, and never asked for again.

    Raises DataError for files that are not outputs of the same prompts, ConfigError without the `openai` package or an
    API key, JudgeError where the endpoint refuses or fails after all retries.
    """
    pairs = _pairs(config)
    identical = {i for i, (_, system, baseline) in enumerate(pairs) if system == baseline}
    asked = [
        query
        for i, (prompt, system, baseline) in enumerate(pairs)
        for aspect in config.aspects
        if i not in identical
        for query in queries(i, aspect, config.kind, prompt, system, baseline)
    ]
    requests = [_request(query.text, config) for query in asked]
    keys = [key(request) for request in requests]
    answers = Answers(config.answers)
    missing = {k: request for k, request in zip(keys, requests, strict=True) if k not in answers}
    if missing:
        _ask_all(missing, answers, config)
    verdicts: dict[tuple[str, int], list[float | None]] = {
        (aspect, i): [0.5] * 4 for aspect in config.aspects for i in identical
    }
    for query, k in zip(asked, keys, strict=True):
        verdicts.setdefault((query.aspect, query.pair), []).append(verdict(query, answers[k]))
    return Judgement(
        system=str(config.system),
        baseline=str(config.baseline),
        model=config.judge_model,
        pairs=len(pairs),
        identical=len(identical),
        asked=len(missing),
        cached=len(set(keys)) - len(missing),
        aspects=tuple(_win_rate(aspect, [verdicts[aspect, i] for i in range(len(pairs))]) for aspect in config.aspects),
    )


def _win_rate(aspect: str, pairs: list[list[float | None]]) -> WinRate:
    scores = [sum(v for v in four if v is not None) / 4 for four in pairs if None not in four]
    low, high = wilson(sum(scores) / len(scores), len(scores)) if scores else (None, None)
    return WinRate(
        aspect=aspect,
        win_rate=100 * sum(scores) / len(scores) if scores else None,
        low=None if low is None else 100 * low,
        high=None if high is None else 100 * high,
        won=sum(score > 0.5 for score in scores),
        tied=sum(score == 0.5 for score in scores),
        lost=sum(score < 0.5 for score in scores),
        left_out=len(pairs) - len(scores),
        unreadable=sum(four.count(None) for four in pairs),
    )


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share p of n (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


# ---------------------------------------------------------------------------------------------------------- files


def _pairs(config: JudgeConfig) -> list[tuple[str, str, str]]:
    """(prompt, system's output, baseline's output) of the chosen lines, in the order of the files."""
    system, baseline = _read(config.system), _read(config.baseline)
    again = "evaluate both systems on the same data, with the same --template"
    if len(system) != len(baseline):
        raise DataError(f"{config.system} has {len(system)} outputs, {config.baseline} {len(baseline)}: {again}")
    for number, (ours, theirs) in enumerate(zip(system, baseline, strict=True), start=1):
        if ours[0] != theirs[0]:
            raise DataError(f"{config.system} and {config.baseline}: output {number} has another prompt: {again}")
    chosen = range(len(system))
    if 0 < config.limit < len(system):
        chosen = sorted(random.Random(config.seed).sample(chosen, config.limit))  # type: ignore[assignment]
    return [(system[i][0], system[i][1], baseline[i][1]) for i in chosen]


def _read(path: Path) -> list[tuple[str, str]]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, output = record["prompt"], record["output"]
        except (ValueError, KeyError, TypeError):
            prompt = output = None
        if not isinstance(prompt, str) or not isinstance(output, str):
            raise DataError(f"{path}: line {number}: no prompt and output; `evaluate --outputs FILE` writes such files")
        found.append((prompt, output))
    if not found:
        raise DataError(f"{path}: holds no outputs")
    return found


# ------------------------------------------------------------------------------------------------------- endpoint


def _request(text: str, config: JudgeConfig) -> dict[str, Any]:
    return {
        "model": config.judge_model,
        "messages": [{"role": "user", "content": text}],
        "temperature": config.judge_temperature,
        "max_tokens": config.judge_tokens,
    }


def _ask_all(missing: dict[str, dict[str, Any]], answers: Answers, config: JudgeConfig) -> None:
    ask = _client(config)
    with progress("judge", len(missing), "queries") as bar, ThreadPoolExecutor(config.concurrency) as pool:
        running = {pool.submit(ask, request): k for k, request in missing.items()}
        try:
            for done in as_completed(running):
                answers.add(running[done], done.result())
                bar.advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # those under way are paid for
            for task in as_completed(t for t in running if not t.cancelled()):
                if task.exception() is None and running[task] not in answers:
                    answers.add(running[task], task.result())
            raise


def _client(config: JudgeConfig) -> Callable[[dict[str, Any]], str]:
    """request → text of the answer. Retries with growing pauses, or those the endpoint asks for, are the client's."""
    try:
        import openai
    except ImportError:
        raise ConfigError(["judge needs the openai package: pip install 'ketchup-cache[judge]'"]) from None
    url = config.base_url or os.environ.get("OPENAI_BASE_URL")
    secret = os.environ.get("OPENAI_API_KEY")
    if not (url or secret):
        raise ConfigError(["no endpoint: give --base-url, and its key in the environment as OPENAI_API_KEY"])
    client = openai.OpenAI(
        base_url=url, api_key=secret or "none", max_retries=config.retries, timeout=config.timeout, organization=None
    )
    shown = re.sub(r"(?<=://)[^/@]*@", "", str(client.base_url))

    def ask(request: dict[str, Any]) -> str:
        try:
            reply = client.chat.completions.create(**request)
            return reply.choices[0].message.content or ""
        except openai.APIStatusError as error:
            # the endpoint's own words may hold the key
            reason = f"HTTP {error.status_code}"
        except openai.APITimeoutError:
            reason = f"no answer in {config.timeout:g} s"
        except openai.APIConnectionError:
            reason = "no connection"
        except (openai.OpenAIError, ValueError, LookupError, AttributeError, TypeError) as error:
            reason = f"not an answer of a chat completion ({type(error).__name__})"
        raise JudgeError(
            f"{shown}: {reason}, after {config.retries} retries: check --base-url, --judge-model and OPENAI_API_KEY; "
            f"answers so far are in {config.answers}"
        )

    return ask
