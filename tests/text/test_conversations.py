"""Conversations: the turns that are examples, what the chat template makes of them, and a line for every odd row."""

import json
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ketchup_cache.config.options import DataOptions
from ketchup_cache.errors import ConfigError, DataError, KetchupError
from ketchup_cache.provenance import PromptForm
from ketchup_cache.text import read
from ketchup_cache.text.prompts import form_of, tokenize_prompts
from ketchup_cache.text.read import data_info, read_examples
from tests.helpers.errors import refuses
from tests.helpers.models import MARKED, chat_tokenizer

END = [1]
"""</s>"""


def said(*texts: str) -> list[dict]:
    """`user the cat` is a message."""
    return [dict(zip(("role", "content"), text.split(" ", 1), strict=True)) for text in texts]


THREE = said("system a cat", "user the dog", "assistant two dog", "user big", "assistant red", "user who",
             "assistant the cat runs")  # fmt: skip
CALL = [
    *said("user two"),
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "big", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "3", "name": "big"},
    {"role": "assistant", "content": "three cat"},
]
OTHER = [*CALL[:1], {**CALL[1], "tool_calls": [{"function": {"name": "red", "arguments": {"y": "z"}}}]}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(path, *rows, **given) -> DataOptions:
    return DataOptions(data=str(write(path / "d.jsonl", *rows) if rows else path), **given)


def rendered(path, *rows, template=MARKED, turns=None, stops=END, **given):
    """The examples of rows as a model is given them."""
    how = options(path, *rows, **given)
    return tokenize_prompts(read_examples(how, turns=turns), chat_tokenizer(template), how, stops=stops).examples


def pairs(examples):
    return [(example.prompt, example.written[0]) for example in examples]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "D.JSON", "d.parquet", "owner/name"])
def test_every_format_gives_the_messages_as_they_are(tmp_path, monkeypatch, name):
    """A table has the keys of all messages in each, null where they were not given."""
    rows, path = [{"messages": CALL, "tools": None}, {"messages": OTHER, "tools": [{"name": "red"}]}], tmp_path / name
    if name in ("d.parquet", "owner/name"):
        pq.write_table(pa.Table.from_pylist(rows), path := tmp_path / "d.parquet")
        asked = Mock(return_value=pq.read_table(path).to_pylist())
        monkeypatch.setattr(datasets, "load_dataset", asked if name == "owner/name" else datasets.load_dataset)
    elif name == "d.jsonl":
        write(path, *rows)
    else:
        path.write_text("\ufeff" + json.dumps(rows if name == "d.json" else {"version": 1, "data": rows}))
    first, second = read_examples(options("owner/name" if name == "owner/name" else path))
    assert (first.talk.messages, first.talk.reply) == (CALL[:3], CALL[3])
    assert (second.talk.messages, second.talk.reply, second.talk.tools) == (OTHER[:1], OTHER[1], [{"name": "red"}])
    assert (first.target, second.target, first.row, second.row) == ("three cat", None, 1, 2)


def test_what_is_wrong_with_a_json_file_is_one_line(tmp_path, monkeypatch):
    given = options(tmp_path / "d.json")
    for text, message in (
        ('{"data": [1]}', "is no list of JSON objects, nor"),
        ('{"messages": []}', "name lines of JSON .jsonl"),
        ('[{"prompt": "a"}\n}', r"not valid JSON \(.*, line 2, column 1\)"),
        ("[" * 10**5, "not readable as JSON"),
    ):
        (tmp_path / "d.json").write_text(text)
        refuses(DataError, f"d.json: {message}|{message}", read_examples, given)
    monkeypatch.setattr(read, "MAX_JSON", 1)
    refuses(DataError, "can't be read .it has more than 1 bytes.; JSON lines", read_examples, given)


def test_the_forms_of_trl_are_the_same_conversation(tmp_path):
    """Of a prompt and its completion, the completion alone is learned."""
    talk, reply = THREE[:6], THREE[6:]
    forms = [{"prompt": talk, "completion": reply}, {"prompt": talk, "completion": "the cat runs"}]
    forms += [{"messages": talk, "target": "the cat runs"}, {"prompt": talk, "target": "the cat runs"}]
    (whole,) = rendered(tmp_path, {"messages": THREE})
    for row, count in zip(forms, (1, 1, 3, 1), strict=True):
        (one,) = rendered(tmp_path, row)
        assert (one, one.written) == (whole, whole.written)
        assert len(rendered(tmp_path, row, turns="all")) == count
    (one,) = rendered(tmp_path, {"prompt": talk})
    assert (one.prompt, one.target) == (whole.prompt, None)
    (one,) = read_examples(options(tmp_path, {"prompt": "the cat", "completion": "two dog"}))
    assert (one.prompt, one.target, one.talk) == ("the cat", "two dog", None)
    (one,) = read_examples(options(tmp_path, {"prompt": "the cat", "messages": THREE}, messages_field=""))
    assert one.prompt == "the cat"
    (one,) = read_examples(options(tmp_path, {"talk": {"of": THREE}}, messages_field="talk.of"))
    assert one.talk == read_examples(options(tmp_path, {"messages": THREE}))[0].talk


def test_a_turn_is_learned_behind_what_the_model_sees_when_it_writes_it(tmp_path):
    """A template that keeps the reasoning of the last turn only, as Qwen3's, and writes on behind the end."""
    why = "{{ turn.why + ' / ' if loop.last }}{{ turn.content }} </s> +"
    template = MARKED.replace("{{ turn.content }} </s>", why)
    talk = [dict(m, why=why) if m["role"] == "assistant" else m for m, why in zip(THREE[1:5], "-1-2", strict=True)]
    (before, one), (after, two) = pairs(rendered(tmp_path, {"messages": talk}, template=template, turns="all"))
    assert (one, two) == ("1 / two dog ", "2 / red ")
    assert before == "<s><< user the dog >> << assistant "
    assert after == "<s><< user the dog >> << assistant two dog </s> + << user big >> << assistant "


def test_arguments_and_a_prefill_are_in_the_prompt_and_in_its_form(tmp_path):
    template = MARKED.replace("{{ bos_token", "{{ '+ ' if plus }}{{ name }}{{ bos_token")
    given = {"template_arg": ["plus=true", "name=a, b", 'name="who "'], "prefill": "the "}
    row = {"messages": THREE, "targets": ["the cat runs", "dog", "the cat runs"]}
    (one,) = rendered(tmp_path, row, template=template, **given)
    assert one.prompt.startswith("+ who <s><< system")
    assert one.prompt.endswith("<< user who >> << assistant the ")
    assert (one.written, one.references) == (("cat runs ", 1), ("cat runs", "dog"))
    how, tokenizer = options(tmp_path, row, **given), chat_tokenizer(template)
    form = PromptForm(chat=True, template_arg=('name="who "', "plus=true"), prefill="the ")
    assert form_of(how, [one]) == form == PromptForm.model_validate_json(form.model_dump_json(), strict=True)
    assert (data_info([one], how, tokenizer).form, data_info([one], how, tokenizer).template) == (form, "{messages}")
    old = {"template": "{prompt}", "chat": True, "system": ""}  # as caches of earlier versions have it, to the byte
    assert PromptForm.model_validate(old).model_dump() == old
    how = options(tmp_path, {"prompt": "cat", "target": "the dog"}, chat=True, **given)
    (one,) = tokenize_prompts(read_examples(how), tokenizer, how).examples
    assert (one.prompt, one.target) == ("+ who <s><< user cat >> << assistant the ", "dog")
    (one,) = rendered(tmp_path, {"messages": THREE[1:3]}, chat=True, system="a cat")
    assert one.prompt == "<s><< system a cat >> << user the dog >> << assistant "


ROLES = "{% if messages[0].role == 'tool' %}{{ raise_exception('no role ' + messages[0].role) }}{% endif %}" + MARKED
OPENS = MARKED.replace("%}<< assistant {% endif", "%}<< assistant who {% endif")
CALLS = MARKED.replace("{{ turn.content }}", "{{ turn.content or turn.tool_calls[0].function.name }}")


PARTS = [*CALL[:3], {"role": "assistant", "content": [{"type": "text", "text": "three "}, "cat"]}]
ODD = [
    (said("assistant red", "user who", "assistant cat"), MARKED, "cat "),
    (said("user who", "assistant red", "assistant cat"), MARKED, "red |cat "),
    (said("critic who", "assistant red"), MARKED, "red "),
    (said("user who", "assistant cat", "user big"), MARKED, "cat "),
    (PARTS, CALLS, "big |three cat "),
]


@pytest.mark.parametrize(("messages", "template", "learned"), ODD, ids="opens twice unknown open parts".split())
def test_odd_rows_are_what_the_template_makes_of_them(tmp_path, messages, template, learned):
    found = pairs(rendered(tmp_path, {"messages": messages}, template=template, turns="all"))
    assert "|".join(text for _, text in found) == learned


def test_a_row_with_nothing_to_learn_can_be_sampled_for(tmp_path):
    (one,) = rendered(tmp_path, {"messages": said("system a cat")})
    assert (one.prompt, one.target, one.written) == ("<s><< system a cat >> << assistant ", None, None)
    (one,) = rendered(tmp_path, {"messages": OTHER}, template=CALLS)  # a call is compared as it is written
    assert one.target == "red "


ONE = said("user who", "assistant red")
REFUSED = [
    (said("user who"), {}, "line 2: no message of the assistant stands behind another"),
    (said("assistant who"), {}, "line 2: no message of the assistant stands behind another"),
    ([], {}, "line 2: there is no message"),
    ([{"content": "who"}], {}, "line 2: message 1 has no role; one looks like"),
    ([{"role": "user", "content": [{"type": "image"}]}], {}, "line 2: message 1 has a part that is no text"),
    ("who", {"messages_field": "messages"}, "line 2: 'messages' is no list of messages"),
    (None, {}, "line 2: has no messages, but other rows have some"),
    (said("tool who", "assistant red"), {"template": ROLES}, "row 2: the chat template can't be used (no role tool)"),
    (said("user \ud800", "assistant red"), {}, "row 2: the chat template can't be used ('utf-8' codec"),
    (ONE, {"template": OPENS},
     "row 1: the chat template writes the assistant's turn otherwise than a prompt begins it"),
    (ONE, {"prefill": "the "}, "begins it ('"),
    (ONE, {"template": MARKED.replace("</s>", "")},
     "row 1: the chat template ends the assistant's turn with no token at which the model stops ('</s>')"),
    (ONE, {"template": None}, "messages: the model's tokenizer has no chat template"),
    (ONE, {"of_text": "Q: {prompt}"}, "--template 'Q: {prompt}' is for plain prompts"),
    (ONE, {"long_prompts": "truncate"}, "would cut off the end of a conversation"),
    (ONE, {"template_arg": "x=1"}, "--template-arg x=1: the chat template knows no such"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "given", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_can_not_be_used_is_one_line_with_the_row(tmp_path, messages, given, message):
    rows = [{"messages": THREE[:3]}, {"messages": messages, **({} if messages else {"prompt": "cat"})}]

    def use(template=MARKED, of_text="{prompt}", **given):
        how = options(tmp_path, *rows, template=of_text, **given)
        tokenize_prompts(read_examples(how, turns="all"), chat_tokenizer(template), how, stops=END)

    assert message in refuses(KetchupError, ".", use, **given)


def test_options_of_a_chat_without_a_chat_are_refused(tmp_path):
    for given in ({"prefill": "the"}, {"template_arg": "a=1"}):
        how = options(tmp_path, {"prompt": "the cat"}, **given)
        refuses(ConfigError, "of a chat: set --chat", tokenize_prompts, read_examples(how), chat_tokenizer(), how)
    for wrong in ("plus", "=1", "a b=1", 5):
        with pytest.raises(ValueError, match="must be NAME=VALUE"):
            DataOptions(data="d", template_arg=wrong)
