"""Shards on a test's own server, and a store of them."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import ShardsConfig
from trainer.data.config import RemoteConfig
from trainer.data.index import Shard
from trainer.data.store import OpenShard, Store, open_store


def content(number: int, size: int = 200_000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def shard_of(name: str, data: bytes) -> Shard:
    return Shard(name, 3, len(data), hashlib.sha256(data).hexdigest(), "")


def unknown(name: str) -> Shard:
    return Shard(name, 0, 0, "", "")


def read(found: OpenShard) -> bytes:
    return os.pread(found.fd, found.bytes + 1, 0)


SHARDS = [shard_of(f"{number}.tar", content(number)) for number in range(4)]


def opened(url: str, cache: Path, **options: Any) -> Store:
    settings: dict[str, Any] = {"cache": cache, "timeout": 0.4, "retries": 2} | options
    return open_store(ShardsConfig(path=url, size=8, remote=RemoteConfig(**settings)), url, "train")


def cached(cache: Path) -> list[str]:
    """Names of whole and of begun shards in the cache."""
    return sorted(path.name for path in cache.rglob("*.tar*"))
