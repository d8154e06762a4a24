"""A decoder-only teacher and student for `translate`, made on the spot, for what needs such a pair (trl_live.py).

    python -m benchmarks.decoder_pair [--epochs 1]        # 10 minutes; what is finished is not made again

Qwen2 architecture, the task's words as tokens. The teacher (3.1M parameters) learns the references by
`ketchup-cache pretrain`, then goes on with half of them disturbed as `data/translate/make_task.py` does it, so that
stopping early is not the cheapest way out of an error. The student (0.25M) is pre-distilled on the teacher's greedy
outputs for the first 400 prompts (56 % exact on dev; 1,500: 99.6, 200: 3). Everything goes to benchmarks/work, which
git ignores.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, options
from data.translate.make_task import Language

TASK = ROOT / "data" / "translate"
FOLDER = ROOT / "benchmarks" / "work" / "decoder-pair"
SEED = 7
"""Of the shipped task: its lexicon."""
TEMPLATE = "{prompt} =>"
TEACHER = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4}
STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
PREDISTILLED_ON = 400
MAX_NEW_TOKENS = 36


def tokenizer() -> Any:
    """The task's words, `=>`, and nothing added to a text: a decoder-only model goes on where its prompt ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "=>", *Language(SEED).words()])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def untrained(folder: Path, shape: dict[str, int], seed: int) -> Path:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    words = tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(words),
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **shape,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def disturbed(path: Path) -> Path:
    """The references; in half of them, a fifth of the words that can be mistaken for others are."""
    rng = random.Random(0)
    groups = Language(SEED).confusable()

    def replace(word: str) -> str:
        return rng.choice(groups[word]) if word in groups and rng.random() < 0.2 else word

    rows = [json.loads(line) for line in (TASK / "train.jsonl").read_text().splitlines()]
    for row in rows:
        if rng.random() < 0.5:
            row["target"] = " ".join(map(replace, row["target"].split()))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tool(*words: object) -> None:
    """`ketchup-cache …`; what it says goes to stderr."""
    subprocess.run(
        [sys.executable, "-m", "ketchup_cache", *map(str, words)], cwd=ROOT, check=True, stdout=sys.stderr.fileno()
    )


def pretrain(model: Path, out: Path, epochs: int, lr: float, *data: object) -> Path:
    tool(
        *("pretrain", "--model", model, "--out", out, "--epochs", epochs, "--lr", lr, "--batch-size", 64),
        *("--warmup", 50, "--schedule", "linear", "--weight-decay", 0, "--max-new-tokens", MAX_NEW_TOKENS, *data),
    )
    return out / "best"


@dataclass(frozen=True)
class Pair:
    """Folders of the teacher, of the pre-distilled student, and of the student as it was before."""

    teacher: Path
    student: Path
    untrained: Path


def pair(
    folder: Path = FOLDER,
    epochs: int = 1,
    student_epochs: int = 80,
    *,
    outputs: int = PREDISTILLED_ON,
    short: bool = False,
) -> Pair:
    """epochs: passes over the references, then over 9,600 disturbed ones. What lies there finished is taken as it is.

    short: for seconds only, on less; such a pair has learnt to end a sentence and little else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = Pair(folder / "teacher" / "best", folder / "student" / "best", folder / "student-start")
    if not made.teacher.exists():
        start = untrained(folder / "teacher-start", TEACHER, SEED)
        clean, then = (2560, 2560) if short else (0, 9600)
        model = pretrain(start, folder / "teacher-clean", epochs, 2e-3, "--template", TEMPLATE,
                         "--data", TASK / "train.jsonl", "--limit", clean)  # fmt: skip
        pretrain(model, folder / "teacher", epochs, 1e-3, "--template", TEMPLATE,
                 "--data", disturbed(folder / "disturbed.jsonl"), "--limit", then)  # fmt: skip
    if not made.student.exists():
        untrained(made.untrained, STUDENT, SEED + 93)
        cache = ("--cache", folder / "sft")
        tool("rollout", "--student", made.teacher, "--greedy", "--data", TASK / "prompts.jsonl", "--template", TEMPLATE,
             "--limit", outputs, "--max-new-tokens", MAX_NEW_TOKENS, "--rollout-batch", 256,
             *cache)  # fmt: skip
        pretrain(made.untrained, folder / "student", student_epochs, 3e-3, *cache)
    return made


def main() -> None:
    chosen = options(__doc__, epochs=(1, "passes of the teacher over the references, and over the disturbed ones"),
                     student_epochs=(80, "passes of the student over the teacher's outputs"),
                     outputs=(PREDISTILLED_ON, "outputs of the teacher that the student learns"),
                     folder=(str(FOLDER), "where the models go"))  # fmt: skip
    made = pair(Path(chosen.folder), chosen.epochs, chosen.student_epochs, outputs=chosen.outputs, short=chosen.short)
    print(f"{made.teacher}\n{made.student}")


if __name__ == "__main__":
    main()
