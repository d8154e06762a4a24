"""Win rates of one system's outputs over another's, judged by a model behind an OpenAI-compatible endpoint (Table 2).

    pip install 'ketchup-cache[judge]'
    ketchup-cache evaluate --model k4/best --data test.jsonl --outputs k4.jsonl   # the same for the other system
    python examples/judge.py k4.jsonl kl.jsonl --judge-model NAME --base-url http://127.0.0.1:8000/v1 --limit 500

The key of the endpoint is read from OPENAI_API_KEY. Each pair is asked about four times for each aspect: both orders ×
both names, so that a taste for a place or a letter cancels out.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ketchup_cache.console import Report, progress
from ketchup_cache.errors import ConfigError, DataError, KetchupError
from ketchup_cache.files import writing

CRITERIA = {
    "summary of the document": {
        "quality": "whether it is short and exact, and states what matters most in the document and nothing else",
        "informativeness": "whether it holds the important details of the document and leaves out the unimportant",
        "coherence": "whether it is well ordered and easy to follow",
    },
    "translation of the source": {
        "quality": "whether it says what the source says, completely and in natural language",
        "informativeness": "whether it keeps all that the source says and adds nothing",
        "coherence": "whether it is fluent, well ordered and easy to understand",
    },
}
"""What the outputs are, beginning with the kind → aspect → what to look at."""
ASPECTS = ("quality", "informativeness", "coherence")


class JudgeError(KetchupError):
    """Raised when the endpoint refuses a query or fails after all retries. Answers so far are kept."""


@dataclass(frozen=True)
class JudgeConfig:
    """Options; `arguments` gives their meaning."""

    system: Path
    baseline: Path
    judge_model: str
    base_url: str | None = None
    kind: str = "summary"
    aspects: Sequence[str] = ASPECTS
    answers: Path = Path("judge-answers.jsonl")
    limit: int = 0
    seed: int = 0
    concurrency: int = 8
    judge_temperature: float = 0.0
    judge_tokens: int = 256
    retries: int = 5
    timeout: float = 120.0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="judge.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("system", type=Path, help="outputs of the system to judge, from `evaluate --outputs`")
    parser.add_argument("baseline", type=Path, help="outputs of the system to compare with, for the same prompts")
    parser.add_argument("--judge-model", required=True, help="model that judges, by its name at the endpoint")
    parser.add_argument("--base-url", help="OpenAI-compatible endpoint; without it: OPENAI_BASE_URL, else OpenAI")
    parser.add_argument("--kind", choices=["summary", "translation"], help="what the outputs are")
    parser.add_argument("--aspects", nargs="+", choices=ASPECTS, help="what is asked about")
    parser.add_argument("--answers", type=Path, help="file of all answers; what it holds is not asked again")
    parser.add_argument("--limit", type=_whole(0), help="number of pairs to judge, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, help="seed of that draw")
    parser.add_argument("--concurrency", type=_whole(1), help="queries at the same time")
    parser.add_argument("--judge-temperature", type=float, help="sampling temperature of the judge")
    parser.add_argument("--judge-tokens", type=_whole(1), help="longest answer of the judge, in tokens")
    parser.add_argument("--retries", type=_whole(0), help="tries after a query that failed, with growing pauses")
    parser.add_argument("--timeout", type=float, help="seconds to wait for an answer")
    parser.set_defaults(**{f.name: f.default for f in fields(JudgeConfig) if f.default is not MISSING})
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise ValueError
        return value

    return whole_number


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C."""
    parser = arguments()
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = vars(parser.parse_args(given))
    as_json = options.pop("json")
    try:
        result = judge(JudgeConfig(**options))
    except KetchupError as error:
        print(f"judge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("judge: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    print(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else result)
    return 0


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

    @classmethod
    def of(cls, aspect: str, pairs: list[list[float | None]]) -> WinRate:
        """pairs: the four verdicts of each."""
        scores = [sum(v for v in four if v is not None) / 4 for four in pairs if None not in four]
        mean = sum(scores) / len(scores) if scores else None
        low, high = (None, None) if mean is None else (100 * bound for bound in wilson(mean, len(scores)))
        won, tied, unreadable = sum(s > 0.5 for s in scores), scores.count(0.5), sum(f.count(None) for f in pairs)
        counts = (won, tied, len(scores) - won - tied, len(pairs) - len(scores), unreadable)
        return cls(aspect, None if mean is None else 100 * mean, low, high, *counts)

    def __str__(self) -> str:
        rate = "–" if self.win_rate is None else f"{self.win_rate:.2f} %"
        interval = "–" if self.low is None else f"{self.low:.2f} – {self.high:.2f}"
        bad = f"   {self.unreadable:,} unreadable answers, {self.left_out:,} pairs left out" if self.unreadable else ""
        return f"  {self.aspect:<16} {rate:>9} {interval:>16} {self.won:>6,} {self.tied:>6,} {self.lost:>6,}{bad}"


@dataclass(frozen=True)
class Judgement(Report):
    """pairs: those judged; identical: of these, pairs of equal outputs. asked: queries sent now; cached: known."""

    system: str
    baseline: str
    model: str
    pairs: int
    identical: int
    asked: int
    cached: int
    aspects: tuple[WinRate, ...]

    def __str__(self) -> str:
        head = f"{self.system} over {self.baseline}, judged by {self.model}: {self.pairs:,} pairs "
        head += f"({self.identical:,} identical), {self.asked:,} queries, {self.cached:,} from --answers"
        names = f"  {'':<16} {'win rate':>9} {'95 % interval':>16} {'won':>6} {'tied':>6} {'lost':>6}"
        return "\n".join([head, names, *map(str, self.aspects)])


def judge(config: JudgeConfig) -> Judgement:
    """Ask about every pair; answers are kept in `config.answers` as they come, and never asked for again.

    Raises DataError for files that are not outputs of the same prompts, ConfigError without the `openai` package or an
    API key, JudgeError where the endpoint refuses or fails after all retries, WriteError for `config.answers`.
    """
    pairs, answers = _pairs(config), _read_answers(config.answers)
    requests: dict[str, dict[str, Any]] = {}
    asked: dict[str, list[list[tuple[str, bool]]]] = {aspect: [[] for _ in pairs] for aspect in config.aspects}
    for aspect, (i, pair) in product(config.aspects, enumerate(pairs)):
        for text, system_is_a in queries(aspect, config.kind, *pair) if pair[1] != pair[2] else []:
            request: dict[str, Any] = {"model": config.judge_model, "messages": [{"role": "user", "content": text}]}
            request |= {"temperature": config.judge_temperature, "max_tokens": config.judge_tokens}
            key = hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
            requests[key] = request
            asked[aspect][i].append((key, system_is_a))
    missing = {key: request for key, request in requests.items() if key not in answers}
    if missing:
        asyncio.run(_ask(missing, answers, config))
    win_rates = []
    for name, of_pairs in asked.items():
        verdicts = [[verdict(answers[key], system_is_a) for key, system_is_a in four] for four in of_pairs]
        win_rates.append(WinRate.of(name, [four or [0.5] * 4 for four in verdicts]))
    identical = sum(system == baseline for _, system, baseline in pairs)
    counts = (len(pairs), identical, len(missing), len(requests) - len(missing))
    return Judgement(str(config.system), str(config.baseline), config.judge_model, *counts, tuple(win_rates))


def queries(aspect: str, kind: str, prompt: str, system: str, baseline: str) -> list[tuple[str, bool]]:
    """The four questions about a pair: text, and whether the system's output is called A in it."""
    what, criteria = next((what, found) for what, found in CRITERIA.items() if what.startswith(kind))
    made = []
    for system_first, system_is_a in product((True, False), repeat=2):
        named = [("A" if system_is_a else "B", system), ("B" if system_is_a else "A", baseline)]
        outputs = "\n\n".join(f"[{name}]\n{text}" for name, text in (named if system_first else named[::-1]))
        text = (
            f"Compare two candidates, each a {what}, by their {aspect} alone: {criteria[aspect]}.\n\n"
            f"[Given]\n{prompt}\n\n{outputs}\n\n"
            "Write one sentence that compares the two and says which is better and why. "
            "Then write a last line of this form, with A or B for the better one:\nPreferred: <A or B>"
        )
        made.append((text, system_is_a))
    return made


def verdict(answer: str, system_is_a: bool) -> float | None:
    """1: the system is better, 0: the baseline is, 0.5: a tie, None: can't be told."""
    found = re.findall(r"preferred\W*(.*)", answer, re.IGNORECASE)
    choice = found[-1] if found else answer.strip()
    if not found and len(choice.strip(" .*[]()\"'")) != 1:
        return None
    if re.search(r"\b(tie|neither|both|equal|equally)\b", choice, re.IGNORECASE):
        return 0.5
    letters = set(re.findall(r"\b[AB]\b", choice))
    return float(("A" in letters) == system_is_a) if len(letters) == 1 else None


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share p of n (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


# ---------------------------------------------------------------------------------------------------------- files


class _Output(BaseModel):
    """A line of `evaluate --outputs`."""

    prompt: str
    output: str


def _pairs(config: JudgeConfig) -> list[tuple[str, str, str]]:
    """(prompt, system's output, baseline's output) of the chosen lines, in the order of the files."""
    system, baseline = _read_outputs(config.system), _read_outputs(config.baseline)
    for number, (ours, theirs) in enumerate(zip_longest(system, baseline), start=1):
        if ours is None or theirs is None or ours.prompt != theirs.prompt:
            raise DataError(
                f"{config.system} ({len(system)} outputs) and {config.baseline} ({len(baseline)}): output {number} has "
                "another prompt or is missing: evaluate both systems on the same data, with the same --template"
            )
    pairs = [(ours.prompt, ours.output, theirs.output) for ours, theirs in zip(system, baseline, strict=True)]
    if not 0 < config.limit < len(pairs):
        return pairs
    return [pairs[i] for i in sorted(random.Random(config.seed).sample(range(len(pairs)), config.limit))]


def _read_outputs(path: Path) -> list[_Output]:
    """Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found += [_Output.model_validate_json(line)] if line.strip() else []
        except ValueError:
            hint = "no prompt and output; `evaluate --outputs FILE` writes such files"
            raise DataError(f"{path}: line {number}: {hint}") from None
    if not found:
        raise DataError(f"{path}: holds no outputs")
    return found


def _read_answers(path: Path) -> dict[str, str]:
    """Hash of a question → its answer. A line that a kill cut short is left out. Raises DataError for other files."""
    answers = {}
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not {"key", "answer"} <= set(record):
            raise DataError(f"{path}: line {number}: not an answer of a judge; give another file with --answers")
        answers[record["key"]] = record["answer"]
    return answers


# ------------------------------------------------------------------------------------------------------- endpoint


async def _ask(requests: dict[str, dict[str, Any]], answers: dict[str, str], config: JudgeConfig) -> None:
    """Add the answer to each request; it is a line in the file of answers as soon as it comes."""
    client, free, path = _client(config), asyncio.Semaphore(config.concurrency), config.answers

    async def ask(key: str, request: dict[str, Any]) -> None:
        async with free:
            answers[key] = await _answer(client, request, config)
        line = json.dumps({"key": key, "answer": answers[key]}, ensure_ascii=False) + "\n"
        file.write(line.encode(errors="replace"))
        file.flush()
        os.fsync(file.fileno())
        bar.advance()

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file, progress("judge", len(requests), "queries") as bar:
            if file.tell():
                file.write(b"\n")  # behind a line that a kill cut short
            async with client:
                await asyncio.gather(*(ask(key, request) for key, request in requests.items()))


async def _answer(client: Any, request: dict[str, Any], config: JudgeConfig) -> str:
    import openai

    try:
        reply = await client.chat.completions.create(**request)
        return reply.choices[0].message.content or ""
    except openai.APIStatusError as error:
        reason = f"HTTP {error.status_code}"  # the endpoint's own words may hold the key
    except openai.APIConnectionError:
        reason = f"no connection, or no answer in {config.timeout:g} s"
    except (openai.OpenAIError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = f"not an answer of a chat completion ({type(error).__name__})"
    endpoint = re.sub(r"(?<=://)[^/@]*@", "", str(client.base_url))
    advice = f"check --base-url, --judge-model and OPENAI_API_KEY; answers so far are in {config.answers}"
    raise JudgeError(f"{endpoint}: {reason}, after {config.retries} retries: {advice}")


def _client(config: JudgeConfig) -> Any:
    """Retries with growing pauses, or those the endpoint asks for, are the client's. Raises ConfigError."""
    try:
        import openai
    except ImportError:
        raise ConfigError(["needs the package openai: pip install 'ketchup-cache[judge]'"]) from None
    url, secret = config.base_url or os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    if not url and not secret:
        raise ConfigError(["no endpoint: give --base-url, and its key in the environment as OPENAI_API_KEY"])
    key = secret or "none"
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=config.retries, timeout=config.timeout)


if __name__ == "__main__":
    sys.exit(main())
