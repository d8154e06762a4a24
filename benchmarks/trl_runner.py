"""One run of TRL's DistillationTrainer on a CPU. Started by trl_live.py with the Python of an environment that has TRL;
it needs nothing of ketchup-cache.

    PYTHON benchmarks/trl_runner.py --student DIR --teacher DIR --prompts FILE --out DIR --times FILE --steps N …

Writes the trained student to OUT/student and, as JSON, to TIMES: version, optimizer steps, seconds and CPU seconds of
`load` (models and trainer) and of `work` (`train()`).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "prompts", "out", "times"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("steps", "batch-size", "warmup", "max-new-tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "weight-decay", "beta"):
        parser.add_argument(f"--{name}", type=float, required=True)
    chosen = parser.parse_args()

    warnings.filterwarnings("ignore")
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DistillationConfig, DistillationTrainer

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    began = now()
    prompts = [json.loads(line)["prompt"] for line in chosen.prompts.read_text().splitlines()]
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(chosen.student),
        teacher_model=AutoModelForCausalLM.from_pretrained(chosen.teacher).eval(),
        # AutoTokenizer would give a Qwen2 model a tokenizer of Qwen2's kind, whatever tokenizer.json says
        processing_class=PreTrainedTokenizerFast.from_pretrained(chosen.student, padding_side="left"),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=DistillationConfig(
            output_dir=str(chosen.out / "trainer"),
            use_cpu=True,
            # TRL's defaults save memory on a GPU; on a CPU they would only slow it down
            bf16=False,
            gradient_checkpointing=False,
            max_steps=chosen.steps,
            per_device_train_batch_size=chosen.batch_size,
            shuffle_dataset=False,  # the prompts lie in the order in which they are wanted
            max_completion_length=chosen.max_new_tokens,
            beta=chosen.beta,
            learning_rate=chosen.lr,
            lr_scheduler_type="linear",
            warmup_steps=chosen.warmup,
            weight_decay=chosen.weight_decay,
            seed=chosen.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    loaded = now()
    trainer.train()
    done = now()
    trainer.save_model(str(chosen.out / "student"))
    parts = {
        part: dict(zip(("seconds", "cpu_seconds"), (b - a for a, b in zip(*moments, strict=True)), strict=True))
        for part, moments in {"load": (began, loaded), "work": (loaded, done)}.items()
    }
    steps = trainer.state.global_step
    chosen.times.write_text(json.dumps({"trl": trl.__version__, "steps": steps, **parts}))


if __name__ == "__main__":
    main()
