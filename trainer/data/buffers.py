"""Memory of batches, used again: a fresh array of 12 MB costs more in page faults than 5 % of decoding into it."""

import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor


class Buffers:
    """`take` gives a tensor that nobody else sees. Its memory comes back when the last tensor or array over it is gone.

    Where a GPU is, torch's pinned allocator does the same, and waits for copies that are still on their way.
    """

    def __init__(self, *, kept: int, pinned: bool) -> None:
        """kept: free buffers that are held at most."""
        self._pinned = pinned
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=kept)  # appending to a full one drops the oldest
        self._lent: dict[int, weakref.ref[NDArray[np.uint8]]] = {}

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> Tensor:
        """Of any content; on the CPU."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        memory = self._memory(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        # numpy shortens chains of views to the array below them, but not past a memoryview: all views hold `lent`
        lent = np.frombuffer(memory.data, np.uint8)
        key = id(lent)

        def gone(_: object) -> None:
            del self._lent[key]
            self._free.append(memory)

        self._lent[key] = weakref.ref(lent, gone)
        return torch.from_numpy(lent.view(dtype).reshape(shape))

    def _memory(self, size: int) -> NDArray[np.uint8]:
        """A free one of this size. Of other sizes one is dropped each time: shapes change between uses, not within."""
        try:
            memory = self._free.pop()
        except IndexError:
            return np.empty(size, np.uint8)
        return memory if memory.nbytes == size else np.empty(size, np.uint8)
