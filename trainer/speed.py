"""How fast a run is, and how much of its time it waits for data; evaluation, pictures and saving are left out."""

import time

from trainer.data import Stream


class Speed:
    """A stopwatch over updates: `pause` at the end of each, `resume` before the next, `read` for the board."""

    def __init__(self, stream: Stream, images: int) -> None:
        self.stream, self.images = stream, images
        self.total = 0.0
        """Seconds of training in this start."""
        self._since = time.perf_counter()
        self._spent = 0.0
        self._waited = stream.waited

    def pause(self) -> None:
        """An update ends here."""
        now = time.perf_counter()
        self._spent += now - self._since
        self._since = now

    def resume(self) -> None:
        """What lay between `pause` and here was no training."""
        self._since = time.perf_counter()

    def read(self, images: int) -> dict[str, float]:
        """Images a second of this run over all ranks, and the share of time that this rank waited for data.

        After `means`, which waits for the device."""
        self.pause()
        spent, seen = self._spent, images - self.images
        waited = self.stream.waited - self._waited
        self.total += spent
        self.images, self._spent, self._waited = images, 0.0, self.stream.waited
        return {"throughput/images_per_s": seen / spent, "throughput/waiting": waited / spent}
