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
import time
from pathlib import Path
from typing import Any

from problems import PIECES, problem, solution, words

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


def train(model: Any, tokenizer: Any, seed: int, steps: int, mistakes: float) -> None:
    """Teacher forcing on fresh problems that are in no split but train: right solutions, later some with a mistake.

    A mistaken solution has one wrong step and goes on from there, so that the teacher learns to continue after an
    error and is not so sure of itself that every error costs the same.
    """
    import torch
    from torch.nn.functional import cross_entropy

    batch, peak, warm, rng = 64, 2e-3, 200, random.Random(f"teacher-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0)
    held_out = {row["prompt"] for split in ("dev", "test", "prompts") for row in read(split)}
    pool: list[tuple[list[int], list[int]]] = []
    started = time.time()

    def pad(rows: list[list[int]]) -> Any:
        width = max(len(row) for row in rows)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    def fresh(noisy: bool) -> tuple[str, str]:
        while True:
            drawn, target = problem(rng)
            if drawn.prompt not in held_out:
                wrong = solution(drawn.mistaken(rng)) if noisy and rng.random() < mistakes else None
                return drawn.prompt, wrong or target

    model.train()
    for step in range(steps):
        if not pool:  # a few batches at a time, of similar length
            pairs = [fresh(step > 0.6 * steps) for _ in range(16 * batch)]
            sources = tokenizer([p for p, _ in pairs]).input_ids
            targets = tokenizer([t for _, t in pairs]).input_ids
            ordered = sorted(zip(sources, targets, strict=True), key=lambda pair: len(pair[1]))
            chunks = [ordered[k : k + batch] for k in range(0, len(ordered), batch)]
            rng.shuffle(chunks)
            pool = [pair for chunk in chunks for pair in chunk]
        rows, pool = pool[:batch], pool[batch:]
        source, target = pad([row[0] for row in rows]), pad([row[1] for row in rows])
        mask = (source != 0).long()  # a word never has id 0
        shifted = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], 1)
        rate = (step + 1) / warm if step < warm else 1 - (step - warm) / max(1, steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        output = model(input_ids=source, attention_mask=mask, decoder_input_ids=shifted, use_cache=False)
        loss = cross_entropy(output.logits[target != 0], target[target != 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} ({time.time() - started:.0f} s)", flush=True)
    model.eval()


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
        train(model, tokenizer, args.seed, args.steps, args.mistakes)
        save(model, tokenizer, args.out / "teacher", longest=48)


if __name__ == "__main__":
    main()
