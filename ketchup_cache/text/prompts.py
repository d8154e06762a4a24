"""Prompts: read from a file or the Hugging Face Hub, rendered with a template, tokenised.

Rows arrive through the `datasets` library, but no type is guessed: JSON lines are parsed here, CSV cells stay text.
(Left to guess, it turns the prompt "2020-01-01" into a date and "007" into the number 7.)
Files are streamed, so nothing is copied to a cache and a changed file is always seen.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import string
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub
import numpy as np

from ketchup_cache.config.options import DataOptions
from ketchup_cache.console import one_line
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.provenance import DataInfo
from ketchup_cache.text.chat import user_turn
from ketchup_cache.types import TOKEN_DTYPE, Prompts, Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
FILE_SUFFIX = re.compile(r"\.[A-Za-z]+$")
"""What marks a name as a file's; a version at the end of a dataset's name (`owner/name-1.5`) does not."""
SUFFIXES = ".jsonl, .jsonl.gz, .csv or .parquet"
TOKENIZE_AT_ONCE = 4096


@dataclass(frozen=True)
class Example:
    """One prompt as the model is given it.

    id: first 16 bytes of the SHA-256 of `prompt` in UTF-8. target: the reference, None where there is none.
    row: 1-based place in the data, for messages: the line of a JSONL file, the row (without the header) of others.
    """

    id: bytes
    prompt: str
    target: str | None
    row: int = field(default=0, compare=False)


# ----------------------------------------------------------------------------------------------------- examples


def read_examples(options: DataOptions, *, need_target: bool = False) -> list[Example]:
    """The prompts, and where they are there (or `need_target`) the references, in the order of the data.

    Raises ConfigError for an unusable template, DataError for data that is missing, unreadable or incomplete.
    """
    template = _parse_template(options.template)
    sources = {name: (name, "--template") for _, name in template if name}
    sources["prompt"] = (options.prompt_field, "--prompt-field")
    columns = [options.target_field, *(column for column, _ in sources.values())]
    unit = "line" if _is_jsonl(options.data) else "row"
    examples = []
    with closing(_records(options, columns)) as records:
        for row, record in islice(records, options.skip, options.skip + options.limit if options.limit else None):
            where = f"{_public(options.data)}: {unit} {row}"
            texts = {name: _text(record, column, where, flag) for name, (column, flag) in sources.items()}
            prompt = "".join(literal + (texts[name] if name else "") for literal, name in template)
            target = _column(record, options.target_field)
            if need_target:
                target = _text(record, options.target_field, where, "--target-field")
            elif not isinstance(target, str) or not target.strip():
                target = None
            examples.append(Example(_id(prompt), prompt, target, row))
    if not examples:
        after = f" after the first {options.skip:,}" if options.skip else ""
        raise DataError(f"{_public(options.data)}: holds no rows{after}")
    return examples


def without_duplicates(examples: Iterable[Example]) -> list[Example]:
    """The first example of every prompt: what rollouts start from. Training and evaluation keep all."""
    first: dict[bytes, Example] = {}
    for example in examples:
        first.setdefault(example.id, example)
    return list(first.values())


def as_chat(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> list[Example]:
    """The same examples with their prompts as a chat's user turn (`options.chat`); without it, as they are.

    Raises ConfigError where the tokenizer's chat template does not offer that.
    """
    if not options.chat:
        return list(examples)
    turns = [user_turn(example.prompt, tokenizer, options.system) for example in examples]
    return [replace(e, id=_id(turn), prompt=turn) for e, turn in zip(examples, turns, strict=True)]


def data_info(
    examples: Sequence[Example], options: DataOptions, tokenizer: PreTrainedTokenizerBase | None = None
) -> DataInfo:
    """Name and content hash of the prompts, for the manifest. With `options.chat`, the template that is recorded is
    the whole turn, as `tokenizer` renders it."""
    content = hashlib.sha256()
    for example in examples:
        text = example.prompt.encode()
        content.update(len(text).to_bytes(8, "little") + text)
    name = _public(options.data)
    if _is_hub_name(options.data):
        name += f" [{options.split}]"
    template = options.template
    if options.chat:
        assert tokenizer is not None
        template = user_turn(template, tokenizer, options.system)
    return DataInfo(name=name, fingerprint=content.hexdigest(), template=template)


def _id(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()[:16]


# ------------------------------------------------------------------------------------------------------- tokens


def tokenize_prompts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Prompts:
    """Token ids with the special tokens that the tokenizer adds; prompts over the limit as `long_prompts` says.

    To a chat (`as_chat`) nothing is added: its template has written all special tokens, and BOS must not come twice.

    Rows are in the order of `examples`; with `long_prompts="drop"` some are left out: see `kept_examples`.

    Raises DataError for a prompt without tokens, for one over the limit (`long_prompts="refuse"`), and where no prompt
    is left.
    """
    limit, rows, ids = options.max_prompt_tokens, [], []
    for start in range(0, len(examples), TOKENIZE_AT_ONCE):
        chunk = examples[start : start + TOKENIZE_AT_ONCE]
        encoded = tokenizer(
            [e.prompt for e in chunk], add_special_tokens=not options.chat, return_attention_mask=False, verbose=False
        )["input_ids"]
        for example, tokens in zip(chunk, encoded, strict=True):
            if not tokens:
                raise DataError(
                    f"{_public(options.data)}: row {example.row}: the tokenizer makes no token of this prompt, and a "
                    "model needs one: leave the row out, or use a --template that adds some text"
                )
            if len(tokens) > limit:
                if options.long_prompts == "drop":
                    continue
                if options.long_prompts == "refuse":
                    raise DataError(
                        f"{_public(options.data)}: row {example.row}: the prompt has {len(tokens):,} tokens, more than "
                        f"{limit:,}: raise --max-prompt-tokens, or set --long-prompts to truncate or drop"
                    )
                ends = tokens[-1:] if tokens[-1] == tokenizer.eos_token_id else []
                tokens = tokens[: limit - len(ends)] + ends
            rows.append(np.asarray(tokens, TOKEN_DTYPE))
            ids.append(example.id)
    if not rows:
        raise DataError(
            f"{_public(options.data)}: no prompt left: all {len(examples):,} have more than {limit:,} tokens: "
            "raise --max-prompt-tokens, or set --long-prompts truncate"
        )
    return Prompts(np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16), Ragged.from_rows(rows, TOKEN_DTYPE))


def kept_examples(examples: Iterable[Example], prompts: Prompts) -> list[Example]:
    """The examples that `tokenize_prompts` kept: one for each row of `prompts`, in the same order."""
    # equal prompts are equally long, so they are kept or dropped together, and membership is enough
    kept = {row.tobytes() for row in prompts.ids}
    return [example for example in examples if example.id in kept]


# --------------------------------------------------------------------------------------------- fields and template


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """`"Q: {prompt}!"` → [("Q: ", "prompt"), ("!", None)]."""
    braces = "a pair of braces holds the name of a column; write {{ and }} for braces in the text"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        raise ConfigError([f"--template {template!r}: {braces}"]) from None
    if any(name is not None and (not name or spec or conversion) for _, name, spec, conversion in parts):
        raise ConfigError([f"--template {template!r}: {braces}"])
    if not any(name == "prompt" for _, name, *_ in parts):
        raise ConfigError([f"--template {template!r} must contain {{prompt}}"])
    return [(literal, name) for literal, name, *_ in parts]


def _column(record: Record, name: str) -> Any:
    """A column, or with a dotted name a part of one, as in {"translation": {"en": …}}; None where it is not there."""
    value: Any = record
    for part in [name] if name in record or "." not in name else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(record: Record, name: str, where: str, flag: str) -> str:
    value = _column(record, name)
    if name not in record and value is None:
        raise DataError(f"{where}: no field {name!r}; it has {', '.join(map(repr, record)) or 'none'}: set {flag}")
    if value is None:
        raise DataError(f"{where}: {name!r} is null; fill it in or leave the row out")
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} is of type {type(value).__name__}, not text; quote it or set {flag}")
    if not value.strip():
        raise DataError(f"{where}: {name!r} is blank; fill it in or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name!r} holds half a character (a lone surrogate \\ud800 to \\udfff)") from None
    return value


# --------------------------------------------------------------------------------------------------------- records


def _records(options: DataOptions, columns: Iterable[str]) -> Generator[tuple[int, Record], None, None]:
    """(1-based row, its fields) of the data. CSV: the `columns` are text whatever they look like."""
    data = options.data
    if _is_hub_name(data):
        yield from enumerate(_hub_rows(data, options.split), start=1)
        return
    file = Path(data).expanduser()
    if "://" in data:
        raise DataError(f"{_public(data)}: addresses are not read; download the file and give its path")
    if not os.path.exists(file):  # unlike Path.exists: False, not an error, for a name that is too long
        hint = "" if FILE_SUFFIX.search(data) or "/" in data else " (a Hugging Face dataset is named owner/name)"
        raise DataError(f"{data}: no such file{hint}")
    if file.is_dir():
        raise DataError(f"{data}: is a folder; give a {SUFFIXES} file")
    if file.stat().st_size == 0:
        raise DataError(f"{data}: is empty")
    name = file.name.lower()
    if _is_jsonl(name):
        with closing(_file_rows(file, data, "text", encoding="utf-8-sig")) as lines:
            yield from _json_records(data, lines)
    elif name.endswith(".csv"):
        as_text = dict.fromkeys(columns, str)
        with closing(_file_rows(file, data, "csv", na_filter=False, converters=as_text)) as rows:
            for row, record in enumerate(rows, start=1):
                if "__index_level_0__" in record:
                    raise DataError(f"{data}: rows have more cells than the header names; quote cells that hold commas")
                yield row, record
    elif name.endswith(".parquet"):
        # a batch size of our own: the library's, the first row group's, is an error for a file without rows
        yield from enumerate(_file_rows(file, data, "parquet", batch_size=4096), start=1)
    else:
        raise DataError(f"{data}: unknown kind of file; give a {SUFFIXES} file")


def _is_jsonl(data: str) -> bool:
    return data.lower().endswith((".jsonl", ".jsonl.gz"))


def _is_hub_name(data: str) -> bool:
    return bool(HUB_NAME.fullmatch(data)) and not FILE_SUFFIX.search(data) and not Path(data).exists()


def _json_records(data: str, lines: Iterable[Record]) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(lines, start=1):
        if not line["text"].strip():
            continue
        try:
            record = json.loads(line["text"])
        except json.JSONDecodeError as error:
            raise DataError(f"{data}: line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            raise DataError(f"{data}: line {number}: not readable as JSON ({one_line(error)})") from None
        if not isinstance(record, dict):
            raise DataError(f'{data}: line {number}: not a JSON object; a line looks like {{"prompt": "…"}}')
        yield number, record


def _file_rows(file: Path, data: str, builder: str, **reading: Any) -> Generator[Record, None, None]:
    """Close it when done with it, else the libraries stay quiet until the garbage collector comes round."""
    with tempfile.TemporaryDirectory() as locks:

        def load() -> Iterable[Record]:
            pattern = glob.escape(str(file.resolve()))
            return datasets.load_dataset(
                builder, data_files=pattern, split="train", streaming=True, cache_dir=locks, **reading
            )

        yield from _rows(load, f"{data}: can't be read")


def _hub_rows(data: str, split: str) -> Iterator[Record]:
    name, _, config = data.partition(":")
    failure = f"{data}: no such file, and the Hugging Face Hub does not give split {split!r} of such a dataset"
    yield from _rows(lambda: datasets.load_dataset(name, config or None, split=split), failure)


def _rows(load: Callable[[], Iterable[Record]], failure: str) -> Iterator[Record]:
    with _quiet():
        try:
            yield from load()
        except Exception as error:  # the readers' errors have no common base: pandas, Arrow, gzip, HTTP, disk
            raise DataError(f"{failure} ({one_line(error.__cause__ or error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no retries and no tracebacks of the libraries on the terminal; what matters is raised."""
    logs = (datasets.logging, huggingface_hub.logging)
    verbosity, bars_off = [log.get_verbosity() for log in logs], datasets.are_progress_bars_disabled()
    for log in logs:
        log.set_verbosity(log.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for log, level in zip(logs, verbosity, strict=True):
            log.set_verbosity(level)
        if not bars_off:
            datasets.enable_progress_bars()


def _public(data: str) -> str:
    """Without user name and password, should it be an address."""
    return re.sub(r"(?<=://)[^/@]*@", "", data)
