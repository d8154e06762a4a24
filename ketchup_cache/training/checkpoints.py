"""OUT/checkpoints/step-N/: weights, AdamW's moments and the run's state after N optimizer steps, each with its hash.

Of a model in parts each process writes its own, shard-*.safetensors, as torch.distributed.checkpoint does. Any number
of processes reads either kind.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from ketchup_cache.console import one_line
from ketchup_cache.errors import ConfigError, WriteError
from ketchup_cache.files import publishing
from ketchup_cache.parallel.group import group
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.training.records import sealed, sha256, unsealed

TENSORS = ("model.safetensors", "optimizer.safetensors")


def save(
    out: Path, step: int, learner: Learner, state: Mapping[str, Any], written: Mapping[str, bytes], *, keep: int
) -> None:
    """Earlier checkpoints over the limit go once this one is on the disk. Of several processes all call it.

    written: what the run has written up to the step besides, by the names of its files. keep: how many checkpoints
    stay. Raises WriteError.
    """
    target = out / "checkpoints" / f"step-{step:08d}"
    with ExitStack() as stack:
        partial = group().from_first(lambda: stack.enter_context(saving(target)))
        mine: list[Path] = []
        if learner.parts:
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            try:
                state_dict_saver.save(_weights(learner) | learner.optimizer.tensors(), storage_writer=writer)
            except CheckpointException as error:  # in all processes, what went wrong in some
                why = one_line(next(iter(error.failures.values()))[0])
                raise WriteError(f"{target}: can't be written ({why}): free space or choose another place") from error
            mine = list(partial.glob(f"shard-{group().rank + 1:05d}-*"))
        elif group().first:
            mine = [partial / name for name in TENSORS]
            for file, tensors in zip(mine, (_weights(learner), learner.optimizer.tensors()), strict=True):
                save_file(tensors, file)
        # of its own: a disk that machines share may not yet show one what another wrote
        found = group().gathered([(file.name, _hash(file)) for file in mine])
        if group().first:
            hashes = dict(itertools.chain(*found))
            record = {"step": step, "sha256": hashes | {name: sha256(content) for name, content in written.items()}}
            (partial / "state.json").write_bytes(sealed({**record, "state": state}))
    for other in sorted(target.parent.glob("step-????????"))[:-keep] if group().first else ():
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
        files = [name for name in record["sha256"] if name.endswith(".safetensors")]
        wrong = [name for name in group().mine(files) if _hash(found[-1] / name) != record["sha256"][name]]
        for name in itertools.chain(*group().gathered(wrong)):
            raise ValueError(f"{name} is not as it was written")
        reader = HuggingFaceStorageReader(str(found[-1]))
        names = reader.read_metadata().state_dict_metadata
        moments = learner.optimizer.empty_tensors(name for name in names if "/" in name)
        with warnings.catch_warnings(action="ignore"):  # of a single process: that it is one
            state_dict_loader.load(_weights(learner) | moments, storage_reader=reader, no_dist=True)
        learner.optimizer.load_tensors(moments)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, ConfigError, CheckpointException) as error:
        raise WriteError(f"{found[-1]}: damaged checkpoint ({one_line(error)}); delete it {back}") from error
    return record


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Parameters in training by name, tied ones once, and buffers that are part of the model's state."""
    model = learner.model
    buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    return {name: p.detach() for name, p in learner.optimizer.named.items()} | buffers


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
