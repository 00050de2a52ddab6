"""What may come back from a client: every check that does not depend on the method.

A reply is bytes of a stranger. Nothing of it is unpickled, allocated after its announcements, or averaged before it
has the form that was asked for; each hole is one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from flwr.app import Message
from torch import Tensor

from fedsparse.client import ONBOARD, ONBOARD_EPOCHS
from fedsparse.errors import ClientError, UserError, many_lines, one_line, shown
from fedsparse.packet import Packet, decode, flaw

LARGEST_WEIGHT = 2.0**53  # of a reply, in averages: sums in float64 stay finite
LARGEST_NUMBER = 1e300  # the same for what is summed or averaged otherwise
SCORING = {  # stages whose replies hold scores and nothing else: the scores that must come, those that may
    "evaluate": (("personal",), ("personal", "global")),
    ONBOARD: (tuple(map(str, ONBOARD_EPOCHS)),) * 2,
}
_COUNTS = ("samples", "flops", "forward_macs", "forward_macs_max", "memory")
_OTHERS = ("density_true", "density_nominal", "train_seconds", "local_seconds")


def read(where: str, message: Message) -> Packet:
    """The packet in a reply. Raises ClientError, whose line begins with ``where``, for a client's or a node's error
    and for what is no packet."""
    if message.has_error():
        said = str(message.error.reason or "an error without a reason")
        raise ClientError(f"{where}: {one_line(said.partition(chr(10))[0])}", many_lines(said))
    try:
        packet = decode(message.content, alone=True)
        bad = flaw(packet)  # of one that was lent, not decoded
    except UserError as error:
        raise ClientError(f"{where}: {one_line(str(error))}") from error
    if bad:
        raise ClientError(f"{where}: {bad}")
    if packet.kind == "error":
        said = str(packet.scalars.get("message", "an error without a message"))
        raise ClientError(f"{where}: {one_line(said)}", many_lines(str(packet.scalars.get("trace", ""))))
    return packet


def form(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, of the shape and type that :func:`misfit` asks for."""
    return torch.empty(shape, dtype=dtype, device="meta")


def misfit(reply: Packet, kind: str, like: Mapping[str, Tensor]) -> str:
    """How a reply differs in kind, names, shapes or types from what was asked for, or ""."""
    if reply.kind != kind:
        return f"a reply of kind {reply.kind!r}, where {kind!r} is wanted"
    for name in (*like, *reply.tensors):
        want, got = like.get(name), reply.tensors.get(name)
        if want is None or got is None:
            return f"tensor {shown(name)} is {'not wanted' if want is None else 'missing'}"
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            return (
                f"tensor {name!r} is {got.dtype} {tuple(got.shape)}, where {want.dtype} {tuple(want.shape)} is wanted"
            )
    return ""


def scalar_complaint(packet: Packet, stage: str) -> str:
    """What is wrong with the numbers that the round loop reads of a reply in this stage, or ""."""
    if bad := next((n for n, v in packet.scalars.items() if isinstance(v, float) and not math.isfinite(v)), ""):
        return f"scalar {shown(bad)} is not finite (NaN or infinite)"
    if stage in SCORING:
        bad = misfit(packet, "scores", {})
        return bad or _complaint_of_scores(packet.scalars, *SCORING[stage])
    said = packet.scalars
    if not is_number(said.get("weight"), 0, LARGEST_WEIGHT) or not said["weight"]:
        return f"the reply's scalar 'weight' must be a number above 0, at most 2^53, got {shown(said.get('weight'))}"
    if not is_number(said.get("loss", 0), -LARGEST_NUMBER, LARGEST_NUMBER):
        return f"the reply's scalar 'loss' must be a number, got {shown(said['loss'])}"
    for name in (*_COUNTS, *_OTHERS):
        if not is_number(said.get(name, 0), 0, LARGEST_NUMBER):
            return f"the reply's scalar {name!r} must be a number of at least 0, got {shown(said[name])}"
    return _complaint_of_scores(said, (), ("local",))


def is_number(value: object, least: float, most: float) -> TypeGuard[int | float]:
    """Whether a value from outside is a number (no word, no truth value) in [least, most]."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def is_count(value: object, least: float, most: float = LARGEST_WEIGHT) -> TypeGuard[int]:
    """The same of a whole number."""
    return isinstance(value, int) and is_number(value, least, most)


def _complaint_of_scores(said: Mapping[str, Any], must: Iterable[str], may: Iterable[str]) -> str:
    """What is wrong with the scores among a reply's scalars, or ""."""
    found = {name.rpartition(".")[0] for name in said if name.endswith(".n")}
    if odd := found - set(may):
        return f"a score {shown(min(odd))} is not wanted"
    if missing := [name for name in must if name not in found]:
        return f"the score {missing[0]!r} is missing"
    for name in found:
        n, correct, loss = (said.get(f"{name}.{part}") for part in ("n", "correct", "loss"))
        if not is_count(n, 0) or not is_count(correct, 0, n):
            return f"the score {name!r} must have examples and right ones among them, got {shown(n)}, {shown(correct)}"
        if not is_number(loss, -LARGEST_NUMBER, LARGEST_NUMBER):
            return f"the score {name!r} must have a loss, got {shown(loss)}"
    return ""


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The first tensor with a NaN or an infinite value, or ""."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    # a norm is not finite if any element is not; finite tensors whose norm overflows are looked at closely. PyTorch has
    # a fast way for the 2-norm alone.
    if floats and not all(math.isfinite(norm) for norm in torch._foreach_norm(list(floats.values()))):
        for name, tensor in floats.items():
            if not bool(torch.isfinite(tensor).all()):
                return f"tensor {shown(name)} is not finite (NaN or infinite)"
    return ""
