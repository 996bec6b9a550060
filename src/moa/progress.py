"""What a long run says while it works: bars with the time left on stderr, or nothing."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")


class Progress:
    """Reports on long work.

    Parameters
    ----------
    quiet : bool
        Say nothing at all.
    """

    def __init__(self, quiet: bool = False):
        self._console = Console(stderr=True, quiet=quiet)

    def say(self, text: str) -> None:
        """Print one line of text (rich markup allowed)."""
        self._console.print(text, highlight=False)

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, showing a bar named ``what`` with the count and the time left.

        ``total`` is needed where ``items`` has no length.
        """
        started = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as bar:
            yield from bar.track(items, total=total, description=what)
        self.say(f"{what}: done in {time.perf_counter() - started:.1f} s")


SILENT = Progress(quiet=True)
