"""The commands that `recipes NAME` prints, run against a Hub on this machine with tiny models under the real names."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers.processors import ByteLevel

from ketchup_cache.cli import main
from ketchup_cache.config.catalogue import one_recipe
from ketchup_cache.shipped import recipe_names
from tests.helpers.hub import serving
from tests.helpers.models import make_decoder, make_t5, train_byte_level

LIMITS = {
    "pretrain": "--limit 12 --epochs 1",
    "rollout": "--limit 12 --max-new-tokens 6",
    "score": "",
    "learn": "--steps 2 --batch-size 4 --max-new-tokens 6",
    "evaluate": "--skip 2 --limit 4 --max-new-tokens 6",
}
"""What the printed commands get besides, so that a stand-in of 16 rows is enough."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Layouts of FLAN-T5, T5 and Qwen1.5, and columns and configurations of the data sets, as the Hub has them."""
    folder = tmp_path_factory.mktemp("hub")
    texts = [f"the {animal} number {n} eats {n + 1} fish" for animal in ("cat", "dog") for n in range(8)]
    t5, qwen = train_byte_level(texts, 300), train_byte_level(texts, 300)
    qwen.backend_tokenizer.post_processor = ByteLevel()  # it ends no prompt
    qwen.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    models = {
        "google/flan-t5-xl": (make_t5("1.1", vocab_size=308, seed=1), t5),
        "google-t5/t5-small": (make_t5(vocab_size=308, seed=2), t5),
        "google-t5/t5-base": (make_t5(vocab_size=308, seed=3), t5),
        "google-t5/t5-large": (make_t5(vocab_size=308, d_model=48, seed=4), t5),
        "Qwen/Qwen1.5-4B": (make_decoder("qwen2", vocab_size=308, max_position_embeddings=2048, seed=5), qwen),
        "Qwen/Qwen1.5-0.5B": (make_decoder("qwen2-tied", vocab_size=308, max_position_embeddings=2048, seed=6), qwen),
    }
    for name, parts in models.items():
        parts[0].generation_config.eos_token_id = [*range(1, 308, 3)]  # so that some of what they write ends
        for part in parts:
            part.save_pretrained(folder / "models" / name)
    answer = [f"{text}\n#### {n}" for n, text in enumerate(texts)]
    pairs = [{"en": text, "nl": text[::-1]} for text in texts]
    sets = {
        "EdinburghNLP/xsum": ("default", {"document": texts, "summary": texts, "id": texts}, ("train", "test")),
        "openai/gsm8k": ("main", {"question": texts, "answer": answer}, ("train", "test")),
        "Helsinki-NLP/europarl": ("en-nl", {"translation": pairs}, ("train",)),
    }
    for name, (configuration, columns, splits) in sets.items():
        root = folder / "datasets" / name
        (root / configuration).mkdir(parents=True)
        files = [{"split": s, "path": f"{configuration}/{s}-*"} for s in splits]
        about = {"configs": [{"config_name": configuration, "data_files": files}]}
        (root / "README.md").write_text(f"---\n{json.dumps(about)}\n---\n")
        for split in splits:
            path = root / configuration / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with serving(folder) as url:
        yield url


@pytest.fixture(scope="module")
def found(hub, tmp_path_factory):
    """Of each recipe, what `evaluate` prints; and the folder of all. One process runs them, for the address of the Hub
    is read when the libraries are imported."""
    folder = tmp_path_factory.mktemp("runs")
    away = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.test_recipes_run"],
        env=os.environ | away, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(recipe_names(), printed, strict=True)), folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", recipe_names())
def test_printed_commands_run_as_they_are(name, found):
    evaluated, folder = found
    assert evaluated[name]["examples"] == 4
    k = re.search(r"--model k(\d+)/best", one_recipe(name).commands[-1])[1]
    assert json.loads((folder / name / f"k{k}" / "report.json").read_text())["steps"] == 2


def run_all() -> None:
    """The commands of every recipe, in a folder of its name."""
    for name in recipe_names():
        os.makedirs(name)
        with chdir(name):
            for line in one_recipe(name).commands:
                words = shlex.split(line)[1:]
                words += [*LIMITS[words[0]].split(), *["--json"] * (words[0] == "evaluate")]
                if code := main(words):
                    sys.exit(f"{line}: {code}")


if __name__ == "__main__":
    run_all()
