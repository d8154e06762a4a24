"""Make the translation task of the demo: English-like sentences into an invented language.

Everything here is invented and deterministic in ``--seed``: the same seed writes the same files.

    python data/translate/make_task.py data        # train.jsonl, prompts.jsonl, dev.jsonl, test.jsonl
    python data/translate/make_task.py tokenizer   # tokenizer/ (word level, shared by source and target)
    python data/translate/make_task.py teacher     # teacher/ (T5, trained by cross-entropy on train.jsonl)
    python data/translate/make_task.py student     # student/ (T5, random initialisation)

The language. The order is time, tense, subject, object marker, object, verb, place.  Every noun has one of
three classes that has to be learnt noun by noun; adjectives and determiners follow their noun and agree with
its class, and a plural is a particle after the noun.  A transitive verb has two translations, chosen by the
animacy of its object, and a preposition two, chosen by the number of its noun.  The tense particle agrees
with the number of the subject, the object marker with the animacy of the object.
Words are drawn by Zipf's law.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from ketchup_cache.data.training import BATCH, fit

HERE = Path(__file__).resolve().parent
SIZES = {"train": 24000, "prompts": 24000, "dev": 500, "test": 500}

PEOPLE = "child king farmer baker sailor teacher queen singer doctor hunter poet guard"
ANIMALS = "dog cat horse goat bird fox wolf bee crow hen"
THINGS = "book stone boat lamp coat knife bell letter drum wheel ring basket rope mirror spoon kite"
PLACES = "garden forest river market tower bridge harbour cellar island cave"
IRREGULAR = {"child": "children", "wolf": "wolves", "fox": "foxes", "knife": "knives"}
TRANSITIVE = "want follow help call visit paint clean lift answer thank repair greet"
INTRANSITIVE = "laugh wait jump shout"
ADJECTIVES = "old small green quiet heavy bright strange happy cold proud lazy round"
SINGULAR, PLURAL, EITHER = "a every".split(), "two three many".split(), "the this my".split()
PREPOSITIONS = "in near behind under".split()
TIMES = "today yesterday tomorrow often never".split()


def pick(rng: random.Random, words: list[str]) -> str:
    """One of the words, the earlier ones more often (Zipf's law)."""
    return rng.choices(words, [1.0 / (rank + 1.5) for rank in range(len(words))])[0]


Ids = list[int]


class Language:
    """The invented lexicon and the grammar that makes pairs of sentences."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"lexicon-{seed}")
        consonants, vowels = "b d f g j k l m n p r s t v z".split(), "aeiou"
        stems = [a + x + b + y for a in consonants for x in vowels for b in consonants for y in vowels]
        rng.shuffle(stems)
        fresh = iter(stems)
        self.kind: dict[str, str] = {}
        for kind, words in (("person", PEOPLE), ("animal", ANIMALS), ("thing", THINGS), ("place", PLACES)):
            self.kind.update(dict.fromkeys(words.split(), kind))
        self.noun = {word: next(fresh) for word in self.kind}
        self.noun_class = {word: rng.randrange(3) for word in self.kind}
        self.verb = {word: (next(fresh), next(fresh)) for word in TRANSITIVE.split()}
        self.intransitive = {word: next(fresh) for word in INTRANSITIVE.split()}
        self.adjective = {word: self._forms(next(fresh)) for word in ADJECTIVES.split()}
        self.determiner = {word: self._forms(next(fresh)) for word in SINGULAR + PLURAL + EITHER}
        self.preposition = {word: (next(fresh), next(fresh)) for word in PREPOSITIONS}
        self.other = {word: next(fresh) for word in [*TIMES, "past", "now", "later"]}
        self.particle = {word: next(fresh)[:3] for word in ("plural", "animate", "inanimate")}

    @staticmethod
    def _forms(stem: str) -> list[str]:
        return [stem + ending for ending in ("s", "n", "l")]

    def noun_phrase(self, rng: random.Random, kinds: str) -> tuple[str, str, bool, str]:
        """A random noun phrase: source, target, whether it is plural, and its noun."""
        kind = rng.choice(kinds.split())
        noun = pick(rng, [word for word, its in self.kind.items() if its == kind])
        plural = rng.random() < 0.4
        determiner = rng.choice(EITHER + (PLURAL if plural else SINGULAR))
        form = self.noun_class[noun]
        source, target = [determiner], [self.noun[noun]]
        if plural:
            target.append(self.particle["plural"])
        if rng.random() < 0.6:
            adjective = pick(rng, ADJECTIVES.split())
            source.append(adjective)
            target.append(self.adjective[adjective][form])
        source.append(IRREGULAR.get(noun, noun + "s") if plural else noun)
        target.append(self.determiner[determiner][form])
        return " ".join(source), " ".join(target), plural, noun

    def clause(self, rng: random.Random, transitive: bool) -> tuple[str, str]:
        """A random clause in source and target."""
        subject, subject_out, plural, _ = self.noun_phrase(rng, "person animal")
        verb = pick(rng, (TRANSITIVE if transitive else INTRANSITIVE).split())
        tense = rng.choice(("past", "now", "later"))
        if tense == "later":
            verb_in = f"will {verb}"
        elif tense == "past":
            verb_in = f"{verb}ed"
        else:
            verb_in = verb if plural else f"{verb}s"
        marker = self.other[tense] + ("m" if plural else "")
        source, target = [subject, verb_in], [marker, subject_out]
        if transitive:
            obj, obj_out, _, noun = self.noun_phrase(rng, "person animal thing")
            animate = self.kind[noun] != "thing"
            source.append(obj)
            object_marker = self.particle["animate" if animate else "inanimate"]
            target += [object_marker, obj_out, self.verb[verb][animate]]
        else:
            target.append(self.intransitive[verb])
        if rng.random() < 0.5:
            place, place_out, many, _ = self.noun_phrase(rng, "place")
            preposition = rng.choice(PREPOSITIONS)
            source += [preposition, place]
            target += [self.preposition[preposition][many], place_out]
        return " ".join(source), " ".join(target)

    def sentence(self, rng: random.Random) -> tuple[str, str]:
        """A random sentence: a clause, often with a time adverb."""
        source, target = self.clause(rng, transitive=rng.random() < 0.85)
        if rng.random() < 0.4:
            adverb = rng.choice(TIMES)
            source, target = f"{adverb} {source}", f"{self.other[adverb]} {target}"
        return source, target

    def words(self) -> list[str]:
        """Every word of both languages, in a fixed order."""
        out: list[str] = []
        for noun in self.kind:
            out += [noun, IRREGULAR.get(noun, noun + "s"), self.noun[noun]]
        for verb, pair in self.verb.items():
            out += [verb, f"{verb}s", f"{verb}ed", *pair]
        for verb, word in self.intransitive.items():
            out += [verb, f"{verb}s", f"{verb}ed", word]
        for table in (self.adjective, self.determiner, self.preposition):
            for word, forms in table.items():
                out += [word, *forms]
        for word in TIMES:
            out += [word, self.other[word]]
        for word in ("past", "now", "later"):
            out += [self.other[word], self.other[word] + "m"]
        out += ["will", *self.particle.values()]
        return list(dict.fromkeys(out))

    def confusable(self) -> dict[str, list[str]]:
        """For every target word, the words of its category (itself included)."""
        groups = [
            list(self.noun.values()),
            [word for pair in self.verb.values() for word in pair] + list(self.intransitive.values()),
            [form for forms in self.adjective.values() for form in forms],
            [form for forms in self.determiner.values() for form in forms],
            [word for pair in self.preposition.values() for word in pair],
            [self.other[word] for word in TIMES],
            [self.other[word] + end for word in ("past", "now", "later") for end in ("", "m")],
            [self.particle["animate"], self.particle["inanimate"]],
        ]
        return {word: group for group in groups for word in group}


def write_data(seed: int) -> None:
    """Write the four splits; no source sentence occurs twice."""
    language, rng = Language(seed), random.Random(f"sentences-{seed}")
    seen: set[str] = set()
    for split in ("dev", "test", "prompts", "train"):
        with (HERE / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            count = 0
            while count < SIZES[split]:
                source, target = language.sentence(rng)
                if source in seen:
                    continue
                seen.add(source)
                count += 1
                row = {"prompt": source} if split == "prompts" else {"prompt": source, "target": target}
                file.write(json.dumps(row) + "\n")


def read(split: str) -> list[dict[str, str]]:
    """The rows of a split."""
    return [json.loads(line) for line in (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def make_tokenizer(seed: int) -> Any:
    """The shared word-level tokenizer: pad 0 (also the decoder's start), eos 1, unk 2; EOS is appended."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *Language(seed).words()])}
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


def make_model(seed: int, vocabulary: int, width: int, layers: int) -> Any:
    """A T5 with random weights of a fixed seed."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // 4,
        num_heads=4,
        d_ff=width * 2,
        num_layers=layers,
        num_decoder_layers=layers,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def train(model: Any, pairs: list[tuple[Ids, Ids]], steps: int, noise: dict[int, Ids]) -> None:
    """Teacher forcing on references: clean ones first, later half of them with words replaced.

    Words are replaced inside their category (a noun by a noun).  Without it the teacher is so sure of
    itself that a wrong word costs almost as much as stopping at once, and a student learns to stop early;
    with it the teacher also learns to continue after a wrong word.
    """
    rng = random.Random(0)
    batches: list[list[int]] = []

    def corrupt(ids: list[int]) -> list[int]:
        if rng.random() < 0.5:
            return ids
        return [rng.choice(noise[i]) if i in noise and rng.random() < 0.2 else i for i in ids]

    def batch(step: int) -> list[tuple[Ids, Ids]]:
        if not batches:
            order = list(range(len(pairs)))
            rng.shuffle(order)
            for start in range(0, len(order), BATCH * 8):  # batches of similar length
                chunk = sorted(order[start : start + BATCH * 8], key=lambda i: len(pairs[i][1]))
                found = [chunk[k : k + BATCH] for k in range(0, len(chunk), BATCH)]
                rng.shuffle(found)
                batches.extend(found)
        rows = [pairs[i] for i in batches.pop()]
        return [(source, corrupt(target) if step > 0.45 * steps else target) for source, target in rows]

    fit(model, batch, steps, warm=100)


def exact_match(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Share of greedy outputs that equal the reference, in percent."""
    import torch

    hits = 0
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        inputs = tokenizer([row["prompt"] for row in part], padding=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        hits += sum(text == row["target"] for text, row in zip(texts, part, strict=True))
    return 100.0 * hits / len(rows)


def save(model: Any, tokenizer: Any, folder: Path, longest: int = 40) -> None:
    """Write a model with its tokenizer; outputs are greedy by default, and of at most `longest` tokens."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, max_new_tokens=longest, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("data", "tokenizer", "teacher", "student"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the teacher")
    parser.add_argument("--width", type=int, default=64, help="width of the student")
    parser.add_argument("--layers", type=int, default=2, help="encoder and decoder layers of the student")
    parser.add_argument("--threads", type=int, default=1, help="the last bits of the teacher depend on it")
    args = parser.parse_args()
    if args.part == "data":
        write_data(args.seed)
        return
    import torch

    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.seed)
    if args.part == "tokenizer":
        tokenizer.save_pretrained(HERE / "tokenizer")
    elif args.part == "student":
        save(make_model(args.seed + 93, len(tokenizer), args.width, args.layers), tokenizer, HERE / "student")
    else:
        rows = read("train")
        pairs = [(tokenizer(row["prompt"]).input_ids, tokenizer(row["target"]).input_ids) for row in rows]
        ids = tokenizer.get_vocab()
        groups = Language(args.seed).confusable().items()
        noise = {ids[word]: [ids[other] for other in group] for word, group in groups}
        model = make_model(args.seed, len(tokenizer), 128, 3)
        train(model, pairs, args.steps, noise)
        save(model, tokenizer, HERE / "teacher")
        print(f"dev exact match {exact_match(model, tokenizer, read('dev')):.1f} %")


if __name__ == "__main__":
    main()
