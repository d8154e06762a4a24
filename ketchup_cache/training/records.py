"""The JSON files of a run's folder that hold their own hash, and its pins."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ketchup_cache.console import one_line
from ketchup_cache.errors import ConfigError, MismatchError

SEAL = "sha256_of_this"


def read_pins(path: Path) -> list[str]:
    """The ids in a pins.json. Raises MismatchError where the file is none."""
    try:
        ids = list(json.loads(path.read_text(encoding="utf-8"))["segments"])
        if not ids or not all(re.fullmatch("[0-9a-f]{64}", id_) for id_ in ids):
            raise ValueError("holds no segment ids")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{path}: is no list of pins ({error}); take pins.json from the folder of a run") from None
    return ids


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sealed(record: dict[str, Any]) -> bytes:
    """As JSON, with the hash of its content."""
    return as_json({**record, SEAL: sha256(as_json(record))})


def unsealed(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that is missing, damaged or without its hash."""
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        if record.pop(SEAL, "") != sha256(as_json(record)):
            raise ValueError("it is not as it was written")
        return record
    except FileNotFoundError:
        raise ConfigError([f"{path.parent}: is no folder of a run, it has no {path.name}"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: can't be used ({one_line(error)}); choose another --out"]) from None
