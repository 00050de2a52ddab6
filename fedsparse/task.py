"""What both sides know before round 0: the model template, the loss, the devices and the clients' data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsparse.devices import CPU
from fedsparse.errors import UserError

Params = dict[str, Tensor]
Slot = tuple[dict[str, Tensor | None], str]
_SCORE_BATCH = 512  # examples a forward pass when scoring; fixed, since it may change bits


@dataclass(frozen=True)
class Split:
    """Examples of one client. ``x``: (n, *input_shape) float32 or (n, T) int64 tokens; ``y``: (n,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> Split:
        """The same examples on a device; itself where they are there."""
        return self if self.x.device == device else Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Budget:
    """What a device may spend; None = unlimited.

    density: true density in (0, 1]; forward_macs: multiply-adds per sample; train_flops: per round;
    memory, bytes_up, bytes_down: bytes; seconds: per round. Every round is checked against all but ``seconds``, which
    bind nothing: the seconds that are measured are those of this machine, not of the device.
    """

    density: float | None = None
    forward_macs: float | None = None
    train_flops: float | None = None
    memory: int | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"budget.density must be in (0, 1], got {self.density}")
        for name in ("forward_macs", "train_flops", "memory", "bytes_up", "bytes_down", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"budget.{name} must be above 0, got {value}")


@dataclass(frozen=True)
class Profile:
    """A device's speed (flop/s), bandwidths (bytes/s), memory (bytes) and availability in (0, 1]."""

    flops_per_second: float
    bytes_up_per_second: float
    bytes_down_per_second: float
    memory: int
    availability: float = 1.0


@dataclass(frozen=True)
class Device:
    """All that the server may know about a client. ``id`` is the partition number, the same on every engine.

    tier: the share by which tables group devices; by default the budget's density.
    """

    id: int
    budget: Budget = field(default_factory=Budget)
    profile: Profile | None = None
    tier: float | None = None

    def __post_init__(self) -> None:
        if self.tier is None:
            object.__setattr__(self, "tier", self.budget.density)


@dataclass(frozen=True)
class Client:
    """A device with its data. ``evaluate_on``: the split that evaluation sees, "test" or "validation"."""

    device: Device
    train: Split
    validation: Split
    test: Split
    evaluate_on: str = "test"

    @property
    def id(self) -> int:
        return self.device.id

    @property
    def held_out(self) -> Split:
        """The split that evaluation sees."""
        return self.validation if self.evaluate_on == "validation" else self.test


@dataclass(frozen=True)
class Score:
    """How a model did on ``n`` examples: how many were right and the mean loss."""

    n: int
    correct: int
    loss: float


class Task:
    """The model template, loss and metric. Holds no trained state: parameters always come in as an argument.

    model: any module that maps (n, *input_shape) to logits (n, classes); its tensors are the initial parameters.
    seed: of the run, for what a method draws before round 1. vocabulary: number of tokens, 0 for numeric input.
    reference: the dense model to which densities and costs are related, if ``model`` is a narrowed one.
    crossover: by the path of a layer, the density from which on it is computed masked dense; see
    :mod:`fedsparse.sparse.representation`.
    device: where models are trained and scored. The template, packets, states, memories and data stay in main memory.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        classes: int,
        seed: int,
        vocabulary: int = 0,
        reference: nn.Module | None = None,
        crossover: Mapping[str, float] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.model = model
        self.input_shape = input_shape
        self.classes = classes
        self.seed = seed
        self.vocabulary = vocabulary
        self.reference = reference if reference is not None else model
        self.crossover = dict(crossover or {})
        self.device = device
        _drop_batch_counters(model)
        self.trainable = tuple(name for name, _ in model.named_parameters())
        self.buffers = tuple(name for name, _ in model.named_buffers())
        self.shapes = {name: tuple(t.shape) for name, t in _named(model)}
        self._slots = _slots(model)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters that need no gradient: no run takes such a model, in which they would be trained and paid for."""
        return tuple(name for name, p in self.model.named_parameters() if not p.requires_grad)

    @property
    def tokens(self) -> bool:
        """Whether inputs are token numbers."""
        return self.vocabulary > 0

    def init_params(self) -> Params:
        """The initial parameters and buffers, in the model's order; a copy that the caller owns."""
        return {name: t.detach().clone() for name, t in _named(self.model)}

    def placed(self, tensors: Mapping[str, Tensor]) -> Params:
        """The tensors on the task's device; the same objects where they are there."""
        return {name: t.to(self.device) for name, t in tensors.items()}

    @contextmanager
    def bound(self, params: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The template with ``params`` in place of its own tensors, for the length of the block.

        The same as ``torch.func.functional_call`` for every call in the block, at no cost per call.
        Names that ``params`` lacks keep the template's tensor.
        """
        kept: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        for name, tensor in params.items():
            for table, key in self._slots[name]:
                kept.append((table, key, table[key]))
                table[key] = tensor
        try:
            yield self.model
        finally:
            for table, key, own in kept:
                table[key] = own

    def loss(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor, *, train: bool) -> Tensor:
        """Mean cross-entropy of a batch, a scalar. With ``train`` batch norm uses and updates its statistics.

        All tensors must be on the task's device.
        """
        self.model.train(train)
        with self.bound(params) as model:
            return self.criterion(model(x), y)

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy: logits (n, classes), y (n,)."""
        return functional.cross_entropy(logits, y)

    def score(self, params: Mapping[str, Tensor], data: Split) -> Score:
        """Accuracy and loss of ``params`` on ``data``, without gradients, in evaluation mode."""
        self.model.eval()
        with self.bound(self.placed(params)) as model:
            return score(model, data, self.device)


def score(predict: Callable[[Tensor], Tensor], data: Split, device: torch.device = CPU) -> Score:
    """Right answers and mean loss of a function from inputs to logits, both on ``device``, in batches of fixed size."""
    correct, loss = 0, 0.0
    with torch.no_grad():
        for i in range(0, len(data), _SCORE_BATCH):
            x, y = (t[i : i + _SCORE_BATCH].to(device) for t in (data.x, data.y))
            logits = predict(x)  # (n, classes)
            correct += int((logits.argmax(1) == y).sum())
            loss += float(functional.cross_entropy(logits, y, reduction="sum"))
    return Score(len(data), correct, loss / max(1, len(data)))


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _slots(model: nn.Module) -> dict[str, list[Slot]]:
    """Where modules keep each tensor, by its first name: their tables and the keys in them; several if it is tied."""
    names = {id(tensor): name for name, tensor in _named(model)}
    slots: dict[str, list[Slot]] = {name: [] for name in names.values()}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    slots[names[id(tensor)]].append((table, key))  # type: ignore[arg-type]
    return slots


def _drop_batch_counters(model: nn.Module) -> None:
    """Batch norm's integer batch counters are state without effect (fixed momentum); they would be averaged."""
    for name, module in model.named_modules():
        if "num_batches_tracked" not in module._buffers:
            continue
        if getattr(module, "momentum", 0) is None:
            raise UserError(f"layer {name!r} has momentum = None, a mean over all batches: set a number, such as 0.1")
        module._buffers["num_batches_tracked"] = None
