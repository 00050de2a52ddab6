"""FederatedClient: the base of every client half, and the Flower ClientApp around it."""

from __future__ import annotations

import json
import math
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsparse.errors import FAILED, UserError, many_lines, named, unknown
from fedsparse.masked import SquaredGradients
from fedsparse.packet import Packet, Scalar, decode, encode, flaw, run_words
from fedsparse.seeding import torch_rng, torch_seeded
from fedsparse.sgd import OPTIMIZERS, Fit, optimizer_copies, sgd
from fedsparse.sparse.masks import Mask
from fedsparse.task import Client, Score, Task

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.clientapp.typing import Mod

Memory = dict[str, Tensor]
Metrics = Mapping[str, Score]
ONBOARD = "onboard"  # the kind of packet that a novel client gets
ONBOARD_EPOCHS = (0, 1, 5, 10)  # of adaptation, after which a novel client is scored
_MEMORY = "memory"
_FLOWERS_DP = ("flwr.clientapp.mod.centraldp_mods", "flwr.clientapp.mod.localdp_mod")


@dataclass(frozen=True)
class FederatedClient(ABC):
    """A client half: a frozen dataclass of flat hyper-parameters. All state comes in and goes out."""

    @abstractmethod
    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        """Answer a packet. Returns the reply and the client's new memory (a flat dict of tensors).

        The reply's scalars: ``weight`` (its share in averages, usually the number of training examples); if known
        ``loss``, ``samples`` (seen in training), and what differs from the dense model: ``density_true`` and
        ``density_nominal`` (the largest over batches), ``flops`` (of this training), ``forward_macs`` (per sample, on
        average) and ``forward_macs_max`` (the largest over batches), ``memory`` (peak model bytes).
        ``packet`` is shared: clone before writing.
        """

    @abstractmethod
    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        """Scores on ``client.held_out``: ``personal`` (the model that this client would deploy now) and, where the
        packet holds one, ``global`` (the plain global model)."""

    def local(self, packet: Packet, reply: Packet) -> Packet:
        """The packet with which ``evaluate`` scores the model just trained, before aggregation.

        By default the reply itself, which fits every method that uploads a whole model.
        """
        return replace(reply, kind="evaluate")

    def received(self, task: Task, packet: Packet, memory: Memory, reply: Packet) -> Mapping[str, Tensor]:
        """What the model's values in a reply of kind "update" were when they came: of the reply's names and shapes.

        packet, memory: as ``train`` got them. A floating tensor of the reply that is not among them is no part of the
        model. By default those of the packet, which fits every method that uploads what it downloads.
        """
        return {name: packet.tensors[name] for name in reply.tensors if name in packet.tensors}

    def onboard(
        self,
        task: Task,
        client: Client,
        packet: Packet,
        memory: Memory,
        rng: torch.Generator,
        epochs: tuple[int, ...],
    ) -> dict[int, Score]:
        """How a client that took no part in training does on ``client.held_out`` after so many epochs of what it can do
        alone to fit the final state to its data, for each of the numbers in ``epochs``; nothing of it is kept.

        By default nothing can be done: the personal score of ``evaluate``, whatever the number.
        """
        score = _checked(self.evaluate(task, client, replace(packet, kind="evaluate"), memory))["personal"]
        return dict.fromkeys(epochs, score)


@dataclass(frozen=True)
class SgdClient(FederatedClient):
    """Abstract: a client half that trains a whole model with plain SGD, and its hyper-parameters.

    lr: learning rate. epochs: over the local training data. optimizer: "sgd" or "adam"; its state starts anew each
    round. momentum: of sgd.
    clip: largest global L2 norm of a gradient, 0 = none.
    """

    lr: float = 0.05
    epochs: int = 1
    batch_size: int = 32
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, epochs=self.epochs, batch_size=self.batch_size)
        check_not_negative(weight_decay=self.weight_decay, clip=self.clip)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "adam" and self.momentum:
            raise UserError(f"momentum is for optimizer 'sgd', adam has its own; got momentum {self.momentum}")

    @property
    def copies(self) -> int:
        """Tensors of optimiser state a weight."""
        return optimizer_copies({"optimizer": self.optimizer, "momentum": self.momentum})

    def fit(
        self,
        task: Task,
        client: Client,
        params: Mapping[str, Tensor],
        rng: torch.Generator,
        *,
        proximal: float = 0.0,
        mask: Mask | None = None,
        order: Iterable[Tensor] | None = None,
        moments: list[Tensor] | None = None,
        done: int = 0,
        squares: SquaredGradients | None = None,
    ) -> Fit:
        """Local training from ``params`` (compact under ``mask``) on the client's training data; :func:`sgd`."""
        return sgd(
            task,
            params,
            client.train,
            lr=self.lr,
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=rng,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip=self.clip,
            proximal=proximal,
            mask=mask,
            optimizer=self.optimizer,
            order=order,
            moments=moments,
            done=done,
            squares=squares,
        )

    def tuned(
        self,
        task: Task,
        client: Client,
        params: Mapping[str, Tensor],
        epochs: int,
        lr: float,
        mask: Mask | None = None,
    ) -> Mapping[str, Tensor]:
        """``params`` (compact under ``mask``) after ``epochs`` more on the client's training data, at ``lr`` (0 = the
        own rate) and with the same shuffle each time, by (seed, client, "finetune")."""
        if not epochs:
            return params
        how = replace(self, epochs=epochs, lr=lr or self.lr)
        return how.fit(task, client, params, torch_rng(task.seed, client.id, "finetune"), mask=mask).params


def update(client: Client, fit: Fit) -> Packet:
    """The upload of a whole model: values, not differences, and the facts every reply carries."""
    return Packet("update", fit.params, training_facts(client, fit))


def training_facts(client: Client, fit: Fit) -> dict[str, Scalar]:
    """The scalars of a reply after plain local training."""
    return {"weight": len(client.train), "samples": fit.samples, "loss": fit.loss}


def check_positive(**values: float) -> None:
    """Raise UserError for the first hyper-parameter that is not above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be above 0, got {value}")


def check_not_negative(**values: float) -> None:
    """Raise UserError for the first hyper-parameter below 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be at least 0, got {value}")


@dataclass(frozen=True)
class RunWords:
    """What rides along with a packet: which client half with which hyper-parameters, and where we are."""

    client: str
    hyper: Mapping[str, Any]
    seed: int
    round: int
    local: bool = False

    def dump(self) -> str:
        return json.dumps([self.client, dict(self.hyper), self.seed, self.round, self.local], separators=(",", ":"))


@lru_cache(maxsize=64)
def read_words(text: str) -> tuple[RunWords, FederatedClient]:
    """The words, and the client half that they name."""
    from fedsparse.method import load_client

    client, hyper, seed, server_round, local = json.loads(text)
    return RunWords(client, hyper, seed, server_round, local), load_client(client)(**hyper)


def error_packet(error: Exception) -> Packet:
    """What a client answers when it failed: what went wrong, and its traceback."""
    said = {"message": named(error), "trace": traceback.format_exc()}
    return Packet("error", scalars={key: many_lines(text) for key, text in said.items()})


def client_app(task: Task, clients: Callable[[int], Client], mods: Sequence[Mod] = ()) -> ClientApp:
    """A Flower ClientApp that serves every method. ``clients`` gives the data of a partition number.

    mods: Flower mods around training alone, the first outermost. Where Flower's clipping or noise mods are among them,
    a client refuses to send what they would not understand.
    """
    from flwr.clientapp import ClientApp

    app = ClientApp()
    alike = any(getattr(mod, "__module__", "") in _FLOWERS_DP for mod in mods)

    def answer(message: Message, context: Context, work: Callable[..., Packet]) -> Message:
        from flwr.app import Error, MessageType
        from flwr.app import Message as FlowerMessage

        from fedsparse.lent import LentRecords

        lend = getattr(context, "lend", False)  # our own engines
        try:
            client = clients(int(context.node_config["partition-id"]))
            reply = work(task, client, message.content, context)
            if bad := flaw(reply):
                raise UserError(f"the client half's reply: {bad}")
            content = LentRecords(reply) if lend else encode(reply)
        except Exception as error:  # any engine then tells the server who failed, and how
            if alike and message.metadata.message_type == MessageType.TRAIN:  # those mods take any packet for a model
                return FlowerMessage(Error(FAILED, many_lines(named(error))), reply_to=message)
            reply = error_packet(error)
            content = LentRecords(reply) if lend else encode(reply)
        return FlowerMessage(content, reply_to=message)

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, partial(_train, alike=alike))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, _evaluate)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(
            message, context, lambda *_: Packet("partition", scalars={"id": int(context.node_config["partition-id"])})
        )

    return app


def _train(task: Task, client: Client, records: Any, context: Context, *, alike: bool = False) -> Packet:
    start = time.perf_counter()
    packet = decode(records)
    words, half = read_words(run_words(records))
    memory = load_memory(context)
    held = dict(memory)
    rng = torch_rng(words.seed, words.round, client.id, "train")
    versions = _versions(packet)
    with torch_seeded(words.seed, words.round, client.id, "global"):
        reply, kept = half.train(task, client, packet, memory, rng)
    _check_untouched(packet, versions)
    if alike and _floats(reply) != _floats(packet):
        raise UserError(
            "Flower's clipping and noise mods need an upload of the download's form, which this method's is not; use"
            " fedsparse.privacy.sparse_dp_mod"
        )
    if kept.keys() != held.keys() or any(kept[name] is not held[name] for name in held):
        _save(context, kept)
    scalars: dict[str, Any] = {**reply.scalars, "train_seconds": time.perf_counter() - start}
    if words.local:
        with torch_seeded(words.seed, words.round, client.id, "local"):
            scores = _checked(half.evaluate(task, client, half.local(packet, reply), kept))
        scalars |= _score_scalars({"local": scores["personal"]})
        scalars["local_seconds"] = time.perf_counter() - start - scalars["train_seconds"]
    return replace(reply, scalars=scalars)


def _floats(packet: Packet) -> list[tuple[str, torch.Size]]:
    return [(name, t.shape) for name, t in packet.tensors.items() if t.is_floating_point()]


def _evaluate(task: Task, client: Client, records: Any, context: Context) -> Packet:
    packet = decode(records)
    words, half = read_words(run_words(records))
    versions = _versions(packet)
    with torch_seeded(words.seed, words.round, client.id, packet.kind):  # a method may train to be evaluated
        if packet.kind == ONBOARD:
            rng = torch_rng(words.seed, client.id, ONBOARD)
            scores = _named(half.onboard(task, client, packet, load_memory(context), rng, ONBOARD_EPOCHS))
        else:
            scores = _checked(half.evaluate(task, client, packet, load_memory(context)))
    _check_untouched(packet, versions)
    return Packet("scores", scalars=_score_scalars(scores))


def _named(scores: Mapping[int, Score]) -> Metrics:
    """Onboarding's scores under names, checked."""
    if sorted(scores) != sorted(ONBOARD_EPOCHS) or not all(isinstance(score, Score) for score in scores.values()):
        raise UserError(f"onboard must return a Score for each of {ONBOARD_EPOCHS} epochs, it returned {scores!r}")
    return {str(epochs): score for epochs, score in scores.items()}


def _versions(packet: Packet) -> list[int]:
    """How often each tensor was written to, as torch counts."""
    return [t._version for t in packet.tensors.values()]


def _check_untouched(packet: Packet, versions: list[int]) -> None:
    """A packet is shared by all clients of a round: writing into it would make results depend on their order."""
    if _versions(packet) != versions:
        raise UserError(f"the client half wrote into a tensor of the packet {packet.kind!r}; clone before writing")


def _checked(scores: Metrics) -> Metrics:
    if "personal" not in scores or not all(isinstance(score, Score) for score in scores.values()):
        raise UserError(f"evaluate must return a Score named 'personal', it returned {dict(scores)!r}")
    return scores


def _score_scalars(scores: Metrics) -> dict[str, int | float]:
    out: dict[str, int | float] = {}
    for name, score in scores.items():
        out |= {f"{name}.n": score.n, f"{name}.correct": score.correct, f"{name}.loss": score.loss}
    return out


def load_memory(context: Context) -> Memory:
    """A client's memory, from its Flower context."""
    return dict(decode(context.state).tensors) if "config" in context.state else {}


def _save(context: Context, memory: Memory) -> None:
    for name, record in encode(Packet(_MEMORY, memory)).items():
        context.state[name] = record
