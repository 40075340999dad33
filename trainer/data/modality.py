"""The seam between the stream and a kind of data. Order, reading, memory, stand-ins and batches know nothing else."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Row = NDArray[Any]
"""One sample in a batch: an array of the modality's shape and dtype that may be written."""


class Modality(Protocol):
    """What a kind of data is. Images are one (images.py); all its methods may be called by several threads at once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a row."""

    @property
    def plain_kinds(self) -> tuple[str, ...]:
        """Extensions that `plain` is asked about."""

    def decode(self, data: bytes, kind: str, row: Row) -> None:
        """Writes the sample into `row`. data: the member's bytes. kind: its extension, in lower case.

        Depends on the bytes alone. Undecodable: the sample is bad, and the row holds anything.
        """

    def plain(self, data: bytes, kind: str) -> int | None:
        """Where a member's bytes are a header and then the row as it lies in memory: the length of the header. All
        members of that size that begin with the same header are then copied without `decode`. Else None."""
