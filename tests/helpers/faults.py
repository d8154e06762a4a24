"""A disk that is full at the n-th write of a whole command: every file that is opened to be written, every folder that
is made, every rename and link below a folder, whoever does it in Python. Libraries that write
without Python are stood in for, with the errors that they raise."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import transformers
from safetensors import SafetensorError

from ketchup_cache.models import lora
from ketchup_cache.training import checkpoints

NAMES = ("os.mkdir", "os.rename", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FULL = "No space left on device (os error 28)"


class FullDisk:
    """Counts the writes below `root` while it is set, and fails the one numbered `at`."""

    root, at, done = "", -1, 0

    def watch(self, root: Path | str, at: int = -1) -> None:
        self.root, self.at, self.done = str(root), at, 0

    def hook(self, event: str, args: tuple) -> None:
        there = event == "os.mkdir" and os.path.isdir(args[0])  # needs no space
        if self.root and not there and (event in NAMES or (event == "open" and args[2] & WRITES)):
            self.step(args[0], OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def step(self, path: object, error: Exception) -> None:
        if self.root and str(path).startswith(self.root):
            self.done += 1
            if self.done - 1 == self.at:
                raise error


DISK = FullDisk()
sys.addaudithook(DISK.hook)  # stays for good, and does nothing while no folder is watched


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """For what is written by Rust and C++."""

    def before(module: object, name: str, path_of: Callable[..., object], error: Exception) -> None:
        real = getattr(module, name)

        def write(*args, **kwargs):
            DISK.step(path_of(*args, **kwargs), error)
            return real(*args, **kwargs)

        patch.setattr(module, name, write)

    rust = SafetensorError(f"Error while serializing: I/O error: {FULL}")
    for module in (checkpoints, lora):
        before(module, "save_file", lambda tensors, path, *_: path, rust)
    before(transformers.modeling_utils, "safe_save_file", lambda tensors, path, **_: path, rust)
    fast = transformers.PreTrainedTokenizerFast
    before(fast, "_save_pretrained", lambda self, save_directory, *_, **__: save_directory, Exception(FULL))
    before(pyarrow.parquet, "ParquetWriter", lambda file, *_, **__: file, OSError(errno.ENOSPC, FULL))
