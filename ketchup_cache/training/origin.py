"""Which model wrote the text that a student was pre-distilled on: MODEL/ketchup-cache-origin.json.

Learning from one teacher's scores after pre-distillation from another teacher's text starts where the scores are least
telling, so `learn` says when the two differ (teacher consistency).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ketchup_cache.console import printable
from ketchup_cache.errors import ModelError
from ketchup_cache.files import write_file
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.models.load import resolve_folder
from ketchup_cache.provenance import PolicyInfo
from ketchup_cache.version import TOOL

NAME = "ketchup-cache-origin.json"


@dataclass(frozen=True)
class Origin:
    policies: Sequence[PolicyInfo]

    @classmethod
    def of(cls, model: str) -> Origin | None:
        """What stands beside a model's weights; None where nothing does, or nothing that can be read."""
        try:
            record = json.loads((resolve_folder(model) / NAME).read_text(encoding="utf-8"))
            return cls([PolicyInfo.model_validate(policy) for policy in record["pretrained_on"]])
        except (ModelError, OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Raises WriteError."""
        record = {
            "tool": TOOL,
            "pretrained_on": [policy.model_dump(mode="json") for policy in self.policies],
        }
        write_file(folder / NAME, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())

    def differs_from(self, teacher: str) -> str | None:
        """What to warn of where no policy is this teacher, by name or, for a folder that is here, by weights.

        The precision that the teacher scores in does not matter.
        """
        if any(policy.name == teacher for policy in self.policies):
            return None
        if Path(teacher).is_dir() and self._holds_weights(Path(teacher)):
            return None
        names = ", ".join(f"{policy.name} ({policy.fingerprint[:12]})" for policy in self.policies)
        return printable(
            f"was pre-distilled on the outputs of {names}, but {teacher} scored: pre-distil it on outputs of "
            f"{teacher}, unless these are one model under two names"
        )

    def _holds_weights(self, folder: Path) -> bool:
        try:
            return weights_fingerprint(folder) in {policy.fingerprint for policy in self.policies}
        except ModelError:
            return False
