"""Live progress of a run on standard error: round, accuracy, bytes, time left.

One line of at most 80 characters that changes with each round; where standard error is no terminal, lines of one width.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from fedsparse.report.units import seconds, share, size

if TYPE_CHECKING:
    from rich.progress import Progress

_LINES = 10  # where standard error is no terminal: about so many lines a run


class LiveProgress:
    """Called with one line of ``rounds.jsonl`` after every round; ``close`` takes the bar down.

    The display, which starts a thread, begins with the first call: workers are forked before it.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._terminal = sys.stderr.isatty()  # asked once: while the bar is up, standard error is rich's own
        self._began = time.monotonic()
        self._first = 0.0  # when the first round ended
        self._bytes = 0
        self._accuracy: float | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one more round."""
        self._bytes += sum(value or 0 for value in row["bytes"].values())
        if row.get("accuracy"):
            self._accuracy = row["accuracy"].get("personal")
        text = f"accuracy {share(self._accuracy):>5}  sent {size(self._bytes):>7}  {seconds(self._left(row)):>8} left"
        done, total = row["round"], row["rounds"]
        if self._terminal:
            self._draw(done, total, text)
        elif done == total or done % max(1, round(total / _LINES)) == 0:
            sys.stderr.write(f"round {done:>{len(str(total))}}/{total}  {text}\n")

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, row: dict[str, Any]) -> float:
        """Seconds left, from the mean of the rounds so far; the first, with its warm-up, counts only at first."""
        now, done, total = time.monotonic(), int(row["round"]), int(row["rounds"])
        if done and not self._first:
            self._first = now
        mean = (now - self._first) / (done - 1) if done > 1 else now - self._began
        return mean * (total - done)

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = _new_bar(total)
        self._bar.update(self._bar.task_ids[0], completed=done, text=text)


def _new_bar(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    bar = Progress("round", MofNCompleteColumn(), BarColumn(14), TextColumn("{task.fields[text]}"), console=console)
    bar.add_task("", total=total, text="")
    bar.start()
    return bar
