"""The same in transformers' Trainer, for a decoder-only student.

python examples/own_trainer.py STUDENT CACHE OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ketchup_cache import Collator, ScoredRows


class KStepTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(input_ids=ids, attention_mask=mask, position_ids=places)
        before = output.logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]
        logprob = before.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
        ratio = (logprob.detach() - inputs["behavior_logprob"]).exp().clamp(max=2)
        loss = -(ratio * inputs["returns"] * logprob)[inputs["in_loss"]].mean()
        return (loss, output) if return_outputs else loss


student, cache, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student)
arguments = TrainingArguments(
    out, max_steps=20, per_device_train_batch_size=32, learning_rate=1e-4, remove_unused_columns=False, report_to=[],
    save_strategy="no", use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = KStepTrainer(
    AutoModelForCausalLM.from_pretrained(student),
    arguments,
    data_collator=Collator(k=4),
    train_dataset=ScoredRows(cache, seed=0),
)
print(f"mean loss: {trainer.train().training_loss:.4f}")
trainer.save_model(out)
tokenizer.save_pretrained(out)
