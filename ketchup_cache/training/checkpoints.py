"""OUT/checkpoints/step-N/: weights, AdamW's moments and the run's state after N optimizer steps, each with its hash."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from transformers import PreTrainedModel

from ketchup_cache.console import one_line
from ketchup_cache.errors import ConfigError, WriteError
from ketchup_cache.files import publishing
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.training.records import sealed, sha256, unsealed

TENSORS = ("model.safetensors", "optimizer.safetensors")


def save(
    out: Path, step: int, learner: Learner, state: Mapping[str, Any], written: Mapping[str, bytes], *, keep: int
) -> None:
    """Earlier checkpoints over the limit go once this one is on the disk.

    written: what the run has written up to the step besides, by the names of its files. keep: how many checkpoints
    stay. Raises WriteError.
    """
    target = out / "checkpoints" / f"step-{step:08d}"
    with saving(target) as partial:
        save_file(_weights(learner.model), partial / "model.safetensors")
        save_file(learner.optimizer.tensors(), partial / "optimizer.safetensors")
        hashes = {name: sha256((partial / name).read_bytes()) for name in TENSORS}
        record = {"step": step, "sha256": hashes | {name: sha256(content) for name, content in written.items()}}
        (partial / "state.json").write_bytes(sealed({**record, "state": state}))
    for other in sorted(target.parent.glob("step-????????"))[:-keep]:
        shutil.rmtree(other, ignore_errors=True)


def load_newest(out: Path, learner: Learner) -> dict[str, Any]:
    """Load the newest checkpoint into model and optimizer; returns its record: step, state, and the hashes. Step 0 and
    an empty state where there is none. Raises WriteError for a damaged one."""
    found = sorted((out / "checkpoints").glob("step-????????"))
    if not found:
        return {"step": 0, "state": {}}
    back = f"to go on from {found[-2].name}" if len(found) > 1 else f"and choose another --out than {out}"
    try:
        record = unsealed(found[-1] / "state.json")
        contents = {name: (found[-1] / name).read_bytes() for name in TENSORS}
        if wrong := [name for name, content in contents.items() if sha256(content) != record["sha256"][name]]:
            raise ValueError(f"{wrong[0]} is not as it was written")
        weights, moments = (load(contents[name]) for name in TENSORS)
        learner.optimizer.load_tensors(moments)
        with torch.no_grad():
            for name, tensor in _weights(learner.model).items():
                tensor.copy_(weights[name])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, ConfigError) as error:
        raise WriteError(f"{found[-1]}: damaged checkpoint ({one_line(error)}); delete it {back}") from error
    return record


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters in training by name, tied ones once, and buffers that are part of the model's state."""
    buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | buffers


@contextmanager
def saving(target: Path) -> Iterator[Path]:
    """`publishing` of files that safetensors and tokenizers write: their errors are no OSError, the latter's have no
    class of their own."""
    try:
        with publishing(target) as partial:
            yield partial
    except Exception as error:
        if type(error) not in (SafetensorError, Exception):
            raise
        what = f"{target}: can't be written ({one_line(error)}): free space or choose another place"
        raise WriteError(what) from error
