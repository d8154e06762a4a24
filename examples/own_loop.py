"""REINFORCE on a cache in a loop of one's own, with nothing of ours but the data: 30 lines.

python examples/own_loop.py STUDENT CACHE OUT
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ketchup_cache import Collator, ScoredRows

student, cache, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student)
model = AutoModelForSeq2SeqLM.from_pretrained(student)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
rows, collate = ScoredRows(cache, seed=0), Collator(k=4)

for epoch in range(2):
    for batch in DataLoader(rows, batch_size=32, collate_fn=collate):
        start = torch.full_like(batch["completion_ids"][:, :1], model.config.decoder_start_token_id)
        logits = model(
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"].long(),
            decoder_input_ids=torch.cat([start, batch["completion_ids"][:, :-1]], 1),
        ).logits
        logprob = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
        in_loss = batch["in_loss"]
        advantage = batch["returns"] - batch["returns"][in_loss].mean()
        ratio = (logprob.detach() - batch["behavior_logprob"]).exp().clamp(max=2)
        loss = -(ratio * advantage * logprob)[in_loss].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: mean return {batch['returns'][:, 0].mean():.2f} in the last batch")
model.save_pretrained(out)
tokenizer.save_pretrained(out)
