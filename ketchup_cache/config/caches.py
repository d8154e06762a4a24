"""Options of the commands that look at, check, move and tidy caches, and train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ketchup_cache.config.base import CacheAddress, Config, Positive


class InfoConfig(Config):
    """Options of `ketchup-cache info`."""

    cache: CacheAddress
    """Cache to describe."""


class VerifyConfig(Config):
    """Options of `ketchup-cache verify`."""

    cache: CacheAddress
    """Cache to check: every byte against its manifest."""
    deep: bool = False
    """Also decode every array and check every rule of the format."""


class CompactConfig(Config):
    """Options of `ketchup-cache compact`."""

    cache: Path
    """Cache to rewrite. It stays as it is."""
    into: Path
    """Cache that receives the segments; made if it is not there. Run again, it gets what has been added since."""
    storage: Literal["compact", "lossless"] = "compact"
    """compact: float16, a bit more than half the size. lossless: the same numbers, only in fewer segments."""
    segment_tokens: Positive = 4194304
    """Most completion tokens in a segment of merged scores."""


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


class DiffConfig(Config):
    """Options of `ketchup-cache diff`."""

    a: str
    """A cache: a path or an address."""
    b: str
    """Another cache."""


class LsConfig(Config):
    """Options of `ketchup-cache ls`."""

    cache: CacheAddress
    """Cache to list: a path or an address."""


class GcConfig(Config):
    """Options of `ketchup-cache gc`."""

    cache: CacheAddress
    """Cache to tidy: data without a manifest, and leftovers in tmp/ and watch/."""
    older_than: float = Field(default=24.0, ge=0, allow_inf_nan=False)
    """Hours. Younger garbage stays, since a writer may be at work on it."""
    dry_run: bool = False
    """Only say what would be deleted."""


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
