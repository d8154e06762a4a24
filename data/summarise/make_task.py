"""Make the summarisation task: short invented reports, each with a one-sentence summary.

Everything here is invented and deterministic in ``--seed``: the same seed writes the same files.

    python data/summarise/make_task.py data        # train.jsonl, prompts.jsonl, dev.jsonl, test.jsonl
    python data/summarise/make_task.py tokenizer   # tokenizer/ (word level)
    python data/summarise/make_task.py teacher     # teacher/ (T5, trained by cross-entropy on fresh reports)
    python data/summarise/make_task.py student     # student/ (T5, random initialisation)
    python data/summarise/make_task.py predistilled   # predistilled/ (the student after its pre-distillation)

A report has two to four sentences: two or three events, and often a helper. Its summary takes
selection (the event whose verb is the most newsworthy, wherever it stands), coreference (who "she" is, and
what her trade is) and aggregation (the helper of that event is a subject too, and the verb becomes plural; the
place may have been said in any sentence). The same content has several wordings: two verbs,
the place first or last, active or passive.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ketchup_cache.data.training import train_on_fresh
from ketchup_cache.data.translate.make_task import exact_match, make_model, save

HERE = Path(__file__).resolve().parent
SIZES = {"train": 4000, "prompts": 6000, "dev": 400, "test": 400}
ROLLOUT = "--greedy --limit 2000 --max-new-tokens 24 --rollout-batch 256"
PRETRAIN = "--epochs 15 --batch-size 64 --lr 4e-3 --warmup 30 --schedule linear --weight-decay 0"
"""Of `ketchup-cache`; few epochs on purpose: after 60, reinforcement hardly moves the student (docs/log.md)."""

NAMES = {"she": "anna clara emma greta ida lena".split(), "he": "bruno david felix hugo karl otto".split()}
OBJECT = {"she": "her", "he": "him"}
TRADES = "farmer baker sailor singer doctor hunter poet guard".split()
THINGS = "drum boat lamp bell horse goat ring kite".split()
PLACES = "harbour market forest tower garden cellar".split()
COUNTS = "a two three four".split()
VERBS = {  # past tense: (summary verbs, singular; the first more often); the most newsworthy first
    "rescued": ("saves", "rescues"),
    "stole": ("steals", "takes"),
    "broke": ("breaks", "destroys"),
    "found": ("finds", "discovers"),
    "built": ("builds", "makes"),
    "sold": ("sells", "trades"),
    "painted": ("paints", "colours"),
    "cleaned": ("cleans", "washes"),
}
PARTICIPLES = dict(zip(VERBS, "rescued stolen broken found built sold painted cleaned".split(), strict=True))
OTHER = ". the in there helped and by is are".split()


def plural(verb: str) -> str:
    """`saves` → `save`, `washes` → `wash`."""
    return verb[:-2] if verb == "washes" else verb[:-1]


def things(count: str, thing: str) -> str:
    """`a drum`, `two drums`."""
    return f"{count} {thing}" if count == "a" else f"{count} {thing}s"


def report(rng: random.Random) -> tuple[str, str]:
    """A random report and one summary of it."""
    pronouns = ["she", "he"]
    rng.shuffle(pronouns)
    names = {pronoun: rng.choice(NAMES[pronoun]) for pronoun in pronouns}
    trades = dict(zip(pronouns, rng.sample(TRADES, 2), strict=True))
    verbs = rng.sample(list(VERBS), rng.choice((2, 2, 3)))
    main = min(verbs, key=list(VERBS).index)
    place, told = rng.choice(PLACES), rng.randrange(len(verbs))
    helped = rng.choice(verbs) if rng.random() < 0.5 else None
    known: set[str] = set()
    last, sentences, summary = "", [], ("", "")

    def mention(pronoun: str) -> str:
        nonlocal last
        again = pronoun in known
        known.add(pronoun)
        subject = names[pronoun] if again else f"the {trades[pronoun]} {names[pronoun]}"
        subject = pronoun if again and last == pronoun and rng.random() < 0.7 else subject
        last = pronoun
        return subject

    for number, verb in enumerate(verbs):
        actor = pronouns[0] if number == 0 else rng.choice(pronouns)
        count, thing = rng.choice(COUNTS), rng.choice(THINGS)
        where = f" in the {place}" if number == told else ""
        sentences.append(f"{mention(actor)} {verb} {things(count, thing)}{where} .")
        helper = None
        if verb == helped:
            helper = next(pronoun for pronoun in pronouns if pronoun != actor)
            sentences.append(f"{mention(helper)} helped {OBJECT[actor]} .")
        if verb == main:
            who = trades[actor] + (f" and {trades[helper]}" if helper else "")
            summary = (who, things(count, thing))
    who, what = summary
    words = VERBS[main][0 if rng.random() < 0.7 else 1]
    core = f"{who} {plural(words) if ' and ' in who else words} {what}"
    form = rng.random()
    if form < 0.2:
        core = f"{what} {'is' if what.startswith('a ') else 'are'} {PARTICIPLES[main]} by {who}"
    text = f"in {place} {core}" if form > 0.8 else f"{core} in {place}"
    return " ".join(sentences), text


def words() -> list[str]:
    """Every word, in a fixed order."""
    out = [*OTHER, *COUNTS, *TRADES, *PLACES, *OBJECT, *OBJECT.values(), *NAMES["she"], *NAMES["he"]]
    out += [form for thing in THINGS for form in (thing, f"{thing}s")]
    out += [*VERBS, *PARTICIPLES.values(), *(form for pair in VERBS.values() for v in pair for form in (v, plural(v)))]
    return list(dict.fromkeys(out))


def confusable() -> dict[str, list[str]]:
    """For every word of a summary that carries content, the words of its category (itself included)."""
    pairs = [verb for pair in VERBS.values() for verb in pair]
    groups = [TRADES, PLACES, COUNTS[1:], THINGS, [f"{t}s" for t in THINGS], list(PARTICIPLES.values())]
    groups += [pairs, [plural(verb) for verb in pairs]]
    return {word: group for group in groups for word in group}


def write_data(seed: int) -> None:
    """Write the four splits; no report occurs twice."""
    rng = random.Random(f"reports-{seed}")
    seen: set[str] = set()
    for split in ("dev", "test", "prompts", "train"):
        with (HERE / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            count = 0
            while count < SIZES[split]:
                source, target = report(rng)
                if source in seen:
                    continue
                seen.add(source)
                count += 1
                row = {"prompt": source} if split == "prompts" else {"prompt": source, "target": target}
                file.write(json.dumps(row) + "\n")


def read(split: str) -> list[dict[str, str]]:
    """The rows of a split."""
    return [json.loads(line) for line in (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def make_tokenizer() -> Any:
    """The word-level tokenizer: pad 0 (also the decoder's start), eos 1, unk 2; EOS is appended."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        model_input_names=["input_ids", "attention_mask"],
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def predistil() -> None:
    """The student after cross-entropy on the teacher's outputs, by the tool's own commands."""
    from ketchup_cache.cli import main as tool

    with tempfile.TemporaryDirectory() as folder:
        cache, out = f"{folder}/sft", Path(folder) / "out"
        data = ["--data", str(HERE / "prompts.jsonl")]
        for command in (
            ["rollout", "--student", str(HERE / "teacher"), *data, "--cache", cache, *ROLLOUT.split()],
            ["pretrain", "--model", str(HERE / "student"), "--cache", cache, "--out", str(out), *PRETRAIN.split()],
        ):
            if code := tool(command):
                raise SystemExit(code)
        shutil.copytree(out / "best", HERE / "predistilled", dirs_exist_ok=True)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("data", "tokenizer", "teacher", "student", "predistilled"))
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the teacher")
    parser.add_argument("--threads", type=int, default=1, help="the last bits of the teacher depend on it")
    args = parser.parse_args()
    if args.part == "data":
        write_data(args.seed)
        return
    import torch

    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer()
    if args.part == "tokenizer":
        tokenizer.save_pretrained(HERE / "tokenizer")
    elif args.part == "predistilled":
        predistil()
    elif args.part == "student":
        save(make_model(args.seed + 93, len(tokenizer), 64, 2), tokenizer, HERE / "student")
    else:
        held_out = {row["prompt"] for split in ("dev", "test", "prompts") for row in read(split)}
        confused = confusable()

        def draw(rng: random.Random, mistakes: bool) -> tuple[str, str]:
            """Half of the mistaken summaries have words replaced inside their category."""
            prompt, target = report(rng)
            if mistakes and rng.random() < 0.5:
                words = target.split()
                target = " ".join(rng.choice(confused[w]) if w in confused and rng.random() < 0.2 else w for w in words)
            return prompt, target

        model = make_model(args.seed, len(tokenizer), 96, 3)
        train_on_fresh(model, tokenizer, draw, held_out, args.seed, args.steps)
        save(model, tokenizer, HERE / "teacher")
        print(f"dev exact match {exact_match(model, tokenizer, read('dev')):.1f} %")


if __name__ == "__main__":
    main()
