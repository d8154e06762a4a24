"""Prompts read from a file or the Hugging Face Hub.

Rows arrive through the `datasets` library, but no type is guessed: JSON lines are parsed here, CSV cells stay text.
(Left to guess, it turns the prompt "2020-01-01" into a date and "007" into the number 7.)
Files are streamed, so nothing is copied to a cache and a changed file is always seen.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ketchup_cache.config.options import DataOptions
from ketchup_cache.console import one_line, silence
from ketchup_cache.errors import DataError
from ketchup_cache.provenance import DataInfo
from ketchup_cache.text.prompts import Example, form_of, parse_template, user_turn

Record = dict[str, Any]
"""One row of the data: column → value."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
FILE_SUFFIX = re.compile(r"\.[A-Za-z]+$")
"""What marks a name as a file's; a version at the end of a dataset's name (`owner/name-1.5`) does not."""
JSONL = (".jsonl", ".jsonl.gz")
SUFFIXES = ".jsonl, .jsonl.gz, .csv or .parquet"


def read_examples(options: DataOptions, *, need_target: bool = False) -> list[Example]:
    """The prompts, and where they are there (or `need_target`) the references, in the order of the data.

    Raises ConfigError for an unusable template, DataError for data that is missing, unreadable or incomplete.
    """
    template = parse_template(options.template)
    sources = {name: (name, "--template") for _, name in template if name}
    sources["prompt"] = (options.prompt_field, "--prompt-field")
    columns = [options.target_field, *(column for column, _ in sources.values())]
    unit = "line" if options.data.lower().endswith(JSONL) else "row"
    stop = options.skip + options.limit if options.limit else None
    examples, names = [], set[str]()
    import datasets  # slow to import, and learning from a cache reads no data
    import huggingface_hub

    with silence(datasets.logging, huggingface_hub.logging), tempfile.TemporaryDirectory() as locks:
        for row, record in islice(_records(options, columns, locks), options.skip, stop):
            where = f"{options.data}: {unit} {row}"
            texts = {name: _text(record, column, where, flag) for name, (column, flag) in sources.items()}
            parts = [part for literal, name in template for part in (literal, texts[name] if name else "")]
            longest = max(range(1, len(parts), 2), key=lambda i: len(parts[i]))
            start = sum(map(len, parts[:longest]))
            target: str | None = None
            found = _column(record, options.target_field)
            if need_target or not (found is None or (isinstance(found, str) and not found.strip())):
                target = _text(record, options.target_field, where, "--target-field")
            span = start, start + len(parts[longest])
            examples.append(Example("".join(parts), target, row, span))
            names |= record.keys()
    if not examples:
        after = f" after the first {options.skip:,}" if options.skip else ""
        raise DataError(f"{options.data}: holds no rows{after}")
    _require_column(options, names, examples)
    return examples


def data_info(examples: Iterable[Example], options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> DataInfo:
    """Name and content hash of the prompts, for the manifest.

    With `options.chat`, the template that is recorded is the whole turn, as `tokenizer` renders it.
    """
    content = hashlib.sha256()
    for example in examples:
        text = example.prompt.encode()
        content.update(len(text).to_bytes(8, "little") + text)
    name = f"{options.data} [{options.split}]" if _is_hub_name(options.data) else options.data
    template = user_turn(options.template, tokenizer, options.system) if options.chat else options.template
    return DataInfo(name=name, fingerprint=content.hexdigest(), template=template, form=form_of(options))


def _require_column(options: DataOptions, names: set[str], examples: Sequence[Example]) -> None:
    """Raise DataError where the references are looked for in a column that is not there: it was named, or one whose
    name is nearly the same is there."""
    if options.target_field.partition(".")[0] in names or any(example.target is not None for example in examples):
        return
    close = difflib.get_close_matches(options.target_field, sorted(names), n=1)
    if close or "target_field" in options.model_fields_set:
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, sorted(names)))};"
        raise DataError(f"{options.data}: no field {options.target_field!r}: {hint} set --target-field")


# ----------------------------------------------------------------------------------------------------------- columns


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
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: {name!r} is {'null' if value is None else 'blank'}; fill it in or leave the row out")
    if isinstance(value, int) and not isinstance(value, bool):  # an answer: there is one way to write it
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} is of type {type(value).__name__}, not text; quote it or set {flag}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name!r} holds half a character (a lone surrogate \\ud800 to \\udfff)") from None
    return value


# ----------------------------------------------------------------------------------------------------------- records


def _records(options: DataOptions, columns: Iterable[str], locks: str) -> Iterator[tuple[int, Record]]:
    """(1-based row, its fields) of the data. CSV: the `columns` are text whatever they look like."""
    data = options.data
    if _is_hub_name(data):
        name, _, config = data.partition(":")
        failure = f"no such file, and the Hugging Face Hub does not give split {options.split!r} of such a dataset"
        yield from enumerate(_rows(f"{data}: {failure}", name, config or None, split=options.split), start=1)
        return
    if "://" in data:
        public = re.sub(r"(?<=://)[^/@]*@", "", data)  # without user name and password
        raise DataError(f"{public}: addresses are not read; download the file and give its path")
    file = Path(data).expanduser()
    if not os.path.exists(file):  # unlike Path.exists: False, not an error, for a name that is too long
        hint = "" if FILE_SUFFIX.search(data) or "/" in data else " (a Hugging Face dataset is named owner/name)"
        raise DataError(f"{data}: no such file{hint}")
    if file.is_dir():
        raise DataError(f"{data}: is a folder; give a {SUFFIXES} file")
    if file.stat().st_size == 0:
        raise DataError(f"{data}: is empty")
    path, name = glob.escape(str(file.resolve())), file.name.lower()
    read = partial(_rows, f"{data}: can't be read", data_files=path, split="train", streaming=True, cache_dir=locks)
    if name.endswith(JSONL):
        for row, line in enumerate(read("text", encoding="utf-8-sig"), start=1):
            if line["text"].strip():
                yield row, _parsed(line["text"], f"{data}: line {row}")
    elif name.endswith(".csv"):
        for row, record in enumerate(read("csv", na_filter=False, converters=dict.fromkeys(columns, str)), start=1):
            if "__index_level_0__" in record:
                raise DataError(f"{data}: rows have more cells than the header names; quote cells that hold commas")
            yield row, record
    elif name.endswith(".parquet"):
        # a batch size of our own: the library's, the first row group's, is an error for a file without rows
        yield from enumerate(read("parquet", batch_size=4096), start=1)
    else:
        raise DataError(f"{data}: unknown kind of file; give a {SUFFIXES} file")


def _is_hub_name(data: str) -> bool:
    return bool(HUB_NAME.fullmatch(data)) and not FILE_SUFFIX.search(data) and not Path(data).exists()


def _parsed(text: str, where: str) -> Record:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise DataError(f"{where}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: not a JSON object; a line looks like {{"prompt": "…"}}')
    return record


def _rows(failure: str, *source: str | None, **reading: Any) -> Iterator[Record]:
    """What `datasets.load_dataset` gives. failure: how an error of it begins."""
    import datasets

    try:
        yield from datasets.load_dataset(*source, **reading)
    except Exception as error:  # the readers' errors have no common base: pandas, Arrow, gzip, HTTP, disk
        raise DataError(f"{failure} ({one_line(error.__cause__ or error)})") from error
