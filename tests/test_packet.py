"""Packets survive encoding exactly, and their size is what Flower sends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.errors import UserError
from fedsparse.packet import Packet, decode, encode, run_words, same, wire_bytes

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.uint8, torch.int64, torch.bool, torch.float64])


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    tensors = {}
    for i in range(draw(st.integers(0, 4))):
        shape, dtype = draw(SHAPES), draw(DTYPES)
        tensors[f"t{i}.weight"] = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(i)).to(dtype)
    words = st.text(max_size=8)
    numbers = st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False), words)
    return Packet(draw(words), tensors, draw(st.dictionaries(words, numbers, max_size=4)))


def flower_bytes(records) -> int:
    return sum(len(o.deflate()) for o in get_all_nested_objects(records).values())


@settings(max_examples=150)
@given(packets())
def test_packets_survive_and_know_their_size(packet: Packet) -> None:
    records = encode(packet)
    assert same(decode(records), packet)
    assert packet.nbytes == wire_bytes(records) == flower_bytes(records)


def test_size_of_a_payload_of_several_chunks() -> None:
    rng = torch.Generator().manual_seed(0)
    packet = Packet("train", {"w": torch.randn(3_000_000, generator=rng)}, {"n": 7})
    assert packet.nbytes == flower_bytes(encode(packet))


def test_decoding_copies_nothing() -> None:
    packet = Packet(
        "update", {"a": torch.randn(3, 4), "i": torch.arange(5), "b": torch.randn(2)}, {"weight": 3, "s": "x"}
    )
    records = encode(packet, run="words")
    payload = bytearray(records.array_records["arrays"]["flat"].data)
    records["arrays"]["flat"].data = memoryview(payload)
    assert run_words(records) == "words"
    assert wire_bytes(records) == flower_bytes(encode(packet, run="words"))
    decoded = decode(records)
    assert same(decoded, packet)
    payload[128:132] = np.float32(42).tobytes()
    assert decoded.tensors["a"][0, 0] == 42


def test_any_flower_code_reads_the_array() -> None:
    packet = Packet("train", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)})
    array = encode(packet).array_records["arrays"]["flat"].numpy()
    np.testing.assert_array_equal(array, [0, 1, 2, 3, 4, 5, 1])


def test_stock_records_have_a_size_too() -> None:
    from flwr.app import ArrayRecord, RecordDict

    records = RecordDict({"model": ArrayRecord([np.zeros(3), np.ones((2, 2))])})
    assert wire_bytes(records) == flower_bytes(records)


@pytest.mark.parametrize("damage", ["short", "layout", "missing", "raw"])
def test_damaged_packets_are_refused(damage: str) -> None:
    records = encode(Packet("update", {"a": torch.ones(4), "i": torch.arange(3)}))
    array, config = records.array_records["arrays"]["flat"], records.config_records["config"]
    if damage == "short":
        array.data = array.data[:-4]
    elif damage == "layout":
        config["layout"] = '[["a","float32",[1000000]]]'
    elif damage == "missing":
        del config["kind"]
    else:
        config["t.i"] = b"123"
    with pytest.raises(UserError):
        decode(records)


def test_a_dtype_that_no_packet_carries() -> None:
    with pytest.raises(UserError, match="complex64"):
        encode(Packet("train", {"a": torch.zeros(2, dtype=torch.complex64)}))


def test_lent_records_become_ordinary_ones_when_looked_at() -> None:
    from fedsparse.lent import LentRecords

    packet = Packet("update", {"a": torch.randn(3), "i": torch.arange(2)}, {"weight": 3, "s": "x"})
    lent = LentRecords(packet, "words")
    assert decode(lent) is packet and run_words(lent) == "words"
    size = wire_bytes(lent)
    ordinary = encode(packet, run="words")
    assert lent == ordinary and size == wire_bytes(lent) == flower_bytes(ordinary)
    assert same(decode(lent), packet) and run_words(lent) == "words"
