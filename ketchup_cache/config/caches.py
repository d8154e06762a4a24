"""Options of the commands that look at, check, move and tidy caches, and train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ketchup_cache.config.base import CacheAddress, Config


class InfoConfig(Config):
    """Options of `ketchup-cache info`."""

    cache: CacheAddress
    """Cache to describe: a path or an address."""
    other: CacheAddress | None = None
    """Another cache: say what each of the two has that the other lacks."""


class VerifyConfig(Config):
    """Options of `ketchup-cache verify`."""

    cache: CacheAddress
    """Cache to check: every byte against its manifest."""
    deep: bool = False
    """Also decode every array and check every rule of the format."""
    clean: bool = False
    """Delete what interrupted commits have left: entries of tmp/, and data without a manifest."""
    older_than: float = Field(default=24.0, ge=0, allow_inf_nan=False)
    """With --clean: hours. Younger leftovers stay, since a writer may be at work on them."""
    dry_run: bool = False
    """With --clean: only say what would be deleted."""


class PushConfig(Config):
    """Options of `ketchup-cache push`."""

    cache: CacheAddress
    """Cache whose segments are copied: a path or an address."""
    url: str
    """Where to: a path, s3://bucket/name, gs://…, or hf://datasets/owner/name. Made if it is not there."""
    license: str | None = None
    """License id for the card of a Hub data set; by default it stays as it is."""
    dry_run: bool = False
    """Only say what would be copied."""


class PullConfig(Config):
    """Options of `ketchup-cache pull`."""

    url: str
    """Where from: a path, s3://bucket/name, gs://…, https://…, or hf://datasets/owner/name."""
    cache: CacheAddress
    """Cache that receives the segments, a path or an address; made if it is not there."""
    dry_run: bool = False
    """Only say what would be copied."""


class MergeConfig(Config):
    """Options of `ketchup-cache merge`."""

    a: str
    """A cache: a path or an address."""
    b: str
    """Another cache."""
    into: str
    """Cache that receives what it lacks of both; made if it is not there. It may be one of the two."""
    dry_run: bool = False
    """Only say what would be copied."""


class ExportConfig(Config):
    """Options of `ketchup-cache export`."""

    cache: CacheAddress
    """Cache to export: a path or an address."""
    out: Path
    """New folder for the files."""
    to: Literal["parquet", "hf-dataset"]
    """parquet files, or hf-dataset: a folder for `datasets.load_from_disk`."""
    scored_by: str | None = None
    """Which teacher's scores to take where the cache holds several (name, or start of its fingerprint)."""
    policy: str | None = None
    """Only rollouts of this policy (name, or start of its fingerprint)."""
    keep_top: int = Field(default=0, ge=0)
    """Also the teacher's so many largest logits; only rollouts whose scores keep them. 0: none."""
    unscored: bool = False
    """Also rollouts without scores; what would come from the teacher is null."""
