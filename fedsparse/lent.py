"""Records that are not encoded until somebody looks: within one machine a packet is lent as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flwr.app import RecordDict

from fedsparse.packet import Packet, encode


class LentRecords(RecordDict):
    """A RecordDict that holds a packet, and becomes the packet's three records when read or written as a mapping.

    ``decode`` and ``wire_bytes`` take the packet itself, so between a strategy and clients on one machine nothing is
    encoded or copied; Flower mods and stock code see ordinary records.
    """

    packet: Packet | None
    run_words: str

    def __init__(self, packet: Packet, run_words: str = "") -> None:
        super().__init__()
        self.__dict__["packet"] = packet
        self.__dict__["run_words"] = run_words

    def _open(self) -> None:
        """Encode; from now on these are ordinary records."""
        packet = self.__dict__["packet"]
        if packet is not None:
            self.__dict__["packet"] = None
            self.__dict__["_data"].update(encode(packet, run=self.__dict__.pop("run_words")).items())

    def __getitem__(self, key: str) -> Any:
        self._open()
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._open()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._open()
        super().__delitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._open()
        return super().__iter__()

    def __len__(self) -> int:
        self._open()
        return super().__len__()

    def __contains__(self, key: object) -> bool:
        self._open()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        self._open()
        return super().__eq__(other)

    def keys(self) -> Any:
        self._open()
        return super().keys()

    def values(self) -> Any:
        self._open()
        return super().values()

    def items(self) -> Any:
        self._open()
        return super().items()

    def copy(self) -> Any:
        self._open()
        return RecordDict(dict(self.__dict__["_data"]))
