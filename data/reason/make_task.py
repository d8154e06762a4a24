"""Make the reasoning task: invented word problems, solved step by step with a calculator.

Everything here is invented and deterministic in ``--seed``: the same seed writes the same files.

    python data/reason/make_task.py data        # train.jsonl, prompts.jsonl, dev.jsonl, test.jsonl
    python data/reason/make_task.py tokenizer   # tokenizer/ (words and single digits; spaces belong to the word after)
    python data/reason/make_task.py teacher     # teacher/ (T5, trained by cross-entropy on fresh problems)
    python data/reason/make_task.py student     # student/ (T5, random initialisation)
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from problems import PIECES, problem, solution, words

from ketchup_cache.data.training import train_on_fresh
from ketchup_cache.data.translate.make_task import make_model, save

HERE = Path(__file__).resolve().parent
SIZES = {"train": 4000, "prompts": 8000, "dev": 500, "test": 500}


def write_data(seed: int) -> None:
    """Write the four splits; no problem occurs twice."""
    rng = random.Random(f"problems-{seed}")
    seen: set[str] = set()
    for split in ("dev", "test", "prompts", "train"):
        with (HERE / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            count = 0
            while count < SIZES[split]:
                drawn, target = problem(rng)
                if drawn.prompt in seen:
                    continue
                seen.add(drawn.prompt)
                count += 1
                row = {"prompt": drawn.prompt} if split == "prompts" else {"prompt": drawn.prompt, "target": target}
                file.write(json.dumps(row) + "\n")


def read(split: str) -> list[dict[str, str]]:
    """The rows of a split."""
    return [json.loads(line) for line in (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def make_tokenizer() -> Any:
    """Words and single digits, each with the space before it: pad 0 (also the decoder's start), eos 1, unk 2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        model_input_names=["input_ids", "attention_mask"],
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("data", "tokenizer", "teacher", "student"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2800, help="training steps of the teacher")
    parser.add_argument("--mistakes", type=float, default=0.3, help="share of solutions with a mistake, at the end")
    parser.add_argument("--width", type=int, default=48, help="width of the student")
    parser.add_argument("--layers", type=int, default=2, help="encoder and decoder layers of the student")
    parser.add_argument("--threads", type=int, default=1, help="the last bits of the teacher depend on it")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for tokenizer and models")
    args = parser.parse_args()
    if args.part == "data":
        write_data(args.seed)
        return
    import torch

    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer()
    if args.part == "tokenizer":
        tokenizer.save_pretrained(args.out / "tokenizer")
    elif args.part == "student":
        save(
            make_model(args.seed + 93, len(tokenizer), args.width, args.layers),
            tokenizer,
            args.out / "student",
            longest=48,
        )
    else:
        model = make_model(args.seed, len(tokenizer), 96, 3)
        held_out = {row["prompt"] for split in ("dev", "test", "prompts") for row in read(split)}

        def draw(rng: random.Random, mistakes: bool) -> tuple[str, str]:
            """A mistaken solution has one wrong step and goes on from there."""
            drawn, target = problem(rng)
            if drawn.prompt not in held_out and mistakes and rng.random() < args.mistakes:
                target = solution(drawn.mistaken(rng)) or target
            return drawn.prompt, target

        train_on_fresh(model, tokenizer, draw, held_out, args.seed, args.steps)
        save(model, tokenizer, args.out / "teacher", longest=48)


if __name__ == "__main__":
    main()
