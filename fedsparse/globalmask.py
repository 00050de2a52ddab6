"""One element mask for all clients: what methods with a global mask share, on the server and on the clients.

Both sides hold *compact* parameters (:mod:`fedsparse.sparse.masks`). Packets carry their values alone as long as the
client holds the mask's version; else the mask goes along, as packed positions. Clients keep the mask in their memory;
the server's state says which version each of them holds, so that any participation is right. A layer of which all
weights are kept is in no mask: it is a plain dense layer.

Norm layers may stay with the clients (``local_norms``; FedBN, Li et al., ICLR 2021, arXiv 2102.07623): a client gets
the initial ones with its first packet, and keeps its own in its memory from then on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fedsparse import cost
from fedsparse.aggregation import Aggregation
from fedsparse.budget import check, exceeded
from fedsparse.client import Memory, Metrics, SgdClient, check_not_negative, training_facts
from fedsparse.errors import UserError, unknown
from fedsparse.masked import score_masked
from fedsparse.models.norms import norm_names
from fedsparse.packet import Packet, Scalar
from fedsparse.seeding import sample_cohort, torch_rng
from fedsparse.sgd import Fit
from fedsparse.sparse.masks import Mask, carry
from fedsparse.sparse.positions import pack_positions, packed_bytes, unpack_positions
from fedsparse.sparse.pruning import (
    DENSITY_KINDS,
    LAYER_DENSITIES,
    Counts,
    Groups,
    at_random,
    largest,
    layer_counts,
    weight_budget,
)
from fedsparse.strategy import AggregatingStrategy, Plan, Reply, State, aggregated, form, misfit
from fedsparse.task import Client, Device, Params, Score, Task

_MASK = "mask/"  # before the names of masked weights, in packets and memories
_OWN = "own/"  # before the names of what stays with a client, in its memory
_VERSION = "version"
PART = "part"  # scalar of a packet that may hold a part of the global model
_LOCAL = "local"  # kind of a packet that holds the client's own model


# --- what may be pruned ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prunable:
    """A task's model as pruning sees it.

    layers: all, as the cost model sees them. weights: name of each weight that may be pruned -> its layer, from input
    to output. dense: trainable scalars that are never pruned. total: trainable scalars of the dense reference model.
    """

    layers: tuple[cost.Layer, ...]
    weights: Mapping[str, cost.Layer]
    dense: int
    total: int

    @property
    def sizes(self) -> dict[str, int]:
        """Weights of each layer that may be pruned."""
        return {name: layer.weights for name, layer in self.weights.items()}

    def cut(self, mask: Mask) -> cost.Cut:
        """The mask as the cost model takes it."""
        return {self.weights[n].name: (len(kept) / self.weights[n].weights, 1.0) for n, kept in mask.items()}


@lru_cache(maxsize=8)
def prunable(task: Task) -> Prunable:
    """What may be pruned: convolutions and linear layers but the first convolution and the last linear layer."""
    layers = cost.trace(task.model, task.input_shape, tokens=task.tokens)
    exempt = cost.exempt_layers(layers)
    weights = {x.weight_name: x for x in layers if x.kind in ("conv", "linear") and x.weights and x.name not in exempt}
    pruned = sum(layer.weights for layer in weights.values())
    dense = cost.trainable_count(layers) - pruned
    reference = cost.trace(task.reference, task.input_shape, tokens=task.tokens)
    return Prunable(layers, weights, dense, cost.trainable_count(reference))


def check_densities(density: float, kind: str, family: str, families: Sequence[str] = LAYER_DENSITIES) -> None:
    """Raise UserError for a density outside (0, 1] that is not 0 either, and for names that are not known."""
    if not 0 <= density <= 1:
        raise UserError(f"density must be in (0, 1], or 0 for what the budgets allow, got {density}")
    if kind not in DENSITY_KINDS:
        raise unknown("density_kind", kind, DENSITY_KINDS)
    if family not in families:
        raise unknown("layer_densities", family, families)


def kept_counts(task: Task, density: float, kind: str, family: str) -> Counts:
    """Kept weights of each layer that may be pruned, at a "nominal" or "true" density shared out by a family.

    Raises UserError for a density that is not possible, and for a model without such layers (but at density 1).
    """
    budget, names = _budget(task, density, kind), prunable(task).weights
    return layer_counts({name: task.shapes[name] for name in names}, family, budget) if names else {}


def ranked_groups(task: Task, density: float, kind: str, family: str) -> Groups:
    """Which layers are ranked together, and what they keep together: all of them for the family "global", else each
    alone with its :func:`kept_counts`. Raises UserError for the same."""
    if family != "global":
        return {(name,): k for name, k in kept_counts(task, density, kind, family).items()}
    names = tuple(prunable(task).weights)
    budget = _budget(task, density, kind)
    return {names: budget} if names else {}


def _budget(task: Task, density: float, kind: str) -> int:
    model = prunable(task)
    budget = weight_budget(density, model.sizes, kind=kind, dense=model.dense, total=model.total)
    if not model.weights and density < 1:
        raise UserError("the model has nothing to prune: its first convolution and last linear layer stay dense")
    return budget


def most_weights(task: Task, density: float, kind: str) -> int:
    """How many of the weights that may be pruned a model of that density keeps at most; refuses what is not possible,
    as :func:`kept_counts`."""
    return sum(kept_counts(task, density, kind, "uniform").values())


def first_mask(task: Task, params: Params, counts: Mapping[str, int], criterion: str) -> dict[str, Tensor]:
    """A mask of so many weights of each layer: "magnitude", the largest of whole ``params``, or "random", by seed."""
    if criterion == "magnitude":
        return {name: largest(params[name], k) for name, k in counts.items()}
    rng = torch_rng(task.seed, "mask")
    return {name: at_random(params[name].numel(), k, rng) for name, k in counts.items()}


def strongest(task: Task, params: Mapping[str, Tensor], mask: Mask, counts: Mapping[str, int]) -> tuple[Params, Mask]:
    """The compact model that keeps of each layer the ``counts`` weights of largest magnitude (ties: lowest position).

    Of a model that holds the union of several such, it gives each of them exactly: they are nested in each layer.
    """
    sizes = prunable(task).sizes
    values, kept = dict(params), dict(mask)
    for name, k in counts.items():
        if k < sizes[name]:
            at = largest(params[name], k)
            values[name] = params[name].reshape(-1)[at.long()]
            kept[name] = mask[name][at.long()] if name in mask else at
    return values, kept


def without_full(mask: Mask, task: Task) -> dict[str, Tensor]:
    """The mask without the layers of which every weight is kept."""
    sizes = prunable(task).sizes
    return {name: kept for name, kept in mask.items() if len(kept) < sizes[name]}


def unfolded(task: Task, params: Mapping[str, Tensor], mask: Mask) -> tuple[Params, dict[str, Tensor]]:
    """Of all weights that may be pruned, full layers too: flat kept values, (n,), and their positions, (n,) int32."""
    sizes = prunable(task).sizes
    values = {name: params[name].reshape(-1) for name in sizes}
    return values, {n: mask[n] if n in mask else torch.arange(k, dtype=torch.int32) for n, k in sizes.items()}


def folded(task: Task, params: Mapping[str, Tensor], values: Params, kept: Mask) -> tuple[Params, dict[str, Tensor]]:
    """``params`` with these weights in the place of their own, and their mask; the reverse of :func:`unfolded`."""
    mask = without_full(kept, task)
    new = {name: v if name in mask else v.view(task.shapes[name]) for name, v in values.items()}
    return {name: new.get(name, t) for name, t in params.items()}, mask


# --- the server's half -----------------------------------------------------------------------------------------------


@dataclass
class GlobalMaskStrategy(AggregatingStrategy):
    """Abstract: one sparse model for all clients.

    density: of it, in (0, 1]; 0 = the smallest of the devices' density budgets, as a "true" one. density_kind:
    "nominal" (of the weights that may be pruned) or "true" (of all trainable scalars).
    """

    masked: ClassVar[bool] = True
    density: float = 0.1
    density_kind: str = "nominal"

    def init(self, task: Task, devices: Sequence[Device]) -> State:
        if self.density:
            return self.begin(task, devices)
        budgets = [d.budget.density for d in devices if d.budget.density is not None]
        if not budgets:
            raise UserError(
                "density = 0 takes the devices' density budgets, and no device has one: set budget.tiers, shares of the"
                " parameters"
            )
        return replace(self, density=self.within(budgets), density_kind="true").begin(task, devices)

    def within(self, budgets: Sequence[float]) -> float:
        """The density of a model for devices of these density budgets."""
        return min(budgets)

    @abstractmethod
    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        """``init`` once the density is known."""

    def dense_before(self, cohort: Sequence[Device]) -> Sequence[Device]:
        """Who of the first exchange's cohort computes with the dense model before round 1."""
        return ()

    def dense_buffers(self, task: Task) -> tuple[int, int]:
        """What these hold meanwhile: copies of optimiser state a weight, bytes for choosing masks."""
        return 0, 0

    def foresee(self, task: Task, devices: Sequence[Device], plan: Plan) -> None:
        """Refuse dense work before round 1 that breaks a budget of density, multiply-adds or memory."""
        super().foresee(task, devices, plan)
        training = {d.id: d for d in devices if d.id not in plan.novel}
        if plan.on_over_budget != "stop" or not training:
            return
        cohort = [training[i] for i in sample_cohort(sorted(training), plan.fraction, plan.seed, 0)]
        if not (asked := self.dense_before(cohort)):
            return
        copies, decision = self.dense_buffers(task)
        batch = int(self.client_config.get("batch_size", SgdClient.batch_size))
        costs = masked_costs(task, {}, samples=0, batch=batch, copies=copies, decision=decision)
        known = {key: float(costs[key]) for key in ("density_true", "forward_macs", "memory")}
        for device in asked:
            if found := check(device.budget, **known):
                raise exceeded(device.id, 0, found[0])


@dataclass(frozen=True, kw_only=True)
class MaskedState(State):
    """``params`` are compact under ``shared.mask``; of what is ``local`` they are what clients begin with."""

    shared: SharedMask

    @property
    def common(self) -> dict[str, Tensor]:
        """Those of the parameters that clients send: all but their own norms."""
        return {name: t for name, t in self.params.items() if name not in self.shared.local}

    def tensors(self) -> dict[str, Tensor]:
        return {**self.params, **self.shared.tensors()}


M = TypeVar("M", bound=MaskedState)


def averaged(
    rule: Aggregation, task: Task, state: M, replies: Iterable[Reply], see: Callable[[Reply], None] | None = None
) -> M:
    """The state after a round on compact models; who has sent one holds the mask. ``see`` gets each reply too."""
    params, seen = aggregated(rule, task, state.params, state.common, replies, see)
    return replace(state, params=params, shared=state.shared.held_by(seen))


@dataclass(frozen=True)
class SharedMask:
    """The global mask and who holds it.

    mask: without full layers. packed: the same as it travels. version: grows with every change; 0 = nothing is masked.
    held: (largest device id + 1,) int32, the version that each device holds, 0 = none. local: names of the tensors that
    stay with the clients. trained: (largest device id + 1,) bool, who has some of its own.
    """

    mask: Mask
    packed: Mapping[str, Tensor]
    version: int
    held: Tensor
    local: tuple[str, ...]
    trained: Tensor

    @staticmethod
    def first(mask: Mask, task: Task, devices: Sequence[Device], config: Mapping[str, Any]) -> SharedMask:
        """A mask that no device holds yet. config: the client half's hyper-parameters.

        Raises UserError if norms are to be local and the model has none.
        """
        held = torch.zeros(max((d.id for d in devices), default=-1) + 1, dtype=torch.int32)
        local = norm_names(task) if config.get("local_norms") else ()
        if config.get("local_norms") and not local:
            raise UserError("local_norms = true, but the model has no norm layer")
        return SharedMask({}, {}, 0, held, local, held.bool()).changed_to(mask, task)

    def changed_to(self, mask: Mask, task: Task) -> SharedMask:
        """A new version of the mask, which no device holds."""
        mask = without_full(mask, task)
        sizes = prunable(task).sizes
        packed = {_MASK + name: pack_positions(kept, sizes[name]) for name, kept in mask.items()}
        if not mask:  # versions start anew: none of before may count as held
            return replace(self, mask={}, packed={}, version=0, held=torch.zeros_like(self.held))
        return replace(self, mask=mask, packed=packed, version=self.version + 1)

    def held_by(self, ids: Iterable[int]) -> SharedMask:
        """The same after these devices have trained, so that they hold this version."""
        ids, held, trained = list(ids), self.held.clone(), self.trained.clone()
        held[ids], trained[ids] = self.version, True
        return replace(self, held=held, trained=trained)

    def packed_of(self, name: str) -> Tensor:
        """The packed positions of one weight."""
        return self.packed[_MASK + name]

    def holds(self, device: Device) -> bool:
        """Whether a device holds this version."""
        return int(self.held[device.id]) == self.version

    def tensors(self) -> dict[str, Tensor]:
        """The positions under the names that they have in memories."""
        return {_MASK + name: kept for name, kept in self.mask.items()}


def masked_packet(
    kind: str, params: Mapping[str, Tensor], shared: SharedMask, device: Device, **extra: Tensor
) -> Packet:
    """Compact values, the mask only for a device that does not hold it, what is local only for one that has none of its
    own, and a method's own tensors."""
    mask = {} if shared.holds(device) else shared.packed
    if shared.local and bool(shared.trained[device.id]):
        params = {name: t for name, t in params.items() if name not in shared.local}
    return Packet(kind, {**params, **mask, **extra}, {_VERSION: shared.version})


def masked_form(task: Task, params: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of the names, shapes and types that a reply with the client's own mask has: (kept,) values of
    ``counts`` and their packed positions; ``params`` give the others."""
    sizes = prunable(task).sizes
    values = {name: form(counts[name]) if name in counts else t for name, t in params.items()}
    packed = {_MASK + n: form(packed_bytes(sizes[n], k), dtype=torch.uint8) for n, k in counts.items()}
    return {**values, **packed}


def with_mask(task: Task, params: Params, mask: Mask) -> dict[str, Tensor]:
    """The tensors of such a reply."""
    sizes = prunable(task).sizes
    return {**params, **{_MASK + name: pack_positions(kept, sizes[name]) for name, kept in mask.items()}}


def own_mask(task: Task, reply: Packet) -> dict[str, Tensor]:
    """The mask in such a reply. Raises UserError for positions that repeat, do not ascend or lie outside."""
    sizes, mask = prunable(task).sizes, {}
    for name in sizes:
        if (packed := reply.tensors.get(_MASK + name)) is not None:
            try:
                mask[name] = unpack_positions(packed, sizes[name], len(reply.tensors[name]))
            except UserError as error:
                raise UserError(f"mask of {name!r}: {error}") from error
    return mask


def own_mask_complaint(task: Task, reply: Packet, kind: str, like: Mapping[str, Tensor]) -> str:
    """What is wrong with a reply that has a mask of its own and should look like ``like``, or ""."""
    if bad := misfit(reply, kind, like):
        return bad
    try:
        own_mask(task, reply)
    except UserError as error:
        return str(error)
    return ""


# --- the client's half -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Received:
    """What a packet and the client's memory give together: compact parameters, their mask, and the new memory."""

    params: Params
    mask: Mask
    memory: Memory


def receive(task: Task, packet: Packet, memory: Memory) -> Received:
    """Unpack a packet of ``masked_packet``, or the client's own reply to one.

    Raises UserError if it builds on a version of the mask that the client does not hold, or on tensors of its own.
    """
    own = {name: t for name, t in memory.items() if name.startswith(_OWN)}
    # what the server sends counts: it sends norms only to a client of whose own it knows nothing
    there = {**{name.removeprefix(_OWN): t for name, t in own.items()}, **packet.tensors}
    if missing := [name for name in task.shapes if name not in there]:
        raise UserError(f"the packet has no {missing[0]!r}, and this client holds none of its own")
    params = {name: there[name] for name in task.shapes}
    sent = {name.removeprefix(_MASK): t for name, t in packet.tensors.items() if name.startswith(_MASK)}
    version = int(packet.scalars.get(_VERSION, -1))  # a reply of the client's own has none
    if not version:  # nothing is masked
        return Received(params, {}, own)
    if sent:
        sizes = prunable(task).sizes
        mask = {name: unpack_positions(packed, sizes[name], len(params[name])) for name, packed in sent.items()}
        return Received(params, mask, {**remember(mask, version), **own})
    held = int(memory[_VERSION]) if _VERSION in memory else 0
    if version not in (-1, held):
        raise UserError(f"the packet builds on version {version} of the mask, this client holds {held or 'none'}")
    return Received(params, recall(memory), memory)


def remember(mask: Mask, version: int) -> Memory:
    """A mask and its version as a client's memory."""
    return {_VERSION: torch.tensor([version]), **{_MASK + name: kept for name, kept in mask.items()}}


def recall(memory: Memory) -> dict[str, Tensor]:
    """The mask in a client's memory; {} if there is none."""
    return {name.removeprefix(_MASK): t for name, t in memory.items() if name.startswith(_MASK)}


def masked_costs(
    task: Task, mask: Mask, *, samples: int, batch: int, copies: int, decision: int = 0
) -> dict[str, Scalar]:
    """The scalars of a reply that training under a mask costs: densities, flops, multiply-adds, memory.

    samples: seen in training. batch: the largest. copies: of optimiser state a weight. decision: bytes of buffers for
    choosing masks.
    """
    model = prunable(task)
    cut = model.cut(mask)
    memory = cost.memory_bytes(model.layers, batch, cut, optimizer_copies=copies, decision=decision)
    nominal = cost.nominal_density(model.layers, cut)
    return {
        "density_true": cost.kept_count(model.layers, cut) / model.total,
        **({} if nominal is None else {"density_nominal": nominal}),
        "flops": cost.train_flops(model.layers, samples, cut),
        "forward_macs": cost.forward_macs(model.layers, cut),
        "memory": memory.total,
    }


@dataclass(frozen=True)
class MaskedClient(SgdClient):
    """Abstract: a client half that trains compact parameters. Memory: the mask and its version.

    ft_epochs: for which the personal model is fine-tuned under the mask before evaluation, with learning rate ft_lr
    (0 = lr) and the same shuffle each time; 0 = it is the global model. local_norms: norm layers, running statistics
    too, stay with the client, which begins with those that it gets first. Extensions of all these methods ("+FT",
    "+FedBN").
    """

    ft_epochs: int = 0
    ft_lr: float = 0.0
    local_norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(ft_epochs=self.ft_epochs, ft_lr=self.ft_lr)

    def local(self, packet: Packet, reply: Packet) -> Packet:
        return replace(super().local(packet, reply), kind=_LOCAL)  # before aggregation a trained model stands as it is

    def received(self, task: Task, packet: Packet, memory: Memory, reply: Packet) -> Mapping[str, Tensor]:
        got, own = receive(task, packet, memory), own_mask(task, reply)
        values = {name: t for name, t in got.params.items() if name in reply.tensors}
        return {name: carry(t, got.mask[name], own[name]) if name in own else t for name, t in values.items()}

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        got = receive(task, packet, memory)
        score = score_masked(task, got.params, got.mask, client.held_out)
        epochs = 0 if packet.kind == _LOCAL else self.ft_epochs
        personal = self._tuned(task, client, got, epochs) if epochs else score
        partly = self.local_norms or bool(packet.scalars.get(PART))  # it is not the global model
        return {"personal": personal} if partly else {"personal": personal, "global": score}

    def onboard(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator, epochs: tuple[int, ...]
    ) -> dict[int, Score]:
        """Fine-tuning as before evaluation, for so many epochs; without ft_epochs the same score for every number."""
        if not self.ft_epochs:
            return super().onboard(task, client, packet, memory, rng, epochs)
        got = receive(task, packet, memory)
        return {e: self._tuned(task, client, got, e) for e in epochs}

    def _tuned(self, task: Task, client: Client, got: Received, epochs: int) -> Score:
        """The score of the received model after ``epochs`` epochs on the client's training data."""
        params = self.tuned(task, client, got.params, epochs, self.ft_lr, got.mask)
        return score_masked(task, params, got.mask, client.held_out)

    def train_kept(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        """Local training of the kept weights alone: a reply of compact values, and the new memory."""
        got = receive(task, packet, memory)
        fit = self.fit(task, client, got.params, rng, mask=got.mask)
        return self.update(task, fit.params, self.facts(task, client, fit, got.mask), got.memory)

    def update(
        self, task: Task, params: Params, facts: Mapping[str, Scalar], memory: Memory, **extra: Tensor
    ) -> tuple[Packet, Memory]:
        """The reply after training, with a method's own tensors, and the new memory: norms in either, not in both."""
        if self.local_norms:
            own = norm_names(task)
            for name in own:  # the server, which refuses such values, never sees them
                if not bool(torch.isfinite(params[name]).all()):
                    raise UserError(f"after training {name!r} is not finite (NaN or infinite); lower the learning rate")
            memory = {**memory, **{_OWN + name: params[name] for name in own}}
            params = {name: t for name, t in params.items() if name not in own}
        return Packet("update", {**params, **extra}, facts), memory

    def facts(
        self, task: Task, client: Client, fit: Fit, mask: Mask, *, flops: float = 0.0, decision: int = 0
    ) -> dict[str, Scalar]:
        """The scalars of a reply after training under a mask, with ``flops`` and bytes of choosing another one."""
        costs = masked_costs(
            task, mask, samples=fit.samples, batch=self.batch_size, copies=self.copies, decision=decision
        )
        return {**training_facts(client, fit), **costs, "flops": float(costs["flops"]) + flops}
