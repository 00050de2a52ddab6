"""pFedGate: gated, personal, block-sparse models under a budget for each client.

Source: Chen, Yao, Gao, Ding, Li, "Efficient Personalized Federated Learning via Sparse Model-Adaptation", ICML 2023,
arXiv 2305.02776, Algorithm 1 and App. A. The client half does most of it. Cubic schedule: Zhu and Gupta 2017, arXiv
1710.01878, eq. 1.
Differs from the official code (yxdyc/pFedGate, b8cfa15): the mean of each block is over those who sent it (as the
paper says), over this round's clients, of values; a block here is what lies between a group of outputs and a group of
inputs, so that dead columns are not averaged; what is scheduled is the budget, by rounds.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsparse.errors import UserError, shown, unknown
from fedsparse.gating import GatedClient
from fedsparse.method import load_client
from fedsparse.models.gate import Gate
from fedsparse.models.gated import (
    GATE_SHARE,
    LEAST,
    Gated,
    TooSmallError,
    fitted,
    gated_model,
    knapsack_cost,
    official_floor,
)
from fedsparse.packet import Packet, Scalar
from fedsparse.replies import LARGEST_WEIGHT, is_number
from fedsparse.seeding import numpy_rng
from fedsparse.sparse.codec import pack, pack_bits, unpack, unpack_bits
from fedsparse.sparse.cut import Bools
from fedsparse.sparse.pooling import prepare_pools
from fedsparse.strategy import AggregatingStrategy, Plan, Reply, State
from fedsparse.task import Budget, Client, Device, Task

SCHEDULES = ("constant", "linear", "cubic", "plateau")
_LOOKED_AT = 2000  # clients whose masks are described after a run: a pass of the gate each
_PAIRED = 256  # of them compared with all others at a time
_DRAWS = 24  # random importances that tell whether a budget leaves a choice
_NOTED = 8  # different budgets of which this is found out


@dataclass(frozen=True)
class GateState(State):
    """The global model and what the server knows of its clients.

    groups, least: the cut (see ``Layout``). above: how far above their budgets clients are, from 1 (a density of 1) to
    0 (their budget). changed: (parts,) the round in which each part last changed, 0 = never. copies: by device, the
    round after which its copy was made. next: by device, the packed kept set of its next round. best, waited: of the
    plateau schedule.
    """

    round: int = 0
    rounds: int = 0
    groups: int = 0
    least: float = 0.0
    above: float = 0.0
    changed: Tensor = field(default_factory=lambda: torch.zeros(0))
    copies: Mapping[int, int] = field(default_factory=dict)
    next: Mapping[int, Tensor] = field(default_factory=dict)
    best: float = -1.0
    waited: int = 0

    @property
    def trained(self) -> Tensor:
        """(parts,) bool: whether any client has trained it."""
        return self.changed > 0


@dataclass
class PFedGate(AggregatingStrategy):
    """Sends the model, or what the client needs of it; averages block by block. Gates never leave their clients.

    schedule: of the budgets: "constant"; "linear" or "cubic" from 1 down to the budget between the shares
    ``schedule_from`` and ``schedule_until`` of the rounds; "plateau": a quarter of the way down whenever the clients'
    validation accuracy has not risen for ``patience`` rounds. While it is above a budget ``budget.on_over_budget``
    must be "record".
    """

    client: ClassVar[str] = "pfedgate"
    private_support: ClassVar[str] = (
        "the blocks that a client sends are its mask, which says what its data are like; the server would have to learn"
        " them to add the values up"
    )
    schedule: str = "constant"
    schedule_from: float = 0.0
    schedule_until: float = 0.5
    patience: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if not 0 <= self.schedule_from < self.schedule_until <= 1:
            raise UserError(
                "schedule_from and schedule_until must be shares of the rounds, the first below the second, "
                f"got {self.schedule_from} and {self.schedule_until}"
            )
        if self.patience < 1:
            raise UserError(f"patience must be at least 1, got {self.patience}")
        if self.schedule != "constant" and self._half.mask_scope != "batch":
            raise UserError(f'schedule = {self.schedule!r} needs mask_scope = "batch", got {self._half.mask_scope!r}')

    def beside(self) -> str:
        return "their validation accuracy" if self.schedule == "plateau" else ""

    @cached_property
    def _half(self) -> GatedClient:
        """The client half, whose options the server reads."""
        spec = self.client_spec or self.client
        half = load_client(spec)(**self.client_config)
        if not isinstance(half, GatedClient):
            raise UserError(f"client {spec!r} does not fit pfedgate: it must be a fedsparse.gating.GatedClient")
        return half

    # --- before round 1 ----------------------------------------------------------------------------------------------

    def init(self, task: Task, devices: Sequence[Device]) -> State:
        half = self._half
        if self.schedule != "constant" and all(d.budget.density is None for d in devices):
            raise UserError(f"schedule = {self.schedule!r} needs budgets of density (budget.tiers or budget.table)")
        layout = half.layout
        if half.mode == "paper":  # the first chunks must leave a choice under the smallest budget
            smallest = min((d.budget.density or 1.0 for d in devices), default=1.0)
            layout = replace(layout, least=min(layout.least, smallest / 2))
        layout = fitted(task, layout, lambda gated: self._check(half, gated, devices))
        self.gated: Gated = gated_model(task, layout)  # derived from the task: no state
        if half.mode == "structural" and task.device.type == "cpu":
            prepare_pools(task.model)
        return GateState(
            task.init_params(),
            groups=layout.blocks_per_layer,
            least=layout.least,
            above=float(self.schedule != "constant"),
            changed=torch.zeros(self.gated.cut.parts, dtype=torch.int64),
        )

    def _check(self, half: GatedClient, gated: Gated, devices: Sequence[Device]) -> None:
        """Refuse what cannot be met, with the reason."""
        if half.open_gate:
            return
        model = gated.cut.spent(gated.cut.everything)
        if gated.gate_size > model:
            raise UserError(
                f"the gate has {gated.gate_size} parameters, more than the model ({model}); it has one output a block"
                f" ({gated.cut.blocks}): {_lighter(gated)}"
            )
        kinds = _kinds(devices)
        self._check_scope(half, kinds)
        limited = _limited(half, gated, kinds)
        if half.cost != "auto" and not any(half.cost in limits for limits in limited):
            raise UserError(f"cost = {half.cost!r} needs devices with a budget of it (budget.of, budget.table)")
        for device in kinds:
            half.choice(gated, device, device.budget.density).first()

    def _check_scope(self, half: GatedClient, kinds: Sequence[Device]) -> None:
        """Refuse budgets that the mode, the mask scope or the download cannot promise to meet."""
        for device in kinds:
            budget = device.budget
            if budget.memory is not None and half.mode != "structural":
                raise UserError(f'client {device.id} has a memory budget, which needs mode = "structural"')
            if budget.memory is not None and (half.mask_scope == "batch" or half.download != "kept"):
                raise UserError(
                    f"client {device.id} has a memory budget: with mask_scope = {half.mask_scope!r} and download ="
                    f' {half.download!r} it would hold the whole model; use mask_scope = "round" (or "client") and'
                    ' download = "kept"'
                )
            if budget.bytes_up is not None and half.mask_scope == "batch":
                raise UserError(
                    f'client {device.id} has a budget for its upload, which mask_scope = "batch" cannot promise (every'
                    ' batch has its own blocks); use mask_scope = "round" or "client"'
                )

    def foresee(self, task: Task, devices: Sequence[Device], plan: Plan) -> None:
        """Refuse what would break a budget in every round, unless violations are only to be recorded."""
        super().foresee(task, devices, plan)
        if plan.on_over_budget != "stop":
            return
        half, gated, record = self._half, self.gated, 'set budget.on_over_budget = "record" to run it all the same'
        for device in _kinds(devices):
            budget = device.budget
            if budget.forward_macs is not None and gated.flat:
                raise UserError(
                    f"client {device.id} has a budget of multiply-adds, but mode = {half.mode!r} computes dense layers,"
                    f" gates and all; {record}"
                )
            if budget.density is None or (budget.density == 1 and (half.open_gate or not gated.flat)):
                continue
            if half.open_gate or self.schedule != "constant":
                what = "open_gate keeps every block" if half.open_gate else f"schedule = {self.schedule!r} starts above"
                raise UserError(f"{what}, and client {device.id} has budget {budget.density:g}; {record}")
            spent = gated.cut.spent(half.choice(gated, device, budget.density).first()) + gated.gate_size
            if gated.flat and spent > budget.density * gated.dense * (1 + 1e-9):
                raise UserError(
                    f"client {device.id}: mode = {half.mode!r} needs density {spent / gated.dense:.4g}, gate included,"
                    f" above its budget {budget.density:g}; {record}"
                )

    def notes(self, task: Task, devices: Sequence[Device]) -> tuple[str, ...]:
        """A gate that is not light, and budgets that leave no choice."""
        half, gated, found = self._half, self.gated, []
        if half.open_gate:
            return ()
        share = gated.gate_size / gated.dense
        if share > GATE_SHARE:
            found.append(f"the gate has {share:.0%} of the model's parameters; to make it smaller, {_lighter(gated)}")
        kinds = _kinds(devices)[:_NOTED]
        found += [note for device in kinds if (note := self._no_choice(half, gated, device))]
        return tuple(found)

    def _no_choice(self, half: GatedClient, gated: Gated, device: Device) -> str:
        """What to say of a budget under which random importances all keep the same blocks, or ""."""
        choice, budget = half.choice(gated, device, device.budget.density), device.budget
        free = ~gated.cut.forced
        if (not choice.limits and half.mode != "official") or not free.any():
            return ""
        rng = numpy_rng(gated.gate.seed, "choice")
        kept = [choice.kept(rng.random(gated.cut.blocks)) for _ in range(_DRAWS)]
        if len({k.tobytes() for k in kept}) > 1 or kept[0].all():
            return ""
        named = {"density": budget.density, "multiply-adds": budget.forward_macs, "memory": budget.memory}
        what = ", ".join(f"{v:g} of {k}" for k, v in {**named, "upload": budget.bytes_up}.items() if v is not None)
        same = f"a budget ({what}) leaves no choice: random importances all keep the same blocks"
        remedy = "set method.blocks_per_layer" + ("" if gated.flat else " or method.max_block_frac")
        if not choice.limits:
            return f"{same}; {_official_remedy(gated, kept[0], choice.density or 1.0)}"
        cost = knapsack_cost(choice.cost, choice.limits)
        left, unit = choice.limits[cost] - gated.cut.spent(kept[0], cost), cost.replace("_", "-")
        least = gated.cut.added(kept[0], cost)[~kept[0]].min()
        if left >= least:  # another limit binds
            return f"{same}; smaller ones would do: {remedy}"
        return f"{same}, the smallest dropped one takes {least:.0f} {unit}; blocks of at most {left} would do: {remedy}"

    def scheduled(self, task: Task, state: State, rounds: int) -> State:
        return replace(_gate(state), rounds=rounds)

    # --- down --------------------------------------------------------------------------------------------------------

    def broadcast(self, state: State, device: Device) -> Packet:
        state = _gate(state)
        scalars: dict[str, Scalar] = {"groups": state.groups, "least": state.least}
        if state.above and device.budget.density is not None:
            scalars["density"] = device.budget.density + (1 - device.budget.density) * state.above
        if self.schedule == "plateau":
            scalars["validate"] = 1
        download = self._half.download
        if download == "kept":
            kept = self._next(state, device)
            values = pack(state.params, self.gated.cut, self.gated.cut.touched(kept))
            return Packet("train", {"down": values, "kept": pack_bits(kept)}, scalars)
        if download == "changed" and device.id in state.copies:
            newer = (state.changed > state.copies[device.id]).numpy()
            tensors = {"down": pack(state.params, self.gated.cut, newer), "changed": pack_bits(newer)}
            return Packet("train", tensors, scalars)
        return Packet("train", state.params, scalars)

    def _next(self, state: GateState, device: Device) -> Bools:
        """The kept set of a device's next round: what it said, or that of an untrained gate."""
        cut = self.gated.cut
        if device.id in state.next:
            return unpack_bits(state.next[device.id], cut.blocks)
        return self._half.choice(self.gated, device, device.budget.density).first()

    # --- up ----------------------------------------------------------------------------------------------------------

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        packet = reply.packet
        wanted = {"values", "touched"} | ({"next"} if self._half.download == "kept" else set())
        if packet.kind != "update" or packet.tensors.keys() != wanted:
            got = shown(sorted(packet.tensors))
            return f"a reply {packet.kind!r} of {got}, where 'update' of {sorted(wanted)} is wanted"
        cut, values = self.gated.cut, packet.tensors["values"]
        if values.dtype != torch.float32:
            return f"tensor 'values' is {values.dtype}, not torch.float32"
        try:
            touched = unpack_bits(packet.tensors["touched"], cut.parts)
            for _ in unpack(values, cut, touched, task.shapes):
                break
            if "next" in wanted and not unpack_bits(packet.tensors["next"], cut.blocks)[cut.forced].all():
                return "the kept set of its next round leaves out blocks that are always kept"
            if "next" in wanted and (touched & ~cut.touched(self._next(_gate(state), reply.device))).any():
                return "it sends parts of the model that it did not get"
        except UserError as error:
            return str(error)
        seen, right = (packet.scalars.get(f"validation_{word}", 0) for word in ("seen", "right"))
        if not is_number(seen, 0, LARGEST_WEIGHT) or not is_number(right, 0, seen):
            return f"the reply must have validated on a number of examples, got {shown(right)} right of {shown(seen)}"
        return ""

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        state, cut, rule = _gate(state), self.gated.cut, self.rule
        mean, touched, right, seen = rule.parts(cut, state.params), np.zeros(cut.parts, bool), 0.0, 0.0
        clients = turn = 0
        copies, following = dict(state.copies), dict(state.next)
        for reply in replies:
            tensors, scalars = reply.packet.tensors, reply.packet.scalars
            bits = unpack_bits(tensors["touched"], cut.parts)
            mean.add(rule.clipped_parts(tensors["values"], cut, bits, state.params), bits, reply.weight)
            touched |= bits | bool(rule.noise)  # noise is on every part: which ones were trained stays private
            clients, turn = clients + 1, reply.round
            if self._half.download == "changed":
                copies[reply.device.id] = state.round
            if "next" in tensors:
                following[reply.device.id] = tensors["next"].clone()
            right += float(scalars.get("validation_right", 0))
            seen += float(scalars.get("validation_seen", 0))
        sent = torch.from_numpy(touched)
        now = replace(
            state,
            params=rule.noised(mean.result(state.params), state.params.keys(), clients, task.seed, turn),
            round=state.round + 1,
            changed=torch.where(sent, state.round + 1, state.changed),
            copies=copies,
            next=following,
        )
        return self._step(now, right / seen if seen else None)

    def _step(self, state: GateState, accuracy: float | None) -> GateState:
        """The schedule after a round."""
        if self.schedule == "constant":
            return state
        if self.schedule == "plateau":
            return _plateau(state, accuracy, self.patience)
        share = state.round / max(1, state.rounds)
        left = 1 - (share - self.schedule_from) / (self.schedule_until - self.schedule_from)
        left = min(1.0, max(0.0, left))
        return replace(state, above=left**3 if self.schedule == "cubic" else left)

    # --- after the run -----------------------------------------------------------------------------------------------

    def diagnose(
        self, task: Task, state: State, clients: Sequence[Client], memories: Mapping[int, Mapping[str, Tensor]]
    ) -> Mapping[str, Any]:
        """Of the clients' deployed masks: how many differ, their mean overlap (Jaccard, over the blocks that are not
        forced, of all pairs), the share of blocks that no client has trained, and how often a training batch's mask
        agrees on a block that is not forced with the deployed one, or with one of those of inference by batch or by
        sample. Beside them the gate's share of the model, the mode of inference, and of how many clients this is: at
        most ``_LOOKED_AT``, drawn by the run's seed."""
        state, half, cut = _gate(state), self._half, self.gated.cut
        free = ~cut.forced
        if half.open_gate or not free.any():
            return {}
        known = [c for c in _drawn(clients, memories, task.seed) if "mask/used" in memories[c.id]]
        masks, agreements = [], []
        for client in known:
            packet, memory = self.broadcast(state, client.device), dict(memories[client.id])
            mask, one = half.deployed(task, client, packet, memory)[0], half.inference_mode == "client"
            evaluated = mask[None] if one else half.evaluation_masks(task, client, packet, memory)
            masks.append(mask[free])
            agreements.append(_agreement(memory["mask/used"].double().numpy()[free], evaluated[:, free]))
        if not masks:
            return {}
        return {
            "distinct": len({m.tobytes() for m in masks}),
            "mean_overlap": _overlap(np.array(masks)),
            "never_trained": 1 - float(self._trained(state, [memories[c.id] for c in known]).mean()),
            "agreement": sum(agreements) / len(agreements),
            "gate_share": self.gated.gate_size / self.gated.dense,
            "inference": half.inference_mode,
            "of_clients": len(known),
        }

    def _trained(self, state: GateState, memories: Iterable[Mapping[str, Tensor]]) -> Bools:
        """(L,) the blocks that some client has trained; in mode official, which moves all of them, that one of these
        clients has used."""
        cut = self.gated.cut
        used = [unpack_bits(memory["mask/ever"], cut.blocks) for memory in memories if "mask/ever" in memory]
        return np.any(used, axis=0) if used else cut.blocks_of(state.trained.numpy())


def _drawn(clients: Sequence[Client], known: Container[int], seed: int) -> list[Client]:
    """Those that have a memory; some of them where they are many."""
    found = [client for client in clients if client.id in known]
    if len(found) <= _LOOKED_AT:
        return found
    chosen = numpy_rng(seed, "diagnose").choice(len(found), _LOOKED_AT, replace=False)
    return [found[i] for i in np.sort(chosen)]


def _limited(half: GatedClient, gated: Gated, kinds: Iterable[Device]) -> list[Mapping[str, int]]:
    """The limits of each device. Raises TooSmallError for the one whose budget lacks most."""
    found: list[Mapping[str, int]] = []
    errors: list[TooSmallError] = []
    for device in kinds:
        try:
            found.append(half.choice(gated, device, device.budget.density).limits)
        except TooSmallError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: error.times)
    return found


def _lighter(gated: Gated) -> str:
    """What makes a gate smaller."""
    gate, layout = gated.gate.model, gated.layout
    assert isinstance(gate, Gate)
    ways = ["fewer blocks (method.blocks_per_layer" + (")" if gated.flat else ", method.max_block_frac)")]
    if len(gate.input_shape) > 1:  # there are positions to average over
        ways.append("method.gate_pool")
    if layout.gate.branches == "separate":
        ways.append('method.branches = "shared"')
    return "set " + " or ".join([", ".join(ways[:-1]), ways[-1]] if ways[1:] else ways)


def _official_remedy(gated: Gated, kept: Bools, s: float) -> str:
    """What would give the released code's choice room at budget ``s``, where it keeps ``kept`` whatever the scores."""
    cut, found = gated.cut, []
    sizes = cut.weights("parameters")
    for members, capacity in gated.official_rooms(s):
        dropped = members[~kept[members]]
        if len(dropped):
            found.append((capacity - int(sizes[members[kept[members]]].sum()), int(sizes[dropped].min())))
    left, least = max(found, key=lambda room: room[0] / room[1])
    if left > 0:
        what = f"the smallest dropped one takes {least} parameters; blocks of at most {left} would do"
        return f"{what}: set method.blocks_per_layer"
    floor = f"of it nothing is left above the share {official_floor(gated.layout, s):g} that is always kept"
    more = f"method.blocks_per_layer above {math.floor(1 / s)}" if s > LEAST else f"a budget above {LEAST}"
    return f"{floor}: set {more}"


def _kinds(devices: Sequence[Device]) -> list[Device]:
    """The first device of each budget: what holds for it holds for all of them."""
    found: dict[Budget, Device] = {}
    for device in devices:
        found.setdefault(device.budget, device)
    return list(found.values())


def _gate(state: State) -> GateState:
    """The state as this method keeps it; one with a plain model in it is that of an untouched run."""
    assert isinstance(state, GateState)
    return state


def _plateau(state: GateState, accuracy: float | None, patience: int) -> GateState:
    """A quarter of the way down after ``patience`` rounds without a better validation accuracy.

    accuracy: of the round's clients, None where none of them has validation data.
    """
    if accuracy is not None and accuracy > state.best:
        return replace(state, best=accuracy, waited=0)
    if state.waited + 1 < patience:
        return replace(state, waited=state.waited + 1)
    if state.best < 0:
        raise UserError(f'schedule = "plateau" needs validation data; no client of {patience} rounds had any')
    return replace(state, above=max(0.0, state.above - 0.25), waited=0)


def _agreement(used: NDArray[np.float64], masks: Bools) -> float:
    """How often a random training batch and a random evaluation mask agree on a block, in [0, 1], mean over blocks.

    used: (L,) the share of training batches that keep each block, in [0, 1]. masks: (n, L), the evaluation masks.
    """
    evaluated = masks.mean(axis=0)
    return float((used * evaluated + (1 - used) * (1 - evaluated)).mean())


def _overlap(masks: np.ndarray[Any, Any]) -> float | None:
    """Mean over all pairs of |A and B| / |A or B|, 1 for two empty ones; None for a single mask."""
    n = len(masks)
    if n < 2:
        return None
    counts = masks.astype(np.float64)
    sizes, total = counts.sum(1), 0.0
    for start in range(0, n, _PAIRED):  # all pairs at once take gigabytes from 10,000 masks on
        both = counts[start : start + _PAIRED] @ counts.T
        either = sizes[start : start + _PAIRED, None] + sizes - both
        total += float(np.where(either > 0, both / np.maximum(either, 1), 1.0).sum())
    return (total - n) / (n * (n - 1))
