"""Whole samples as bytes, in Tandem's order: the first stage of a webdataset pipeline of a user's own.

    source = Samples(config, split="train", seed=0, rank=rank, world=world)
    batches = webdataset.DataPipeline(
        source, webdataset.decode("rgb8"), webdataset.to_tuple("jpg", "cls"), webdataset.batched(8)
    )

Training does not go this way: `Stream` decodes into its batches and is several times as fast.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from trainer.data import index as indices
from trainer.data import tar
from trainer.data.config import DataConfig
from trainer.data.mixture import order_of
from trainer.data.opened import Opened, OpenShards, prepare
from trainer.data.scan import REFUSED, kind_of
from trainer.data.table import key_hash

Sample = dict[str, Any]
AT_ONCE = 1024  # positions of all ranks that are looked up together


class Samples(IterableDataset[Sample]):
    """An iterable of dicts as webdataset's own reader makes them: `__key__`, `__url__` (the shard), and the bytes of
    each member under its field. Further `__index__` (number in the split), `__position__` (in the order) and
    `__label__` (number of the class, as `Stream` gives it; -1 for none).

    Members that the config ignores are left out, and so is whatever is of a kind that runs or unpacks what it holds
    (`scan.REFUSED`): webdataset's decoders would unpickle a .pyd.

    The rank's share is every `world`-th position from `start + rank` on. So when each rank has taken n samples, all
    have together taken positions start to start + n * world - 1, and `start + n * world` is where any number of ranks
    goes on. Workers of a DataLoader divide the share in the same way, each taking every `num_workers`-th of it: leave
    out webdataset's split_by_node and split_by_worker. Each iterator begins at `start` again.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: str,
        seed: int,
        start: int = 0,
        epochs: int | None = None,
        batch: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """start: position to begin with. epochs: ends before position epochs * length, where each sample was given so
        often; None: endless. batch: samples of a global batch, which `tail: drop` needs.

        ValueError as of `Stream`.
        """
        assert start >= 0
        assert 0 <= rank < world
        if config.tail == "drop" and batch is None:
            raise ValueError("data.tail: drop depends on the batch; give Samples its batch=, or take tail: carry")
        self.config, self.split, self.seed = config, split, seed
        self.start, self.epochs, self.batch = start, epochs, batch
        self.rank, self.world = rank, world
        self._load()

    def _load(self) -> None:
        self.index = indices.load(self.config, self.split)
        self.order = order_of(self.index, self.config, seed=self.seed, batch=self.batch or 1)
        self.length: int = self.order.length
        """Positions of an epoch."""
        ignored = [name for part in self.index.parts for name in part.contents.reading["ignore"]]
        self._ignored = frozenset(name.lower() for name in (*self.config.ignore, *ignored))

    def __getstate__(self) -> Mapping[str, Any]:
        """For workers that are not forked: each opens the set itself."""
        return {key: value for key, value in vars(self).items() if key not in ("index", "order")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._load()

    def __iter__(self) -> Iterator[Sample]:
        """ValueError, OSError: a shard that cannot be read or is not what its index says; they name it."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        stride, mine = self.world * workers, self.rank * workers + number
        step = max(1, AT_ONCE // stride) * stride
        stop = None if self.epochs is None else self.epochs * self.length
        opened = OpenShards(self.index)
        known = np.empty(0, np.int64)
        try:
            for first in itertools.count(self.start, step):
                if stop is not None and first >= stop:
                    return
                if not np.array_equal(shards := self.order.shards(first), known):
                    known = shards
                    prepare(self.index, np.concatenate([shards, self.order.following(first)]))
                count = step if stop is None else min(step, stop - first)
                samples = self.order.take(first, count)[mine::stride]
                places = self.index.shard_of(samples).tolist()
                for turn, (sample, shard) in enumerate(zip(samples.tolist(), places, strict=True)):
                    yield self._sample(opened(shard), shard, sample, first + mine + turn * stride)
        finally:
            opened.close()

    def _sample(self, opened: Opened, shard: int, sample: int, position: int) -> Sample:
        url = f"{self.index.store(shard).name}/{self.index.shards[shard].name}"
        row = opened.table[sample - opened.start]
        begin, end = int(row["begin"]), int(row["end"])
        data = os.pread(opened.fd, end - begin, begin)
        if len(data) < end - begin:
            raise ValueError(f"{url}: was cut short while it was read; {tar.AGAIN}")
        members = [member for member in tar.inside(data, url) if member.field]
        if not members or any(key_hash(member.key) != int(row["key"]) for member in members):
            raise ValueError(
                f"{url}: holds another sample at byte {begin} than its index says; "
                "copy both again, or renew the index with `tandem data index`"
            )
        found: Sample = {"__key__": members[0].key, "__url__": url}
        for member in members:
            if member.field in found:
                raise ValueError(
                    f"{url}: key {tar.shown(member.key)} has the field {tar.shown(member.field)} twice; "
                    "make the shard again with names of its own"
                )
            if kind_of(member.field) not in REFUSED and member.field not in self._ignored:
                found[member.field] = data[member.offset : member.offset + member.size]
        return found | {"__index__": sample, "__position__": position, "__label__": int(row["label"])}

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self.index.close()
