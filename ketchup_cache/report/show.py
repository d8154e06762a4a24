"""`show`: rows of data, of a cache, of a run or of outputs as the model sees them, in the terminal.

All that comes from data and models is made `visible`: nothing of it steers the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import ShowConfig
from ketchup_cache.config.options import DataOptions
from ketchup_cache.console import Report, printable
from ketchup_cache.errors import DataError, ModelError
from ketchup_cache.evaluation.compare import is_outputs, read_outputs, targets_of
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.load import load_tokenizer
from ketchup_cache.report.rows import cache_of_run, load_part, parts, record, tokenizer_of
from ketchup_cache.rollouts.sample import stop_ids
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.prompts import reply_ids, tokenize_prompts
from ketchup_cache.text.read import read_examples
from ketchup_cache.text.tokens import pieces, visible
from ketchup_cache.training.records import unsealed

ENDINGS = ("unfinished: cut at the length limit", "finished")
ONE_STEP = {"k": 1, "weights": "comb", "end_weight": None}
SHADES = (0, 230, 223, 216, 209)
"""Of the 256 colours of a terminal, behind black text; the first is none."""
GAPS = (0.1, 1.0, 3.0, 6.0)
"""Where the next shade begins, in logit units."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Shown(Report):
    """kind: data, cache, run or outputs. rows: with their number, `prompt`, `completion` or `reference`, what is said
    `about` these, and the `ending`: finished, unfinished (cut at the length limit while it was sampled) or cut (a
    reference). Of rollouts also the keys of `rows.record`, and `gap` and `returns` (K-step, as `how`) of each token."""

    shaded: ClassVar[bool] = True
    kind: str
    source: str
    color: str
    rows: tuple[Record, ...]

    def __str__(self) -> str:
        console = Console()
        color = self.color if console.color_system is not None and not console.no_color else ""
        return "\n".join([_text(row, color) for row in self.rows] or [printable(f"{self.source}: no such rows")])


def show(config: ShowConfig) -> Shown:
    """Read the rows that were asked for, and nothing else.

    Raises ConfigError and DataError for what is none of the four, and what reading data, caches and tokenizers raises.
    """
    path = Path(config.what)
    how: Any = config.model_dump(include={"tail", "normalization", "unfinished", "k"})
    if (path / "config.json").is_file() and (path / "metrics.jsonl").exists():
        options = unsealed(path / "config.json")["options"]
        unset = {*how, "weights", "lam", "end_weight", "scored_by"} - config.model_fields_set
        how |= {name: options[name] for name in unset & options.keys()}
        config = config.model_copy(update={"scored_by": how.pop("scored_by", config.scored_by)})
        kind, rows = "run", _of_cache(cache_of_run(path), config, how, config.tokenizer or str(path / "last"))
    elif "://" in config.what or path.is_dir():
        kind, rows = "cache", _of_cache(open_cache(config.what), config, how, config.tokenizer)
    else:
        kind, rows = ("outputs", _of_outputs(path, config)) if is_outputs(path) else ("data", _of_data(config))
    return Shown(kind, config.what, config.color, tuple(rows))


def _of_data(config: ShowConfig) -> Iterator[Record]:
    """The prompts as rendered; with a tokenizer, as it gives them to a model, and references with their end."""
    (start, stop), limit = config.span, config.max_new_tokens or None
    same = {name: getattr(config, name) for name in DataOptions.model_fields.keys() & config.model_fields_set}
    options = DataOptions(data=config.what, skip=start, limit=stop - start, **same)
    examples = read_examples(options)
    places = {example.row: row for row, example in enumerate(examples, start=start)}
    if config.tokenizer is None:
        if options.chat or examples[0].talk:
            what = "--chat is" if options.chat else "a conversation has"
            raise DataError(f"{config.what}: {what} the template of a tokenizer: give one with --tokenizer")
        for e in examples:
            yield {"row": places[e.row], "prompt": e.prompt, "reference": "\n".join(e.references) or None, "about": {}}
        return
    tokenizer = load_tokenizer(config.tokenizer)
    stops = [tokenizer.eos_token_id]
    with suppress(ModelError):  # of a tokenizer without a model
        stops = stop_ids(config.tokenizer)
    kept = tokenize_prompts(examples, tokenizer, options, stops=stops)
    for example, ids in zip(kept.examples, kept.prompts.tokens, strict=True):
        row: Record = {"row": places[example.row], "prompt": "".join(pieces(tokenizer, ids.tolist()))}
        at_limit = options.long_prompts == "truncate" and len(ids) == options.max_prompt_tokens
        row["about"] = {"prompt": f"{len(ids)} tokens" + ", cut at --max-prompt-tokens" * at_limit}
        if example.target is not None:
            whole = reply_ids(tokenizer, example)
            row["ending"] = "finished" if len(whole[:limit]) == len(whole) else "cut"
            row["reference"] = "".join(pieces(tokenizer, whole[:limit]))
            more = f", the first of {len(example.references)}" * bool(example.more)
            row["about"]["reference"] = f"{len(whole[:limit])} tokens, {row['ending']}{more}"
        yield row


def _of_outputs(path: Path, config: ShowConfig) -> Iterator[Record]:
    start, stop = config.span
    for number, row in enumerate(read_outputs(path)[start:stop], start=start):
        texts = {"prompt": row["prompt"], "completion": row["output"], "reference": "\n".join(targets_of(row)) or None}
        ending = ENDINGS[bool(row["finished"])] if "finished" in row else ""
        yield {"row": number, **texts, "ending": ending, "about": {"completion": ending}}


def _of_cache(cache: Cache, config: ShowConfig, how: Record, tokenizer: str | None) -> Iterator[Record]:
    """how: arguments of `rollout_returns`."""
    of_ids, (start, stop), before = tokenizer_of(cache, tokenizer), config.span, 0
    for part in parts(cache, config):
        count = part[2] - part[1]
        inside = range(max(start - before, 0), min(stop - before, count))
        whole = load_part(cache, part) if inside else None
        rows = (whole.take(slice(i, i + 1)) for i in inside) if whole else ()
        for i, joined in zip(inside, rows, strict=True):
            row = {"row": before + i, **record(joined, 0, part, of_ids)}
            row |= {"completion": "".join(row["tokens"]), "ending": ENDINGS[row["finished"]]}
            row["about"] = {"prompt": f"{row['prompt_tokens']} tokens"}
            row["about"]["completion"] = f"{len(row['tokens'])} tokens, {row['ending']}"
            if row["scored"]:
                k_step, one_step = rollout_returns(joined.rollouts, joined.scores, [how, how | ONE_STEP])
                row |= {"gap": np.subtract(row["max_q"], row["q"]).round(5).tolist(), "how": how}
                row |= {"returns": k_step[0].tolist(), "one_step": one_step[0].tolist()}
            yield row
        before += count


# ------------------------------------------------------------------------------------------------------------- text


def _text(row: Record, color: str) -> str:
    """color: what shades the tokens; empty: nothing does. Texts are indented: none passes for a line of ours."""
    step = "" if row.get("policy_step") is None else f", step {row['policy_step']}"
    scored = f"scored by {row['teacher']}" if row.get("scored") else "not scored"
    of_policy = f" — policy {row['policy']}{step}; {scored}" if "policy" in row else ""
    lines = [printable(f"row {row['row']}{of_policy}")]
    gap, shades = row.get("gap"), _shades(row, color) if color and row.get("gap") else []
    for name in ("prompt", "completion", "reference"):
        if row.get(name) is not None:
            about = row["about"].get(name)
            texts = row["tokens"] if shades and name == "completion" else [row[name]]
            shown = "".join(map(_shaded, map(visible, texts), shades if len(texts) == len(shades) else [0]))
            lines += [f"  {name} ({about})" if about else f"  {name}"] + [f"    {line}" for line in shown.split("\n")]
    if gap:
        worst, how = int(np.argmax(gap)), row["how"]
        comb = how.get("weights", "comb") == "comb"
        estimator = f"K = {how['k']}" if comb else f"{how['weights']} weights, λ = {how['lam']:g}"
        token = visible(row["tokens"][worst]).strip().replace("\n", "")
        lines.append(
            f"  return {row['one_step'][0]:.2f} (K = 1), {row['returns'][0]:.2f} ({estimator}); q of the first token "
            f"{row['q'][0]:.2f}; gap max-q − q: mean {np.mean(gap):.2f}, largest {gap[worst]:.2f} at token {worst + 1} "
            f"({token}); {gap.count(0)} of {len(gap)} are the teacher's first choice"
        )
    return "\n".join([*lines, ""])


def _shades(row: Record, color: str) -> list[int]:
    values = np.array(row["gap"] if color == "gap" else row["returns"])
    if color == "gap":
        return [SHADES[place] for place in np.searchsorted(GAPS, values, side="right").tolist()]
    share = (values.max() - values) / max(float(np.ptp(values)), 1e-9)  # between the row's own extremes
    return [SHADES[place] for place in np.minimum(share * len(SHADES), len(SHADES) - 1).astype(int).tolist()]


def _shaded(text: str, shade: int) -> str:
    """Each line of it for itself."""
    lines = text.split("\n")
    return "\n".join(f"\x1b[30;48;5;{shade}m{line}\x1b[0m" if shade and line else line for line in lines)
