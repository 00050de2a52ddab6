"""pFedGate's client half: a private gate picks, for every batch, blocks of the model that fit the client's budget.

Source: Chen, Yao, Gao, Ding, Li, "Efficient Personalized Federated Learning via Sparse Model-Adaptation", ICML 2023,
arXiv 2305.02776, Algorithm 1 and App. A; official code yxdyc/pFedGate at b8cfa15.
Differs from the official code in mode "structural": blocks are whole channel groups, computed as smaller dense layers;
the knapsack is exact and global, and what dead columns free is filled up, so that the true density (forced blocks and
gate included) is at most the budget in every batch; the optimiser is lazy (an unused weight keeps its bits) and its
momentum starts anew each round; only what was trained is sent; no ReLU on the logits. Dropped blocks get no
straight-through gradient: with whole channels and ReLU the paper's would be zero as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsparse.client import Memory, Metrics
from fedsparse.gating import Choice, GatedClient
from fedsparse.models.gated import Account, Gated, gated_model
from fedsparse.packet import Packet
from fedsparse.sgd import batches, finite
from fedsparse.sparse.codec import pack, pack_bits, unpack, unpack_bits
from fedsparse.sparse.cut import Bools, Cut, Working
from fedsparse.sparse.flat import FlatModel
from fedsparse.steps import clip_, step_
from fedsparse.task import Client, Params, Score, Split, Task, score

_LOOKED_AT = {"batch": 256, "sample": 32}  # training examples whose evaluation masks are looked at: each is a knapsack


@dataclass(frozen=True, eq=False)
class _Scene:
    """A client with what it got and what it remembers."""

    task: Task
    client: Client
    packet: Packet
    memory: Memory
    gated: Gated

    @property
    def kept_only(self) -> bool:
        """Whether only the client's kept set came, not the whole model."""
        return "kept" in self.packet.tensors

    def whole(self) -> Params:
        """The model, as the client holds it."""
        return _whole(self.task, self.gated.cut, self.packet, self.memory)

    def bits(self, name: str, n: int) -> Bools:
        return unpack_bits(self.packet.tensors[name], n)


class _Gate:
    """The gate in training: its tensors, leaves and momentum. Remembers the momentum only in mode official."""

    def __init__(self, gated: Gated, memory: Memory, *, lasting: bool, off: bool) -> None:
        self.tensors = {name: t.clone() for name, t in gated.gate.placed(gate_tensors(gated, memory)).items()}
        self.leaves = [] if off else [self.tensors[name].requires_grad_() for name in gated.gate.trainable]
        self.lasting = lasting
        before = gated.gate.placed(_part(memory, "gate_velocity/")) if lasting else {}
        self.velocity = [t.clone() for t in before.values()]
        self.scores = memory.get("mask/scores")  # smoothed importances, (L,) float64

    def step(self, grads: tuple[Tensor, ...], *, lr: float, momentum: float, weight_decay: float, clip: float) -> None:
        if self.leaves:
            clip_(grads, clip)
            step_(self.leaves, grads, self.velocity, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def memory(self) -> Memory:
        """What stays of it."""
        kept = {f"gate/{name}": t.detach().cpu() for name, t in self.tensors.items()}
        lasting = enumerate(self.velocity) if self.lasting else ()
        kept |= {f"gate_velocity/{i:03d}": t.cpu() for i, t in lasting}
        return kept


def gate_tensors(gated: Gated, memory: Memory) -> Params:
    """A client's gate; the common initial one before its first round."""
    return _part(memory, "gate/") or gated.gate.init_params()


def _part(memory: Memory, prefix: str) -> Params:
    return {name.removeprefix(prefix): t for name, t in memory.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class PFedGateClient(GatedClient):
    """Memory: the gate's parameters and running statistics (before the first round those common to all clients), what
    its masks were, and what ``download`` and ``mode`` need; see :class:`fedsparse.gating.GatedClient` for the options.
    """

    # --- training ----------------------------------------------------------------------------------------------------

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        scene = self._scene(task, client, packet, memory)
        choice, work, gate = self._choice(scene), self._work(scene), self._gate(scene)
        gated, batch = scene.gated, self.batch_size
        account = Account(gated, batch, self.copies, not self.open_gate, self._held(gated), self._waiting(gated))
        self._fit(scene, choice, work, gate, account, rng, self.epochs)
        work.flush()
        tensors = {"values": work.values(), "touched": pack_bits(work.touched)}
        kept = self._remembered(scene, choice, work, gate, account)
        if self.download == "kept":
            tensors["next"] = kept["mask/next"]
        reply = Packet("update", tensors, {"weight": len(client.train), **account.facts()})
        if packet.scalars.get("validate") and len(client.validation):
            own = self._personal(self._scene(task, client, self.local(packet, reply), kept), client.validation)
            reply = replace(reply, scalars={**reply.scalars, "validation_seen": own.n, "validation_right": own.correct})
        return reply, kept

    def _fit(
        self,
        scene: _Scene,
        choice: Choice,
        work: Working,
        gate: _Gate,
        account: Account,
        rng: torch.Generator,
        epochs: int,
        *,
        frozen: bool = False,
    ) -> None:
        """For each batch one backward pass and one step of the gate and, unless it is frozen, of the model."""
        data = scene.client.train.to(scene.task.device)
        alone = scene.gated.mean_example(data) if self.gate_input == "client" else None
        scene.task.model.train(True)
        for batch in batches(len(data), self.batch_size, epochs, rng):
            x, y = data.x[batch], data.y[batch]
            kept, gates, gate.scores = choice.batch(gate.tensors, x if alone is None else alone, rng, gate.scores)
            work.use(kept)
            loss = scene.task.criterion(self._logits(work.forward(gates, x)), y)
            leaves = [] if frozen else work.leaves
            grads = torch.autograd.grad(loss, [*leaves, *gate.leaves], allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                if not frozen:
                    work.step(grads[: len(leaves)], lr=self.lr, **self._sgd(self.clip))
                gate.step(grads[len(leaves) :], lr=self.gate_lr, **self._sgd(self.gate_clip))
            account.add(kept, len(batch), finite(loss.item(), account.steps))

    def _sgd(self, clip: float) -> dict[str, float]:
        return {"momentum": self.momentum, "weight_decay": self.weight_decay, "clip": clip}

    def _logits(self, logits: Tensor) -> Tensor:
        return torch.relu(logits) if self.relu_logits else logits

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        scene = self._scene(task, client, packet, memory)
        personal = {"personal": self._personal(scene, client.held_out)}
        if "values" in packet.tensors or scene.kept_only:  # the client's own model, or no whole one
            return personal
        return {**personal, "global": task.score(scene.whole(), client.held_out)}

    def local(self, packet: Packet, reply: Packet) -> Packet:
        return Packet("evaluate", {**packet.tensors, **reply.tensors}, packet.scalars)

    def onboard(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator, epochs: tuple[int, ...]
    ) -> dict[int, Score]:
        """The scores of a client that took no part, after so many epochs in which its gate alone is trained, each time
        from the start."""
        scores: dict[int, Score] = {}
        for e in epochs:
            scene = self._scene(task, client, packet, memory)
            if e and not self.open_gate:
                work, gate = self._work(scene), self._gate(scene)
                account = Account(scene.gated, self.batch_size, self.copies, gate=True, held=0)
                shuffle = torch.Generator().set_state(rng.get_state())
                self._fit(scene, self._choice(scene), work, gate, account, shuffle, e, frozen=True)
                after = {**memory, **self._gate_memory(gate)}
                if self.mask_scope != "batch" and not scene.kept_only:  # else it has no other blocks to choose from
                    after |= self._next_mask(scene, self._choice(scene), gate)
                scene = self._scene(task, client, packet, after)
            scores[e] = self._personal(scene, client.held_out)
        return scores

    def deployed(self, task: Task, client: Client, packet: Packet, memory: Memory) -> tuple[Bools, Tensor]:
        """The kept set and the gate values with which the client would deploy a model now, both (L,)."""
        return self._client_wide(self._scene(task, client, packet, memory))

    def evaluation_masks(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Bools:
        most = _LOOKED_AT[self.inference_mode] // self._together
        examples = max(1, most) * self._together  # whole batches: one cut short has another mask
        x = client.train.x[:examples].to(task.device)
        return np.array([kept for _, kept, _ in self._masked(self._scene(task, client, packet, memory), x)])

    @property
    def _together(self) -> int:
        """Examples that share a mask where inference is by batch or by sample."""
        return self.batch_size if self.inference_mode == "batch" else 1

    def _masked(self, scene: _Scene, x: Tensor) -> Iterator[tuple[Tensor, Bools, Tensor]]:
        """The examples that share a mask, their kept set and their gate values, part by part of ``x``."""
        choice, gate = self._choice(scene), scene.gated.gate.placed(gate_tensors(scene.gated, scene.memory))
        for part in torch.split(x, self._together):
            yield part, *choice.evaluated(gate, part)

    def _personal(self, scene: _Scene, data: Split) -> Score:
        """The deployed model's score on ``data``; see ``inference``."""
        work = self._work(scene, train=False)
        scene.task.model.eval()
        if self.open_gate or self.inference_mode == "client":
            kept, gates = self._client_wide(scene)
            work.use(kept)
            return score(lambda x: self._logits(work.forward(gates, x)), data, scene.task.device)

        def predict(x: Tensor) -> Tensor:
            logits = []
            for part, kept, gates in self._masked(scene, x):
                work.use(kept)
                logits.append(work.forward(gates, part))
            return self._logits(torch.cat(logits))

        return score(predict, data, scene.task.device)

    def _client_wide(self, scene: _Scene) -> tuple[Bools, Tensor]:
        cut, choice = scene.gated.cut, self._choice(scene)
        if self.open_gate:
            return cut.everything, torch.ones(cut.blocks)
        if choice.fixed is not None and "touched" in scene.packet.tensors:  # what was just trained, not what comes next
            choice = replace(choice, fixed=cut.blocks_of(scene.bits("touched", cut.parts)))
        gate = gate_tensors(scene.gated, scene.memory)
        scores = scene.memory.get("mask/scores")
        return choice.client_wide(gate, scene.client.train, scores, per_client=self.gate_input == "client")

    def received(self, task: Task, packet: Packet, memory: Memory, reply: Packet) -> Mapping[str, Tensor]:
        if "kept" in packet.tensors:
            return {"values": packet.tensors["down"]}
        cut = self._gated(task, packet).cut
        touched = unpack_bits(reply.tensors["touched"], cut.parts)
        return {"values": pack(_whole(task, cut, packet, memory), cut, touched)}

    # --- what came and what stays ------------------------------------------------------------------------------------

    def _scene(self, task: Task, client: Client, packet: Packet, memory: Memory) -> _Scene:
        return _Scene(task, client, packet, memory, self._gated(task, packet))

    def _gated(self, task: Task, packet: Packet) -> Gated:
        """The cut and the gate, whose groups the server may have made smaller to meet the smallest budget."""
        said = packet.scalars
        layout = replace(
            self.layout,
            blocks_per_layer=int(said.get("groups", self.blocks_per_layer)),
            least=float(said.get("least", self.least)),
        )
        return gated_model(task, layout)

    def _choice(self, scene: _Scene) -> Choice:
        client, gated, said = scene.client, scene.gated, scene.packet.scalars.get("density")
        density = client.device.budget.density if said is None else float(said)
        choice = self.choice(gated, client.device, density)
        if self.mask_scope == "batch" or self.open_gate:
            return choice
        if scene.kept_only:
            return replace(choice, fixed=scene.bits("kept", gated.cut.blocks))
        known = scene.memory.get("mask/next")
        return replace(choice, fixed=choice.first() if known is None else unpack_bits(known, gated.cut.blocks))

    def _gate(self, scene: _Scene) -> _Gate:
        return _Gate(scene.gated, scene.memory, lasting=self.mode == "official", off=self.open_gate)

    def _work(self, scene: _Scene, *, train: bool = True) -> Working:
        """The model as it came, at work."""
        cut, tensors = scene.gated.cut, scene.packet.tensors
        if scene.kept_only:
            values = tensors["values"] if "values" in tensors else tensors["down"]
            return cut.working_kept(scene.task, values, scene.bits("kept", cut.blocks))
        work = cut.working(scene.task, scene.whole(), train=train)
        if train and self.mode == "official" and isinstance(work, FlatModel):
            work.lazy = False
            work.velocity = [t.clone() for t in scene.task.placed(_part(scene.memory, "velocity/")).values()]
        return work

    def _held(self, gated: Gated) -> int | None:
        """Scalars of whole models that the client holds beside the part in use; None = its kept set, as it came."""
        if self.open_gate:
            return 0
        if self.download == "kept":
            return None
        return gated.cut.spent(gated.cut.everything) * (2 if self.download == "changed" else 1)

    def _waiting(self, gated: Gated) -> int:
        """Scalars of the momentum that waits for weights that leave the part in use (in flat modes none leave)."""
        return 0 if gated.flat or self.open_gate else self.copies * gated.cut.spent(gated.cut.everything)

    def _remembered(self, scene: _Scene, choice: Choice, work: Working, gate: _Gate, account: Account) -> Memory:
        kept: Memory = {}
        if self.download == "changed":
            kept |= {f"theta/{name}": t.clone() for name, t in scene.whole().items()}
        if self.open_gate:
            return kept or scene.memory
        kept |= self._gate_memory(gate)
        kept["mask/used"] = torch.from_numpy(account.used / max(1, account.steps)).float()
        if self.mode == "official" and isinstance(work, FlatModel):
            kept |= {f"velocity/{i:03d}": t.cpu() for i, t in enumerate(work.velocity)}
            kept["mask/ever"] = pack_bits((account.used > 0) | self._ever(scene))  # what is touched does not tell: all
        if self.mask_scope != "batch":
            kept |= self._next_mask(scene, choice, gate)
        return kept

    def _ever(self, scene: _Scene) -> Bools:
        """(L,) the blocks that the client has used in its rounds before."""
        blocks, known = scene.gated.cut.blocks, scene.memory.get("mask/ever")
        return np.zeros(blocks, bool) if known is None else unpack_bits(known, blocks)

    def _gate_memory(self, gate: _Gate) -> Memory:
        smoothed = {"mask/scores": gate.scores} if self.score_smoothing and gate.scores is not None else {}
        return {**gate.memory(), **smoothed}

    def _next_mask(self, scene: _Scene, choice: Choice, gate: _Gate) -> Memory:
        """The kept set of the client's next round, chosen now: the server may have to know it before it sends."""
        rounds = int(scene.memory.get("mask/rounds", torch.zeros(()))) + 1
        kept = choice.fixed
        if kept is None or self.mask_scope == "round" or rounds <= self.settle:
            tensors = {name: t.detach() for name, t in gate.tensors.items()}
            free = replace(choice, fixed=None)
            scores = gate.scores if self.score_smoothing else None
            kept, _ = free.client_wide(tensors, scene.client.train, scores, per_client=self.gate_input == "client")
        return {"mask/next": pack_bits(kept), "mask/rounds": torch.tensor(float(rounds))}


def _whole(task: Task, cut: Cut, packet: Packet, memory: Memory) -> Params:
    """The whole model: as received, with the client's own update in it where the packet holds one."""
    tensors = packet.tensors
    if "changed" in tensors:
        params = {name: memory[f"theta/{name}"].clone() for name in task.shapes}
        _put(params, task, cut, tensors["down"], tensors["changed"])
    else:
        params = {name: tensors[name] for name in task.shapes}
    if "values" in tensors:
        params = {name: t.clone() for name, t in params.items()}
        _put(params, task, cut, tensors["values"], tensors["touched"])
    return params


def _put(params: Params, task: Task, cut: Cut, values: Tensor, parts: Tensor) -> None:
    """Write the values of some parts into ``params``."""
    for region, value in unpack(values, cut, unpack_bits(parts, cut.parts), task.shapes):
        region.put_(params[region.name], value)
