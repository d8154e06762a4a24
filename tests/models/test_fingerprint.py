import json
import struct
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ketchup_cache.errors import ModelError
from ketchup_cache.models.fingerprint import first_difference, state_fingerprint, tokenizer_info, weights_fingerprint
from tests.helpers.errors import refuses
from tests.helpers.models import WORDS, edit_config, make_t5, make_tokenizer


def test_sharding_and_metadata_do_not_matter(tmp_path):
    model = make_t5("1.1")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    volatile = {"transformers_version": "4.0", "_name_or_path": "x", "use_cache": False, "dropout_rate": 0.0}
    edit_config(tmp_path / "many", **volatile)
    assert weights_fingerprint(tmp_path / "one") == weights_fingerprint(tmp_path / "many")


@pytest.mark.parametrize(
    "change", [{"scale_decoder_outputs": False}, {"num_heads": 2}, {"layer_norm_epsilon": 1e-5}, {}]
)
def test_one_bit_of_a_weight_and_the_architecture_matter(change, tmp_path):
    make_t5().save_pretrained(tmp_path)
    before, file = weights_fingerprint(tmp_path), tmp_path / "model.safetensors"
    edit_config(tmp_path, **change)
    if not change:
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    assert weights_fingerprint(tmp_path) != before


def test_two_weights_that_change_places_matter(tmp_path):
    model = make_t5()
    before = state_fingerprint(model)
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.q, attention.k = attention.k, attention.q
    assert state_fingerprint(model) != before


def test_weights_are_read_without_torch(tmp_path):
    make_t5().save_pretrained(tmp_path)
    program = (
        "import sys; from pathlib import Path; from ketchup_cache.models.fingerprint import weights_fingerprint;"
        f"print(weights_fingerprint(Path({str(tmp_path)!r}))); assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == weights_fingerprint(tmp_path)


def safetensors_bytes(header: object, data: bytes = bytes(8)) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


TENSORS = [
    {"a": TENSOR | {"dtype": "F99"}}, {"a": TENSOR | {"dtype": ["F32"]}}, {"a": TENSOR | {"shape": [3]}},
    {"a": TENSOR | {"shape": ["x"]}}, {"a": TENSOR | {"shape": [-2, -1]}}, {"a": TENSOR | {"data_offsets": [0, 8, 9]}},
    {"a": TENSOR, "b": TENSOR}, {"a": 3}, [1],
]  # fmt: skip
DAMAGED = [
    b"", b"\x01", b"\x08" + bytes(7) + b"not json", struct.pack("<Q", 1 << 60) + b"{}",
    *map(safetensors_bytes, TENSORS), safetensors_bytes({"a": TENSOR | {"data_offsets": [4, 12]}}, bytes(12)),
    *(safetensors_bytes({"a": TENSOR}, bytes(size)) for size in (7, 9)),
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_weights_are_refused(content, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": TENSOR}))
    weights_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refuses(ModelError, r"model\.safetensors: is damaged", weights_fingerprint, tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/hosts", 3])
def test_an_index_can_only_name_files_beside_it(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refuses(ModelError, "is not an index of weight files beside it", weights_fingerprint, tmp_path)


# --------------------------------------------------------------------------------------------------- tokenizers


MERGES = [("a", "b"), ("b", "c"), ("ab", "c")]


def bpe(merges: list[tuple[str, str]] = MERGES, *, lowercase: bool = False, eos: bool = True):
    """Byte-level BPE over a few letters: what T5-like tokenizers with merges look like."""
    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc", "abc"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    if eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def fingerprint(tokenizer) -> str:
    return tokenizer_info(tokenizer, "somewhere").fingerprint


def test_the_same_tokenizer_saved_elsewhere_is_the_same(tmp_path):
    for i, tokenizer in enumerate((make_tokenizer(), bpe())):
        tokenizer.save_pretrained(tmp_path / str(i))
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path / str(i))
        assert fingerprint(again) == fingerprint(tokenizer)
        assert first_difference(again, tokenizer) is None


def test_use_does_not_change_a_fingerprint():
    tokenizer = make_tokenizer()
    before = fingerprint(tokenizer)
    tokenizer(["the cat", "a"], padding=True, truncation=True, max_length=1)
    assert fingerprint(tokenizer) == before


OTHERS = {"merge": bpe(MERGES[:2]), "order": bpe([MERGES[1], MERGES[0], MERGES[2]])}  # "abc" is a+bc
OTHERS |= {"normaliser": bpe(lowercase=True), "post-processor": bpe(eos=False)}


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_encodes_differently_is_different(other):
    other = OTHERS[other]
    assert other.get_vocab() == bpe().get_vocab()
    assert fingerprint(other) != fingerprint(bpe())
    assert " in one and " in first_difference(bpe(), other)


def test_a_word_or_a_special_token_makes_a_difference_and_is_named():
    own, special, words = make_tokenizer(), make_tokenizer(), make_tokenizer([*WORDS[:4], "hound", *WORDS[5:]])
    special.eos_token = "<unk>"
    assert len({fingerprint(tokenizer) for tokenizer in (own, special, words)}) == 3
    assert first_difference(own, words) == f"id 7 is {WORDS[4]!r} in one and 'hound' in the other"
    assert first_difference(own, special) == "eos_token_id is 1 in one and 2 in the other"
    assert tokenizer_info(own, "x").vocab_size == 60  # the largest id and one


def test_names_of_tokens_that_are_in_no_text_make_no_difference():
    own, other = make_tokenizer(), make_tokenizer()
    other.pad_token, other.unk_token, other.bos_token = "</s>", None, "<pad>"
    assert fingerprint(own) == fingerprint(other)
    assert first_difference(own, other) is None
