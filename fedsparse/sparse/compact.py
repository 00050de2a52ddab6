"""A model of which each batch uses a part: lazy SGD on compact tensors, forward passes with smaller layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.sparse.attention import attend
from fedsparse.sparse.channels import Params, Selection, gather, scatter_
from fedsparse.sparse.codec import pack, unpack
from fedsparse.sparse.cut import Bools, Working
from fedsparse.sparse.pooling import quick_pools
from fedsparse.steps import clip_, step_

if TYPE_CHECKING:
    from fedsparse.sparse.blocks import GroupCut
    from fedsparse.task import Task


class CompactModel(Working):
    """Holds a model's tensors and the compact tensors of the blocks in use; tensors kept whole exist once.

    With ``train`` it owns a copy of the tensors, else it reads them (in evaluation mode only: batch norm would write
    its statistics), ``leaves`` is empty and nothing is touched. Momentum of weights that leave the part in use waits
    until they come back.
    """

    def __init__(self, cut: GroupCut, task: Task, params: Mapping[str, Tensor], *, train: bool) -> None:
        placed = task.placed(params)
        self.params = {name: t.detach().clone() if train else t.detach() for name, t in placed.items()}
        self.touched = np.zeros(cut.parts, bool)
        self.leaves: list[Tensor] = []
        self._cut = cut
        self._task = task
        self._train = train
        self._selection: Selection | None = None
        self._counts: list[tuple[str, str, int]] = []
        self._tensors: Params = {}  # the compact ones, in the order of ``params``
        self._velocity: list[Tensor] = []
        self._momentum: Params = {}  # of all trainable tensors, whole; made when the kept set first changes

    def use(self, kept: Bools) -> None:
        if self._selection is not None and np.array_equal(kept, self._selection.kept):
            return
        self.flush()
        self._set_aside()
        self._select(kept)
        assert self._selection is not None
        self._tensors = gather(self.params, self._selection.regions)
        if self._train:
            self.leaves = [self._tensors[name].requires_grad_() for name in self._task.trainable]
            self._velocity = list(gather(self._momentum, self._selection.regions).values())
            self.touched |= self._cut.touched(kept)

    def _select(self, kept: Bools) -> None:
        self._selection = self._cut.select(kept)
        self._counts = self._cut.counts(kept)

    def forward(self, gates: Tensor, x: Tensor) -> Tensor:
        assert self._selection is not None, "use() comes first"
        entries = gates.to(x.device).index_select(0, self._selection.gate_index.to(x.device))
        parts = torch.split(entries, list(self._selection.gate_sizes))
        scale = dict(zip(self._cut.scaled_axes, parts, strict=True))
        tensors = dict(self._tensors)
        for gated in (*self._cut.weights_gated, *chain(*self._cut.folded.values())):
            tensors[gated.name] = tensors[gated.name] * scale[gated.axis].view(-1, *[1] * gated.trailing)
        outputs = (g for g in self._cut.outputs if g.name not in self._cut.folded)
        hooks = {g.name: _Scaling(scale[g.axis].view(-1, *[1] * g.trailing)) for g in outputs}
        heads = {g.name: scale[g.axis].view(-1, 1, 1) for g in self._cut.attentions}
        model = self._task.model
        with (
            _own_after(model, self._cut.recurrent),
            self._task.bound(tensors),
            _told(model, self._counts),
            _hooked(model, hooks),
            _by_heads(model, heads),
            quick_pools(model),
        ):
            logits: Tensor = model(x)
        return logits

    def step(self, grads: tuple[Tensor, ...], *, lr: float, momentum: float, weight_decay: float, clip: float) -> None:
        with torch.no_grad():
            clip_(grads, clip)
            step_(self.leaves, grads, self._velocity, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def flush(self) -> None:
        if self._selection is None or not self._train:
            return
        scatter_(self.params, self._selection.regions, self._tensors)

    def _set_aside(self) -> None:
        """Keep the momentum of the part in use until that comes back."""
        if self._selection is None or not self._velocity:
            return
        trainable = self._task.trainable
        self._momentum = self._momentum or {name: torch.zeros_like(self.params[name]) for name in trainable}
        scatter_(self._momentum, self._selection.regions, dict(zip(trainable, self._velocity, strict=True)))

    def values(self) -> Tensor:
        self.flush()
        return pack(self.params, self._cut, self.touched).cpu()


class _KeptModel(CompactModel):
    """Holds the compact tensors of one kept set, as views of the one buffer that :meth:`values` gives, and no others.

    The buffer is written to in training.
    """

    def __init__(self, cut: GroupCut, task: Task, values: Tensor, kept: Bools) -> None:
        super().__init__(cut, task, {}, train=True)
        self._buffer = values.detach().clone().to(task.device)
        self.touched = cut.touched(kept)
        parts = {region.name: part for region, part in unpack(self._buffer, cut, self.touched, task.shapes)}
        self._tensors = {name: parts[name] for name in task.shapes if name in parts}
        self.params = {name: t.detach() for name, t in self._tensors.items()}
        self.leaves = [self._tensors[name].requires_grad_() for name in task.trainable]
        self._select(kept)

    def use(self, kept: Bools) -> None:
        assert self._selection is not None
        if not np.array_equal(kept, self._selection.kept):
            raise ValueError("only the values of one kept set are there, and another one is asked for")

    def flush(self) -> None:
        return

    def values(self) -> Tensor:
        return self._buffer.cpu()


def kept_values(cut: GroupCut, task: Task, values: Tensor, kept: Bools) -> CompactModel:
    """The model of which only the values of one kept set are there."""
    return _KeptModel(cut, task, values, kept)


class _Scaling:
    """Forward hook that multiplies a module's outputs by the gates of their units."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * self.scale


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """The model with forward hooks, by module, for the length of the block."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _by_heads(model: nn.Module, heads: Mapping[str, Tensor]) -> Iterator[None]:
    """The model whose attention modules compute with the kept heads, for the length of the block."""
    modules = {model.get_submodule(name): scale for name, scale in heads.items()}
    for module, scale in modules.items():
        vars(module)["forward"] = partial(attend, module, scale)
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


@contextmanager
def _own_after(model: nn.Module, recurrent: tuple[str, ...]) -> Iterator[None]:
    """The recurrent modules list their own weights again after the block: they note those of each call."""
    try:
        yield
    finally:
        for module in map(model.get_submodule, recurrent):
            for key, parameter in module._parameters.items():
                setattr(module, key, parameter)


@contextmanager
def _told(model: nn.Module, counts: list[tuple[str, str, int]]) -> Iterator[None]:
    """The model whose modules have the (module, attribute, value) ``counts``, for the length of the block."""
    own = []
    for name, attribute, value in counts:
        module = model.get_submodule(name)
        own.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, value in own:
            setattr(module, attribute, value)
