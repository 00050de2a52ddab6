"""Errors that a user can cause: one line that names the thing and what is allowed."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

FAILED = 1000  # Flower's error code of a client that raised or took no part, in its range for applications
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 2


class UserError(ValueError):
    """Something the user can mend. The command line prints the message alone and exits with code 2."""


class ClientError(UserError):
    """A client failed. The message names client, round and stage; ``trace`` is the client's own traceback."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def named(error: BaseException) -> str:
    """What went wrong: the user's error as it is, another one after its type."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def shown(value: object) -> str:
    """A value from outside as an error's line shows it: a short repr, without control characters."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to write out very long ones
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)


def one_line(text: str, most: int = 1000) -> str:
    """Text from outside as one printable line of ``most`` characters at most."""
    line = " ".join(text[: 2 * most].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:most])
    return line[:most] + ("..." if len(line) > most or len(text) > 2 * most else "")


def many_lines(text: str, most: int = 20_000) -> str:
    """The end of a text from outside, printable and with its line breaks; ``most`` characters at most."""
    return "\n".join(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        for line in text[-most:].split("\n")
    )[-most:]


def unknown(kind: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest known one and all that are allowed."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}{hint} (known: {', '.join(names) or 'none'})")
