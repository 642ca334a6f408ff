"""Progress of long-running work: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

from tqdm import tqdm

Items = TypeVar("Items", bound=Sized)


def note(message: str) -> None:
    """Print one line to stderr immediately."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Count finished units of `total`; used as a context manager.

    It shows a bar on a terminal; elsewhere it prints a line every `every` seconds and at the end.
    """

    def __init__(
        self, label: str, total: int, unit: str, *, every: float = 5.0, stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.stream = stream or sys.stderr
        self.done = 0
        self.start = self.last = time.monotonic()
        self.bar = None
        if self.stream.isatty():
            self.bar = tqdm(total=total, desc=label, unit=f" {unit}", file=self.stream)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif exception[0] is None:
            self._line()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def update(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last >= self.every:
            self._line()

    def watch(self, blocks: Iterable[tuple[int, Items]]) -> Iterator[tuple[int, Items]]:
        """Yield the `(first, items)` blocks, counting the items of each after it was used."""
        for first, items in blocks:
            yield first, items
            self.update(len(items))

    def _line(self) -> None:
        self.last = time.monotonic()
        left = (self.total - self.done) / max(self.rate, 1e-9)
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, "
            f"{self.rate:.1f} {self.unit}/s, {left:.0f} s left",
            file=self.stream,
            flush=True,
        )
