"""Errors that a user can cause: one line that names the thing and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The command line prints the message alone and exits with code 2."""


class ClientError(UserError):
    """A client failed. The message names client, round and stage; ``trace`` is the client's own traceback."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def unknown(kind: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest known one and all that are allowed."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}{hint} (known: {', '.join(names) or 'none'})")
