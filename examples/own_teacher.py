"""Rollouts and scores that another program made, into a cache: here by transformers alone, for a decoder-only pair.

python examples/own_teacher.py STUDENT TEACHER CACHE "first prompt" "second prompt" …
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ketchup_cache import add_rollouts, open_cache, score_with

student, teacher, cache, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student)
policy = AutoModelForCausalLM.from_pretrained(student).eval()
model = AutoModelForCausalLM.from_pretrained(teacher).eval()
completions, logprobs = [], []
torch.manual_seed(0)
for prompt in prompts:
    given = tokenizer(prompt, return_tensors="pt")
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": 16, "output_logits": True, "return_dict_in_generate": True}
    drawn = policy.generate(**given, **how)
    tokens = drawn.sequences[0, given["input_ids"].shape[1] :]
    logprob = torch.stack(drawn.logits, 1)[0].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    completions.append([tokens.tolist()])  # one completion of each prompt
    logprobs.append([logprob.tolist()])


@torch.no_grad()
def logits(prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    ids = torch.tensor(np.concatenate([prompt, completion]), dtype=torch.long)[None]
    return model(ids).logits[0, len(prompt) - 1 :].float().numpy()


cache = open_cache(cache, create=True)
add_rollouts(cache, prompts, completions, logprobs, tokenizer=student, policy=student)
score_with(cache, logits, teacher=teacher)
for row in cache.rows():
    print(f"{tokenizer.decode(row.completion_tokens)!r}: return {(row.q - row.max_q).sum():.2f}")
