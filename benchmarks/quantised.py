"""What a quantised teacher's scores are worth: errors of log-probabilities and of K-step returns.

SmolLM2-135M-Instruct scores its own completions as it is and with `--quantize int8`. Errors are beside the full
weights, and beside the dequantised ones (the same rounded weights in a full model), which leaves what the computation
itself adds; and beside one row at a time. Then, what bitsandbytes does on a CPU to a row's log-probabilities when
another row stands beside it, and when the row goes on: both should be nothing.

    python -m benchmarks.quantised --folder ../ketchup-lora/SmolLM2     # a folder that benchmarks/lora.py has made
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import options, publish, table
from ketchup_cache.config.servers import ScoringOptions
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.load import _quantization, load_model, load_tokenizer
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.types import Ragged, Scores

KS = (1, 4, 16)
TEXTS = (
    "The river rises in the hills and",
    "A bridge is built when",
    "In the morning the market",
    "Bread needs flour,",
    "The first rule of the game is",
    "My brother told me that",
    "When the lights went out,",
    "A good teacher",
)


def dequantised(name: str, quantised: Any) -> Any:
    """The full model with the rounded weights."""
    model, layers = load_model(name, device="cpu"), dict(quantised.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and hasattr(weight := layers[path].weight, "qdata"):
            module.weight.data = weight.dequantize().detach()
    return model


@torch.no_grad()
def of_neighbours(name: str, way: str) -> dict[str, float]:
    """Largest change of a row's log-probabilities, in nats, beside another row and where it goes on."""
    how = {"quantization_config": _quantization(name, way, None), "device_map": {"": "cpu"}, "dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(name, **how).eval()
    row = torch.arange(5, 25)[None]
    alone, beside, short = (
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(1)
        for ids in (row, torch.cat([row, row + 500]), row[:, :10])
    )
    return {"beside": float((alone - beside).abs().max()), "longer": float((alone[:10] - short).abs().max())}


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def main() -> None:
    chosen = options(__doc__, folder=("../ketchup-lora/SmolLM2", "folder of the model"))
    name, samples, longest = str(chosen.folder), 2 if chosen.short else 4, 20 if chosen.short else 40
    tokenizer, (_, info) = load_tokenizer(name), Teacher.identify(name, ScoringOptions())
    prompts = Ragged.from_rows([tokenizer(text)["input_ids"] for text in TEXTS], np.int32)
    how, model = Sampling(max_new_tokens=longest, samples=samples), load_model(name, device="cpu")
    rollouts = sample_completions(model, info.vocab_size, prompts, how, first_prompt=0, batch=32)
    inside = rollouts.completions.with_values(np.ones(len(rollouts.completions.values), np.bool_)).padded()

    def score(teacher: Teacher, batch_tokens: int = 2048) -> tuple[Scores, float]:
        began = time.process_time()
        return teacher.score(prompts, rollouts, batch_tokens=batch_tokens), time.process_time() - began

    def values(scores: Scores) -> list[np.ndarray]:
        returns = rollout_returns(rollouts, scores, KS, normalization="logprob")
        return [scores.q - scores.logsumexp, *(each[inside] for each in returns)]

    full, seconds = score(Teacher.load(name, ScoringOptions(device="cpu")))
    teacher = Teacher.load(name, ScoringOptions(device="cpu", quantize="int8"))
    scores, took = score(teacher)
    others = {"the full weights": full, "the dequantised weights": score(Teacher(dequantised(name, teacher._model),
              teacher.info, info))[0], "one row at a time": score(teacher, batch_tokens=1)[0]}  # fmt: skip
    names = ["log p", *(f"K = {k}" for k in KS)]
    results: dict[str, Any] = {"spread": [float(each.std()) for each in values(full)]}
    for what, other in others.items():
        results[what] = [rms(mine - theirs) for mine, theirs in zip(values(scores), values(other), strict=True)]
    rows = [(what, *(f"{number:.2g}" for number in numbers)) for what, numbers in results.items()]
    print(table(("int8, error beside", *names), rows))
    for way in ("bnb-int8", "bnb-nf4"):
        results[way] = of_neighbours(name, way)
        print(f"{way}: {results[way]}")
    tokens = len(rollouts.completions.values)
    print(f"{tokens} tokens; processor time of int8 over that of float32: {took / seconds:.2f}")
    publish("quantised", chosen, tokens=tokens, names=names, time=took / seconds, **results)


if __name__ == "__main__":
    main()
