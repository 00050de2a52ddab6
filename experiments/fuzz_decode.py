"""Throw damaged bytes at the decoder: ``python experiments/fuzz_decode.py --cases 20000 --seed 0``.

Genuine packets are encoded, their records serialised as Flower does for the wire, and bytes changed: of the whole
message, or of one field (layout, floats, other tensors, words, keys) so that Flower still reads it. The decoder must
give a packet that encodes to itself again and is no larger than what came, or raise UserError; it may allocate twice
the bytes that came, and a fixed number for words. Anything else is printed with its case number; the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tracemalloc
from collections import Counter
from typing import Any

import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Wire

from fedsparse.errors import UserError
from fedsparse.packet import Packet, decode, encode, same, wire_bytes

WORDS = 4_000_000  # bytes that reading words may take beside twice the size of what came
TOKENS = (b"[", b"]", b'"', b",", b"-1", b"9" * 20, b"1e999", b"NaN", b"null", b"{}", b"float32", b"int64", b"bool",
          b"object", b"\\ud800", b"\x00", b"\xff" * 8, b"\x93NUMPY", b"<f4", b"|O", b"\x80\x04\x95")  # fmt: skip


def seeds() -> list[Packet]:
    """Packets of all types that methods send."""
    rng = torch.Generator().manual_seed(0)
    return [
        Packet("update", {"a": torch.randn(40, 30, generator=rng), "b": torch.randn(7, generator=rng)}, {"weight": 3}),
        Packet(
            "update",
            {
                "w": torch.randn(60, generator=rng),
                "mask/w": torch.arange(90, dtype=torch.uint8),
                "n": torch.arange(5),
                "i": torch.arange(3, dtype=torch.int32),
                "flag": torch.tensor([True, False, True]),
                "d": torch.randn(2, 3, generator=rng).double(),
                "half": torch.ones(3).half(),
                "none": torch.empty(0, 4),
            },
            {"weight": 5, "loss": 0.25, "word": "text", "flops": 1e9},
        ),
        Packet("scores", {}, {"personal.n": 8, "personal.correct": 3, "personal.loss": 1.5}),
        Packet("error", {}, {"message": "out of luck", "trace": "Traceback\n  line"}),
    ]


def mutated(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A few changes: flipped bits, tokens, cuts, repeats, pieces of another input."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(7)
        if how == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif how == 1:
            out[at:at] = rng.choice(TOKENS)
        elif how == 2:
            token = rng.choice(TOKENS)
            out[at : at + len(token)] = token
        elif how == 3:
            del out[at : at + rng.choice((1, 4, 100))]
        elif how == 4:
            out[at:at] = out[at : at + rng.choice((1, 8, 200))] * rng.choice((1, 3, 50))
        elif how == 5 and other:
            start = rng.randrange(len(other))
            out[at:at] = other[start : start + rng.choice((4, 64, 1000))]
        else:
            del out[at:]
    return bytes(out)


def of_message(packet: Packet, rng: random.Random, other: Packet) -> RecordDict | None:
    """Changes anywhere in the serialised message; None if Flower itself cannot read it any more."""
    data, more = (recorddict_to_proto(encode(p)).SerializeToString() for p in (packet, other))
    try:
        return recorddict_from_proto(Wire.FromString(mutated(data, rng, more)))
    except Exception:  # what Flower raises is not ours: the reply never reaches the decoder
        return None


def of_field(packet: Packet, rng: random.Random, other: Packet) -> RecordDict:
    """Changes in one or two fields of a message that stays readable."""
    records, more = encode(packet), encode(other)
    config: Any = records["config"]
    array: Any = records["arrays"]["flat"]
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(["floats", "layout", *config])
        if name == "floats":
            array.data = mutated(array.data, rng, b"")
        elif rng.random() < 0.1:  # a key
            config[mutated(name.encode(), rng, b"").decode(errors="replace")] = config.pop(name)
            return records
        else:
            value, rest = config[name], more["config"]
            raw = value if isinstance(value, bytes) else str(value).encode()
            new = mutated(raw, rng, str(rest["layout"]).encode())
            config[name] = new if isinstance(value, bytes) else new.decode(errors="replace")
    return records


def attack(records: RecordDict) -> str:
    """What becomes of the records: "accepted", "refused", or what is wrong."""
    came = wire_bytes_of(records)
    tracemalloc.start()
    try:
        packet = decode(records, alone=True)
    except UserError:
        packet = None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if peak > 2 * came + WORDS:
        return f"{peak} bytes were allocated for {came} that came"
    if packet is None:
        return "refused"
    if not same(decode(encode(packet)), packet) and not _has_nan(packet):
        return "an accepted packet is not itself when encoded again"
    if sum(t.nbytes for t in packet.tensors.values()) > came or wire_bytes(records) <= 0:
        return "an accepted packet is larger than what came"
    return "accepted"


def wire_bytes_of(records: RecordDict) -> int:
    return len(recorddict_to_proto(records).SerializeToString())


def _has_nan(packet: Packet) -> bool:
    values = [t for t in packet.tensors.values() if t.is_floating_point()]
    return any(bool(t.isnan().any()) for t in values) or any(v != v for v in packet.scalars.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    packets, counts, wrong = seeds(), Counter[str](), 0
    for case in range(args.cases):
        rng = random.Random(f"{args.seed}/{case}")
        packet, other = rng.choice(packets), rng.choice(packets)
        records = of_message(packet, rng, other) if case % 2 else of_field(packet, rng, other)
        outcome = "not readable by Flower" if records is None else attack(records)
        if outcome not in ("accepted", "refused", "not readable by Flower"):
            wrong += 1
            print(f"case {case}: {outcome[:200]}")
            outcome = "WRONG"
        counts[outcome] += 1
    print(f"{args.cases} cases, seed {args.seed}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
