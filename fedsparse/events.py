"""``events.jsonl``: what happens in a run, a JSON object a line, as it happens; and each kind of warning said once.

The file is a log and no result: it only grows, a run that goes on appends to it, no digest or checkpoint covers it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fedsparse.errors import UserError, named

EVENTS = "events.jsonl"
_PYTHON = "py.warnings"  # what the standard library calls the logger of Python's warnings
_NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")
_MOST_KINDS = 1000  # of warnings that are told apart
_LONGEST = 500  # characters of a text that are kept: a worker's line goes into a pipe whole
_NAMED = 5  # clients that an event names
_EVERY = 1.0  # seconds between two lines of a worker on one kind
_COUNTED = {"counted": True}  # marks log records that are no new warnings
_logger = logging.getLogger("fedsparse")
_watching: list[Events] = []


@dataclass
class _Kind:
    """Warnings of one logger whose texts differ in numbers alone. text: the first. number: of the kind in its process.

    In a worker: told, whether the driver has the text; due, when it may be told again.
    """

    logger: str
    text: str
    number: int
    count: int = 0
    told: bool = False
    due: float = 0.0


class Events:
    """The events of one run, and the warnings of its process and of the workers that are forked from it.

    As a context manager it watches Python's warnings and the logger ``fedsparse``: the first warning of a kind (the
    same logger, and the same text but for its numbers) goes its way, the others are counted. What happens before
    ``open`` is kept until then. An exception that leaves the block is the run's last event.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._start = time.perf_counter()
        self._fd = -1
        self._early: list[tuple[float, datetime, str, Mapping[str, Any]]] = []
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._words: dict[tuple[int, ...], list[str]] = {}  # logger and text of a worker's kinds, which it sends once
        self._told: dict[tuple[str, str], _Kind] = {}  # of a worker: what the driver does not know yet
        self._received = b""

    # --- events ------------------------------------------------------------------------------------------------------

    def open(self, path: Path, start: float) -> None:
        """From now on events go to the file. start: of the run, by ``time.perf_counter``; seconds count from there.

        Raises OSError if it cannot be written.
        """
        self._start = start
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.truncate(path, len(_whole_lines(path)))
        early, self._early = self._early, []
        for moment in early:
            self._append(*moment)

    def __call__(self, event: str, **fields: Any) -> None:
        """Something has happened. Raises OSError, with nothing written, if the disk is full."""
        self._gather()
        self._append(time.perf_counter(), datetime.now(UTC), event, fields)

    def round(self, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """The events of a round, of its line of ``rounds.jsonl`` and its clients' rows."""
        at = {"round": report["round"], "stage": report["stage"]}
        for error in report["errors"]:
            self("client_error", **at, error=_line(error))
        if over := [row["client"] for row in rows if row["over_budget"]]:
            self("over_budget", **at, clients=len(over), first=over[:_NAMED])
        self(
            "round",
            **at,
            clients=report["clients"],
            failures=report["failures"],
            loss=report["loss"],
            accuracy=(report["accuracy"] or {}).get("personal"),
            bytes=sum(value or 0 for value in report["bytes"].values()),
            wall=round(report["seconds"]["wall"], 6),
        )

    def finished(self, **fields: Any) -> None:
        """The run is complete."""
        try:
            self._sum_up()
            self("run_finished", **fields)
        except OSError as error:  # complete it is all the same
            _logger.warning("%s lacks its last event: %s", EVENTS, error.strerror, extra=_COUNTED)

    def _failed(self, error: BaseException) -> None:
        self._sum_up()  # before the last event
        if isinstance(error, KeyboardInterrupt):
            self("run_interrupted")
        else:
            self("run_failed", error=_line(named(error)))

    def _append(self, now: float, utc: datetime, event: str, fields: Mapping[str, Any]) -> None:
        if self._fd < 0:
            self._early.append((now, utc, event, fields))
            return
        stamp = utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"seconds": round(now - self._start, 3), "utc": stamp, "event": event, **fields}
        rest, size = (json.dumps(line) + "\n").encode(), os.fstat(self._fd).st_size
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, size)  # no half line that others follow
            raise

    # --- warnings ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Events:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        self._show = warnings.showwarning
        warnings.showwarning = self._warned
        warnings.simplefilter("always", append=True)  # what no filter is for: each is counted, not each place once
        self._pipe = os.pipe()  # from the workers
        for end in self._pipe:
            os.set_blocking(end, False)
        _logger.addFilter(self._passes)
        _watching.append(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # of a full disk, of which the error tells already
            if error is not None:
                self._failed(error)
            self._sum_up()
        _watching.remove(self)
        _logger.removeFilter(self._passes)
        self._caught.__exit__(None, None, None)
        for end in (*self._pipe, *([self._fd] if self._fd >= 0 else ())):
            os.close(end)
        self._fd = -1

    def _passes(self, record: logging.LogRecord) -> bool:
        """Whether a record of the logger is shown."""
        if record.levelno < logging.WARNING or hasattr(record, "counted"):
            return True
        return self._first(record.name, record.getMessage())

    def _warned(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """In place of ``warnings.showwarning``."""
        if self._first(_PYTHON, f"{category.__name__}: {message}"):
            self._show(message, category, filename, lineno, file, line)

    def _first(self, logger: str, text: str) -> bool:
        """Count a warning. Whether it is the first of its kind, and ours to show: the driver shows a worker's."""
        if os.getpid() == self._owner:
            return self._count(logger, text, 1)
        told = _kind(self._told, logger, text)
        told.count += 1
        self._tell(told)
        return False

    def _count(self, logger: str, text: str, number: int) -> bool:
        kind = _kind(self._kinds, logger, text)
        kind.count += number
        if kind.count > number:
            return False
        with suppress(OSError):  # a full disk stops the run at its next event
            self._append(
                time.perf_counter(), datetime.now(UTC), "warning", {"logger": logger, "text": _line(text, _LONGEST)}
            )
        return True

    def _sum_up(self) -> None:
        """How many there were of each kind that came more than once."""
        self._gather()
        for kind in list(self._kinds.values()):
            if kind.count > 1:
                _logger.warning("%d more like this: %s", kind.count - 1, kind.text, extra=_COUNTED)
                self("warnings", logger=kind.logger, text=kind.text, count=kind.count)
        self._kinds.clear()

    # --- of workers --------------------------------------------------------------------------------------------------

    def _tell(self, kind: _Kind) -> None:
        """In a worker: the first one of a kind at once, then the number of those of the last second."""
        if time.monotonic() < kind.due:
            return
        which, words = [os.getpid(), kind.number], [] if kind.told else [kind.logger, kind.text]
        line = json.dumps([which, kind.count, words], ensure_ascii=False) + "\n"
        with suppress(BlockingIOError):  # the pipe is full: later
            os.write(self._pipe[1], line.encode(errors="replace"))
            kind.count, kind.told, kind.due = 0, True, time.monotonic() + _EVERY

    def _tell_all(self) -> None:
        for kind in self._told.values():
            kind.due = 0.0
            if kind.count:
                self._tell(kind)

    def _gather(self) -> None:
        """In the driver: what the workers have told."""
        with suppress(BlockingIOError):  # all is read
            while True:
                self._received += os.read(self._pipe[0], 1 << 16)
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            which, count, words = json.loads(line)
            logger, text = self._words.setdefault(tuple(which), words)
            if self._count(logger, text, count):
                _logger.warning("%s", text, extra=_COUNTED)


def tell(event: str, **fields: Any) -> None:
    """Something has happened, in an engine, to the run that this process is at."""
    for events in _watching:
        events(event, **fields)


def leave() -> None:
    """A forked worker ends: the warnings that it has counted go to the driver."""
    for events in _watching:
        events._tell_all()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in a file; a last line that is not whole, of a run that was killed, is left out.

    Raises UserError for any other line that is no event.
    """
    events: list[dict[str, Any]] = []
    for number, line in enumerate(_whole_lines(path).splitlines(), 1):
        try:
            event = json.loads(line)
            if not isinstance(event.get("event"), str):
                raise ValueError("no event")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{str(path)!r}, line {number}, is no event: {error}") from error
        events.append(event)
    return events


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def _kind(kinds: dict[tuple[str, str], _Kind], logger: str, text: str) -> _Kind:
    """The kind of a warning; of very many kinds those that come last are one."""
    pattern = logger, _NUMBER.sub("#", text)
    if pattern not in kinds and len(kinds) >= _MOST_KINDS:
        pattern, text = ("", ""), "warnings of other kinds"
    return kinds.setdefault(pattern, _Kind(logger, _line(text, _LONGEST), len(kinds)))


def _line(text: str, longest: int = 4 * _LONGEST) -> str:
    """A text on one line, cut if it is very long."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
