"""Rows: what a round cost and gave, client by client; and the reports made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsparse.budget import Violation, check
from fedsparse.cost import forward_macs, memory_bytes, trace, train_flops, trainable_count
from fedsparse.errors import ClientError
from fedsparse.packet import Packet
from fedsparse.sgd import optimizer_copies
from fedsparse.task import Device, Score, Task

Row = dict[str, Any]
POINTS = ("local", "personal", "global")
_COSTS = ("density_true", "density_nominal", "bytes_up", "flops", "forward_macs", "forward_macs_max", "memory")


@dataclass(frozen=True)
class DenseCosts:
    """What the task's own model costs dense: a reply's figures where it says nothing else.

    share: of the reference model's trainable scalars. flops_per_sample: of training. macs: forward, per sample.
    memory: bytes, the peak of training.
    """

    share: float
    flops_per_sample: float
    macs: float
    memory: int

    @staticmethod
    def of(task: Task, config: Mapping[str, Any]) -> DenseCosts:
        """The costs under a client half's hyper-parameters."""
        layers = trace(task.model, task.input_shape, tokens=task.tokens)
        reference = trace(task.reference, task.input_shape, tokens=task.tokens)
        share = trainable_count(layers) / max(1, trainable_count(reference))
        batch, copies = int(config.get("batch_size", 32)), optimizer_copies(config)
        memory = memory_bytes(layers, batch, optimizer_copies=copies).total
        return DenseCosts(share, train_flops(layers, 1), forward_macs(layers), memory)


@dataclass(frozen=True)
class Onboarding:
    """What came of the novel clients: id -> epochs -> score. bytes: both ways; errors: of those that failed."""

    scores: Mapping[int, Mapping[int, Score]]
    clients: int
    bytes: int
    seconds: float
    errors: tuple[ClientError, ...] = ()


def new_row(server_round: int, stage: str, device: Device, bytes_down: int | None) -> Row:
    """A client's row before anything is known of it."""
    return {
        "round": server_round,
        "stage": stage,
        "client": device.id,
        "tier": device.tier,
        "bytes_down": bytes_down,
        "over_budget": 0,
        "failed": False,
        "n_train": None,
        **dict.fromkeys(POINTS),
        **dict.fromkeys(_COSTS),
        "seconds": 0.0,
        "loss": None,
        "_local_seconds": 0.0,
    }


def fill_row(row: Row, packet: Packet, size: int, dense: DenseCosts) -> None:
    """The costs of a client's round: what the client says, and the dense model's where it says nothing."""
    said = packet.scalars
    macs = said.get("forward_macs", dense.macs)
    row |= {
        "n_train": said["weight"],
        "bytes_up": size,
        "loss": said.get("loss"),
        "seconds": said.get("train_seconds", 0.0),
        "_local_seconds": said.get("local_seconds", 0.0),
        "density_true": said.get("density_true", dense.share),
        "density_nominal": said.get("density_nominal", 1.0 if dense.share == 1 else None),
        "flops": said.get("flops", dense.flops_per_sample * float(said.get("samples", 0))),
        "forward_macs": macs,
        "forward_macs_max": said.get("forward_macs_max", macs),
        "memory": said.get("memory", dense.memory),
    }
    row |= scores_of(packet)


def violations(device: Device, row: Row) -> list[Violation]:
    """What of a client's round broke its budget."""
    return check(
        device.budget,
        density_true=row["density_true"],
        forward_macs=row["forward_macs_max"],
        train_flops=row["flops"],
        memory=row["memory"],
        bytes_up=row["bytes_up"],
        bytes_down=row["bytes_down"],
    )


def scores_of(packet: Packet) -> dict[str, Score]:
    """The scores that a packet's scalars hold, by name."""
    said = packet.scalars
    names = [name[:-2] for name in said if name.endswith(".n")]
    return {n: Score(int(said[f"{n}.n"]), int(said[f"{n}.correct"]), float(said[f"{n}.loss"])) for n in names}


def mean_accuracy(rows: Iterable[Row], point: str) -> float | None:
    """The mean over clients; of ``global``, one model, that on the pooled test data. None where nobody has a score."""
    scores: list[Score] = [row[point] for row in rows if row[point] is not None]
    if not scores:
        return None
    if point == "global":
        return sum(s.correct for s in scores) / max(1, sum(s.n for s in scores))
    return sum(s.correct / max(1, s.n) for s in scores) / len(scores)


def totals(rows: Iterable[Row]) -> dict[str, Any]:
    """The sums of a round over the clients that were asked to train: a part of its line in ``rounds.jsonl``."""
    asked = list(rows)
    ok = [row for row in asked if not row["failed"]]
    losses = [row["loss"] for row in ok if row["loss"] is not None]
    return {
        "bytes": {"up": sum(row["bytes_up"] for row in ok), "down": sum(row["bytes_down"] for row in asked)},
        "flops": sum(row["flops"] for row in ok),
        "loss": sum(losses) / len(losses) if losses else None,
        "clients": len(ok),
    }
