"""Requests to batches: a stage of a webdataset pipeline. From memory where the set is small, else by threads from the
shards."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batch import RawBatch
from trainer.data.buffers import Buffers
from trainer.data.config import DataConfig
from trainer.data.fill import Fill, Filled
from trainer.data.index import Index
from trainer.data.memory import Memory
from trainer.data.modality import Modality
from trainer.data.quarantine import Quarantine
from trainer.data.source import Request
from trainer.errors import to_stderr

PATIENCE = 5.0  # seconds that closing waits for threads; one that waits for a network ends with its request
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this machine
LOOK = 0.5  # seconds between looks at whether the run is to end
SILENCE = 10.0  # seconds of waiting for a batch after which a line says for what
SPARE = 3  # buffers beside those that are read ahead: at the consumer, on its way there, just let go


class Interrupted(Exception):
    """The run is to end, and the next batch is not there."""


class Reader:
    """`reader(requests)` gives batches in the order of the requests. `replaced` counts bad samples in what was
    given."""

    def __init__(self, index: Index, config: DataConfig, modality: Modality) -> None:
        self.index, self.config, self.modality = index, config, modality
        self.quarantine = Quarantine(index, config.max_bad_fraction)
        self.replaced = 0
        row = int(np.prod(modality.shape)) * modality.dtype.itemsize
        self.cached = index.samples * row <= config.cache_mb << 20
        self._fill = Fill(index, modality, self.quarantine)
        self._memory: Memory | None = None
        self._kept = SPARE if self.cached else config.prefetch + SPARE
        self._buffers = Buffers(kept=self._kept, pinned=torch.cuda.is_available())

    def __call__(self, requests: Iterator[Request], stop: Callable[[], bool] = lambda: False) -> Iterator[RawBatch]:
        """stop: asked now and then while a batch is waited for; Interrupted where it says so."""
        return map(self.read, requests) if self.cached else self._ahead(requests, stop)

    def read(self, request: Request) -> RawBatch:
        """One batch, read here and now."""
        data = self._buffer(request)
        if not self.cached:
            return self._batch(request, data, *self._fill(request.sample, data.numpy()))
        if self._memory is None:
            self._memory = Memory(self.index, self.modality, self._fill, self.quarantine, readers=self.config.readers)
        return self._batch(request, data, *self._memory(request.sample, data.numpy()))

    def _ahead(self, requests: Iterator[Request], stop: Callable[[], bool]) -> Iterator[RawBatch]:
        """Each thread reads whole batches; `prefetch` of them are ready or in work."""
        threads = Threads(self.config.readers)
        waiting: deque[tuple[Request, Tensor, Future[Filled]]] = deque()
        try:
            for request in requests:
                waiting.append(self._start(request, threads))
                if len(waiting) > self.config.prefetch:
                    yield self._finish(*waiting.popleft(), stop)
            while waiting:
                yield self._finish(*waiting.popleft(), stop)
        finally:
            threads.close()
            self._fill.close()

    def _start(self, request: Request, threads: "Threads") -> tuple[Request, Tensor, "Future[Filled]"]:
        data = self._buffer(request)
        return request, data, threads.submit(lambda: self._fill(request.sample, data.numpy(), threads.stop))

    def _finish(self, request: Request, data: Tensor, work: "Future[Filled]", stop: Callable[[], bool]) -> RawBatch:
        began, told = time.monotonic(), False
        while not work.done() and not wait([work], timeout=LOOK).done:
            if stop():
                raise Interrupted
            if not told and time.monotonic() - began > SILENCE:
                to_stderr(f"tandem: waiting for data: {self._fill.waiting()}")
                told = True
        return self._batch(request, data, *work.result())

    def _buffer(self, request: Request) -> Tensor:
        shape = (len(request.sample), *self.modality.shape)
        held = self._kept * int(np.prod(shape, dtype=object)) * self.modality.dtype.itemsize
        if held > MEMORY:
            key, sides = "batch" if self.cached else "data.prefetch", " x ".join(map(str, shape))
            raise ValueError(
                f"{key}: {self._kept} batches of {sides} take {held / 1e9:,.3g} GB, this machine has "
                f"{MEMORY / 1e9:.3g}; lower it, or data.size"
            )
        return self._buffers.take(shape, self.modality.dtype)

    def _batch(self, request: Request, data: Tensor, real: NDArray[np.int64], label: NDArray[np.int64]) -> RawBatch:
        weight = torch.ones(len(real)) if request.weight is None else torch.from_numpy(request.weight)
        if self.quarantine.reasons:
            replaced = real != request.sample
            self.replaced += int(replaced.sum() if request.weight is None else (replaced & (request.weight > 0)).sum())
            if request.weight is not None:
                weight[torch.from_numpy(replaced)] = 0.0  # an evaluation counts no sample twice
        return RawBatch(
            data, torch.from_numpy(label), torch.from_numpy(request.position), torch.from_numpy(real), weight
        )


class Threads:
    """A few threads that take work in order. Closing never hangs: they are told to stop, and one that is stuck is left
    to the end of the process, which does not wait for it (ThreadPoolExecutor would make it wait)."""

    def __init__(self, count: int) -> None:
        self.stop = threading.Event()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"read-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], Filled]) -> "Future[Filled]":
        """Result or error come at the `result` of what this returns."""
        future: Future[Filled] = Future()

        def work() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  raised in whoever waits
                future.set_exception(error)

        self._work.put(work)
        return future

    def close(self) -> None:
        self.stop.set()
        for _ in self._threads:
            self._work.put(None)
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while (work := self._work.get()) is not None and not self.stop.is_set():
            work()
