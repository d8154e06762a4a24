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
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ketchup_cache.config.options import DataOptions
from ketchup_cache.console import one_line, silence
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.files import read_small
from ketchup_cache.provenance import DataInfo
from ketchup_cache.text.prompts import Conversation, Example, form_of, parse_template, user_turn

Record = dict[str, Any]
"""One row of the data: column → value."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
FILE_SUFFIX = re.compile(r"\.[A-Za-z]+$")
"""What marks a name as a file's; a version at the end of a dataset's name (`owner/name-1.5`) does not."""
JSONL = (".jsonl", ".jsonl.gz")
SUFFIXES = ".jsonl, .jsonl.gz, .json, .csv or .parquet"
MAX_JSON = 2**30
"""Bytes of a .json file, which is read as a whole."""


def read_examples(
    options: DataOptions,
    *,
    need_target: bool = False,
    turns: Literal["all", "last"] | None = None,
    records: bool = False,
) -> list[Example]:
    """The prompts, and where they are there (or `need_target`) the references, in the order of the data.

    turns: which of the assistant's turns in a conversation are examples, each with what stands before it; by default
    the one that ends it, or that would come next. records: keep all columns (`Example.record`).

    Raises ConfigError for an unusable template, DataError for data that is missing, unreadable or incomplete.
    """
    template = parse_template(options.template)
    sources = {name: (name, "--template") for _, name in template if name}
    sources["prompt"] = (options.prompt_field, "--prompt-field")
    columns = [options.target_field, "completion", *(column for column, _ in sources.values())]
    unit = "line" if options.data.lower().endswith(JSONL) else "row"
    stop = options.skip + options.limit if options.limit else None
    examples, names = [], set[str]()
    import datasets  # slow to import, and learning from a cache reads no data
    import huggingface_hub

    with silence(datasets.logging, huggingface_hub.logging), tempfile.TemporaryDirectory() as locks:
        for row, record in islice(_records(options, columns, locks), options.skip, stop):
            where = f"{options.data}: {unit} {row}"
            names |= record.keys()
            references = _references(record, options, where)
            kept = record if records else None
            if talks := _turns(record, options, references, turns, row, where):
                examples += [replace(talk, record=kept) for talk in talks]
                continue
            texts = {name: _text(record, column, where, flag) for name, (column, flag) in sources.items()}
            parts = [part for literal, name in template for part in (literal, texts[name] if name else "")]
            longest = max(range(1, len(parts), 2), key=lambda i: len(parts[i]))
            start = sum(map(len, parts[:longest]))
            if need_target and not references:
                references = (_text(record, options.target_field, where, "--target-field"),)
            span, target = (start, start + len(parts[longest])), references[0] if references else None
            examples.append(Example("".join(parts), target, row, span, references[1:], record=kept))
    if not examples:
        after = f" after the first {options.skip:,}" if options.skip else ""
        raise DataError(f"{options.data}: holds no rows{after}")
    plain = [example.row for example in examples if not example.talk]
    if plain and len(plain) < len(examples):
        raise DataError(f"{options.data}: {unit} {plain[0]}: has no messages, but other rows have some")
    if not plain and options.template != "{prompt}":
        why = f"is for plain prompts, and {options.data} holds messages"
        raise ConfigError([f"--template {options.template!r} {why}: leave it out, or set --messages-field ''"])
    if plain:
        _require_column(options, names, examples)
    return examples


def data_info(examples: Sequence[Example], options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> DataInfo:
    """Name and content hash of the prompts, for the manifest.

    With `options.chat`, the template that is recorded is the whole turn, as `tokenizer` renders it.
    """
    content = hashlib.sha256()
    for example in examples:
        text = example.prompt.encode()
        content.update(len(text).to_bytes(8, "little") + text)
    name = f"{options.data} [{options.split}]" if _is_hub_name(options.data) else options.data
    form, template = form_of(options, examples), options.template
    if form.chat:
        template = "{messages}" if examples[0].talk else user_turn(template, tokenizer, options)
    return DataInfo(name=name, fingerprint=content.hexdigest(), template=template, form=form)


def _require_column(options: DataOptions, names: set[str], examples: Sequence[Example]) -> None:
    """Raise DataError where the references are looked for in a column that is not there: it was named, or one whose
    name is nearly the same is there, and is not that of the prompts."""
    named, found = options.target_field, any(example.target is not None for example in examples)
    if not named or named.partition(".")[0] in names or found:
        return
    others = names - {options.prompt_field, *re.findall(r"{(\w+)}", options.template)}
    close = difflib.get_close_matches(named, sorted(others), n=1)
    if close or "target_field" in options.model_fields_set:
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, sorted(names)))};"
        raise DataError(f"{options.data}: no field {named!r}: {hint} set --target-field")


# ----------------------------------------------------------------------------------------------------- conversations


def _turns(
    record: Record, options: DataOptions, references: tuple[str, ...], turns: str | None, row: int, where: str
) -> list[Example]:
    """The examples in a row's conversation (`read_examples`); none of a row of plain text.

    Its end, where it has none, is the `completion` or the reference. Of a prompt with an end, that alone is learned.
    """
    found, prompt = column(record, options.messages_field), column(record, options.prompt_field)
    if not isinstance(found, list) and options.messages_field and "messages_field" in options.model_fields_set:
        raise DataError(f"{where}: {options.messages_field!r} is no list of messages; set --messages-field")
    from_prompt = not isinstance(found, list)
    if not isinstance(given := prompt if from_prompt else found, list):
        return []
    messages = _messages(given, where)
    completion = record.get("completion") if from_prompt else None
    if isinstance(completion, list):
        messages += _messages(completion, f"{where}: completion")
    elif references and (completion or not messages or messages[-1]["role"] != "assistant"):
        messages.append({"role": "assistant", "content": options.prefill + references[0]})
    start = len(given) if from_prompt and len(messages) > len(given) else 1
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    places = [place for place in replies if place >= start][-1 if turns == "last" else 0 :]
    if turns is None:
        places = [len(messages) - (len(messages) - 1 in replies)]
    if not any(places):
        what = "no message of the assistant stands behind another" if messages else "there is no message"
        raise DataError(f"{where}: {what}: leave the row out")
    examples, tools = [], record.get("tools") or None
    for place in places:
        reply = messages[place] if place < len(messages) else {}
        text = str(reply.get("content") or "").removeprefix(options.prefill)
        own = (_text({"content": text}, "content", where, "--messages-field"),) if text.strip() else ()
        texts = references if references and turns is None else own
        talk = Conversation(messages[:place], reply or None, tools)
        examples.append(Example("", texts[0] if texts else None, row, None, texts[1:], talk))
    return examples


def _messages(given: list[Any], where: str) -> list[Record]:
    """As the template takes them: keys that are null are not there, and parts of text are one text."""
    messages = []
    for place, message in enumerate(given, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where}: message {place} has no role; one looks like {{"role": "user", "content": "…"}}')
        messages.append({key: value for key, value in message.items() if value is not None or key == "content"})
        if isinstance(parts := message.get("content"), list):
            try:
                messages[-1]["content"] = "".join(part if isinstance(part, str) else part["text"] for part in parts)
            except (TypeError, KeyError):
                raise DataError(f"{where}: message {place} has a part that is no text; leave the row out") from None
    return messages


# ----------------------------------------------------------------------------------------------------------- columns


def column(record: Record, name: str) -> Any:
    """A column, or with a dotted name a part of one, as in {"translation": {"en": …}}; None where it is not there."""
    value: Any = record
    for part in [name] if name in record or "." not in name else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _references(record: Record, options: DataOptions, where: str) -> tuple[str, ...]:
    """Of the column that is named, of none where its name is empty; by default of `target` and `targets`, or of TRL's
    `completion`. A prefill at their beginning is left out."""
    names = [options.target_field]
    if "target_field" not in options.model_fields_set:
        names += ["targets"] * isinstance(record.get("targets"), list)
        names += ["completion"] * (isinstance(record.get("completion"), str) and record.get("target") is None)
    texts: list[str] = []
    for name in filter(None, names):
        found = column(record, name)
        none = found is None or (isinstance(found, str) and not found.strip())
        several = found if isinstance(found, list) else [found] * (not none)
        texts += [_text({name: one}, name, where, "--target-field").removeprefix(options.prefill) for one in several]
    return tuple(dict.fromkeys(texts))


def _text(record: Record, name: str, where: str, flag: str) -> str:
    value = column(record, name)
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
        rows = _rows(f"{data}: {failure}", name, config or None, split=options.split)
        yield from enumerate((row | _of_arrow(row) for row in rows), start=1)
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
    elif name.endswith(".json"):
        yield from enumerate(_json(file, data), start=1)
    elif name.endswith(".csv"):
        for row, record in enumerate(read("csv", na_filter=False, converters=dict.fromkeys(columns, str)), start=1):
            if "__index_level_0__" in record:
                raise DataError(f"{data}: rows have more cells than the header names; quote cells that hold commas")
            yield row, record
    elif name.endswith(".parquet"):
        # a batch size of our own: the library's, the first row group's, is an error for a file without rows
        yield from enumerate((row | _of_arrow(row) for row in read("parquet", batch_size=4096)), start=1)
    else:
        raise DataError(f"{data}: unknown kind of file; give a {SUFFIXES} file")


def _is_hub_name(data: str) -> bool:
    return bool(HUB_NAME.fullmatch(data)) and not FILE_SUFFIX.search(data) and not Path(data).exists()


def _of_arrow(value: Any) -> Any:
    """As it was before it was a table: there every message has the keys of all, null where it had none itself."""
    if isinstance(value, dict):
        return {key: _of_arrow(one) for key, one in value.items() if one is not None or key == "content"}
    return [_of_arrow(one) for one in value] if isinstance(value, list) else value


def _json(file: Path, data: str) -> list[Record]:
    """The records of a .json file: a list of them, or {"data": [...]}."""
    try:
        text = read_small(file, MAX_JSON).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{data}: can't be read ({one_line(error)}); JSON lines (.jsonl) have no limit") from None
    found = _loads(text, data)
    found = found.get("data") if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise DataError(f'{data}: is no list of JSON objects, nor {{"data": [...]}}; name lines of JSON .jsonl')
    return found


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not valid JSON ({error.msg}, {place}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise DataError(f"{where}: not readable as JSON ({one_line(error)})") from None


def _parsed(text: str, where: str) -> Record:
    if not isinstance(record := _loads(text, where), dict):
        raise DataError(f'{where}: not a JSON object; a line looks like {{"prompt": "…"}}')
    return record


def _rows(failure: str, *source: str | None, **reading: Any) -> Iterator[Record]:
    """What `datasets.load_dataset` gives. failure: how an error of it begins."""
    import datasets

    try:
        yield from datasets.load_dataset(*source, **reading)
    except Exception as error:  # the readers' errors have no common base: pandas, Arrow, gzip, HTTP, disk
        raise DataError(f"{failure} ({one_line(error.__cause__ or error)})") from error
