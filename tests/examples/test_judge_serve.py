"""The judge against a real OpenAI-compatible server with a tiny model of random weights: `transformers serve`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from examples.judge import JudgeConfig, judge
from tests.helpers.learning import json_lines
from tests.helpers.models import make_decoder_tokenizer, save_decoder

for module in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(module)


def test_transformers_serve_answers_and_is_asked_once(tmp_path):
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer = make_decoder_tokenizer(chat_template=template, pad_token="<pad>")
    model = str(save_decoder(tmp_path / "model", tokenizer=tokenizer, max_position_embeddings=1024))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        for name in ("x", "y"):
            (tmp_path / name).write_text(json.dumps({"prompt": "p", "output": name}) + "\n")
        asked = {"system": tmp_path / "x", "baseline": tmp_path / "y", "judge_model": model}
        options = {"answers": tmp_path / "answers", "judge_tokens": 4, "concurrency": 2}
        config = JudgeConfig(**asked, **options, base_url=f"http://127.0.0.1:{port}/v1")
        result = judge(config)
    finally:
        server.terminate()
        server.wait(30)
    assert (result.asked, result.cached) == (12, 0)
    assert all(line["answer"] for line in json_lines(tmp_path / "answers"))
    # random weights don't follow instructions: nothing can be read, and that is said
    assert [(a.win_rate, a.unreadable) for a in result.aspects] == [(None, 4)] * 3
    again = judge(config)  # the server is gone
    assert (again.asked, again.cached, again.aspects) == (0, 12, result.aspects)
