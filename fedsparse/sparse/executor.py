"""Runs a network over kept weights only: one forward and one backward pass over its whole program.

What is kept between the two passes is the output of each convolution and pool, once. Norms and ReLUs are applied when a
value is read; sums and flattenings are computed again in the backward pass when they are first needed. Buffers are
reused from layer to layer and from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsparse.errors import UserError
from fedsparse.sparse import SEARCH_PIECE, kernels
from fedsparse.sparse.masks import Mask, check_mask, spread
from fedsparse.sparse.program import Op, Program, Value

Array = np.ndarray[Any, Any]
Show = Callable[[int, Tensor], None]
_CACHED = 1 << 18  # floats of a tile that stay in the cache
_NONE4 = np.empty((0, 0, 0, 0), np.float32)
_NO_LINES = np.empty((3, 0, 0), np.float32)
_NO_SUMS = np.empty((2, 0, 0))
_NONE1 = np.empty(0, np.float32)


class Buffers:
    """Arrays of float32 that are handed out and taken back; one that several hold comes back with the last."""

    def __init__(self) -> None:
        self._free: dict[int, list[Array]] = {}
        self._holders: dict[int, int] = {}
        self._batch = 0

    def serve(self, batch: int) -> None:
        """For passes over batches of this size: what fits other sizes goes, or a smaller last batch would double it."""
        if batch != self._batch:
            self._free.clear()
            self._batch = batch

    def take(self, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape))
        if not self._free.get(size):
            self._make_room(size)
            self._free[size] = [np.empty(size, np.float32)]
        array = self._free[size].pop().reshape(shape)
        self._holders[_address(array)] = 1
        return array

    def _make_room(self, size: int) -> None:
        """Let go of free arrays of other sizes, so that a new one adds nothing to the peak."""
        for other in sorted(self._free, reverse=True):
            while self._free[other] and size > 0:
                size -= self._free[other].pop().size

    def share(self, array: Array) -> Array:
        self._holders[_address(array)] += 1
        return array

    def shared(self, array: Array) -> bool:
        return self._holders[_address(array)] > 1

    def give(self, array: Array) -> None:
        at = _address(array)
        self._holders[at] -= 1
        if not self._holders[at]:
            del self._holders[at]
            self._free.setdefault(array.size, []).append(array.reshape(-1))


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


@dataclass(frozen=True)
class Operand:
    """A value as kernels read it: act(raw * scale + shift), raw (channels, n, h, w), the others (channels, n)."""

    raw: Array
    scale: Array
    shift: Array
    relu: bool

    def parts(self, layout: Layout | None = None) -> tuple[Array, Array, Array, bool]:
        if layout is None:
            return self.raw, self.scale, self.shift, self.relu
        return layout.view(self.raw), layout.factors(self.scale), layout.factors(self.shift), self.relu


@dataclass(frozen=True)
class Layout:
    """How a convolution lies in memory.

    images: the batch; for a linear layer, whose examples lie side by side, these are the columns of so many images of
    height 1, which gives long runs.
    """

    geometry: kernels.Geometry
    images: int

    def view(self, array: Array) -> Array:
        """(channels, n, h, w) in this layout."""
        if not array.size:
            return array
        c, n = array.shape[:2]
        return array if n == self.images else array.reshape(c, self.images, 1, n // self.images)

    def factors(self, array: Array) -> Array:
        """(..., n) factors, equal for all examples where there are fewer images than those."""
        return np.ascontiguousarray(array[..., : self.images])


@dataclass
class _Statistics:
    """What a norm did in this pass: mean and 1 / deviation, (channels, 1) for batch norm or (channels, n); fixed: they
    do not depend on the batch."""

    mean: Array
    inverse: Array
    fixed: bool


class Executor:
    """A program with a mask and a representation for each layer; keeps buffers, no parameters.

    dense: paths of the layers that are computed as masked dense ones. A layer without a mask keeps all its weights.
    """

    def __init__(self, program: Program, mask: Mask, dense: frozenset[str] = frozenset()) -> None:
        check_mask(mask, {f"{op.name}.weight": program.shape(op) for op in program.ops if op.kind == "conv"})
        self.program = program
        self.mask = mask
        self.dense = dense
        self.buffers = Buffers()
        self.parameters = tuple(_parameter_names(program))
        self._layouts: dict[tuple[int, int, int], Layout] = {}
        self._positions: dict[str, Array] = {}

    def logits(
        self, params: Mapping[str, Tensor], x: Tensor, *, train: bool, shows: Mapping[str, Show] | None = None
    ) -> Tensor:
        """Logits (n, classes) of ``x`` (n, *input_shape); gradients flow to ``params``.

        train: norms use the batch and update the running statistics in ``params`` in place. shows: by the path of a
        layer, what gets its dense weight gradient in the backward pass, as in :meth:`search`.
        """
        if x.requires_grad:
            raise UserError("the sparse executor gives no gradient of the input; use the dense representation for that")
        if not len(x):
            return x.new_zeros((0, self.program.values[self.program.output].channels))
        leaves = [params[name] for name in self.parameters]
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            out: Tensor = _Function.apply(self, params, x, train, shows, *leaves)  # type: ignore[no-untyped-call]
            return out
        with torch.no_grad():
            run = Run(self, params, x, train=train, keep=False)
            return run.forward()

    def search(
        self,
        params: Mapping[str, Tensor],
        x: Tensor,
        d_logits: Callable[[Tensor], Tensor],
        shows: Mapping[str, Show],
    ) -> None:
        """Show the dense weight gradients of the layers ``shows`` on one batch in training mode, some rows at a time.

        d_logits: from logits to the gradient of the loss. A show gets the first flat position and the gradients from
        there on, in ascending order. Running statistics in ``params`` are updated in place.
        """
        run = Run(self, params, x, train=True, shows=shows, weights=False)
        run.backward(d_logits(run.forward()))

    def layout(self, number: int, n: int, outputs: int = 0) -> Layout:
        """The layout of the number-th operation for ``n`` examples; ``outputs``: of its first channels only."""
        key = (number, n, outputs)
        if key not in self._layouts:
            op = self.program.ops[number]
            source, target = self.program.values[op.sources[0]], self.program.values[op.target]
            size, images = (source.height, source.width), n
            if _is_vector_product(op, source, target):
                images = _images_of_vectors(n, source.channels)
                size = (1, n // images)
            geometry = kernels.geometry(
                source.channels,
                size,
                outputs or target.channels,
                op.kernel,
                stride=op.stride,
                padding=op.padding,
                dilation=op.dilation,
                batch=images,
            )
            self._layouts[key] = Layout(geometry, images)
        return self._layouts[key]

    def positions(self, name: str, size: int) -> Array:
        """The kept positions of the ``size`` weights of a layer, all of them where it has no mask."""
        if name not in self._positions:
            self._positions[name] = _array(self.mask[name]) if name in self.mask else np.arange(size, dtype=np.int32)
        return self._positions[name]


class Run:
    """One forward pass over a batch, and the backward pass to it.

    With ``keep`` false values go as soon as they are read; with ``weights`` false the backward pass leaves out the
    gradients of dense layers' weights.
    """

    def __init__(
        self,
        executor: Executor,
        params: Mapping[str, Tensor],
        x: Tensor,
        *,
        train: bool,
        keep: bool = True,
        shows: Mapping[str, Show] | None = None,
        weights: bool = True,
    ) -> None:
        self.shows = shows or {}
        self.weights = weights
        self.executor = executor
        self.program = executor.program
        self.buffers = executor.buffers
        self.params = params
        self.train = train
        self.keep = keep
        self.n = len(x)
        if tuple(x.shape[1:]) != self.program.input_shape or x.dtype != torch.float32:
            shape, wanted = tuple(x.shape[1:]), self.program.input_shape
            raise UserError(f"inputs are {x.dtype} of shape {shape} an example, torch.float32 of {wanted} is wanted")
        self.buffers.serve(self.n)
        count = len(self.program.values)
        self.raw: list[Array | None] = [None] * count
        self.scales: list[tuple[Array, Array]] = [(_NONE1, _NONE1)] * count
        self.statistics: list[_Statistics | None] = [None] * count
        self.unread = list(self.program.uses)
        self.maker = {op.target: number for number, op in enumerate(self.program.ops)}
        value = self.program.values[0]
        first = self.buffers.take((value.channels, self.n, value.height, value.width))
        first[...] = _array(x).reshape(self.n, value.channels, value.height, value.width).transpose(1, 0, 2, 3)
        self.raw[0] = first
        self._normalise(0, None)

    # --- forward

    def advance(self) -> None:
        """Compute all values."""
        for number, op in enumerate(self.program.ops):
            sums = self._make(number)
            self._normalise(op.target, sums)
            for source in op.sources:
                self.unread[source] -= 1
                if not self.unread[source] and (not self.keep or self._again(source)):
                    self._drop(source)

    def forward(self) -> Tensor:
        """The logits, (n, classes)."""
        self.advance()
        out = self._operand(self.program.output)
        logits = np.empty((out.raw.shape[0], self.n, 1, 1), np.float32)
        kernels.values_of(*out.parts(), logits)
        if not self.keep:
            self.close()
        return torch.from_numpy(logits.reshape(logits.shape[:2])).t().contiguous()

    def _again(self, value: int) -> bool:
        """Whether a value is computed again when the backward pass needs it."""
        return value in self.maker and self.program.ops[self.maker[value]].kind in ("add", "flatten")

    def _make(self, number: int) -> Array | None:
        """Compute a value; returns the sums for its norm where the operation gave them."""
        op = self.program.ops[number]
        value = self.program.values[op.target]
        out = self.buffers.take((value.channels, self.n, value.height, value.width))
        operands = [self._operand(source) for source in op.sources]
        sums = None
        if op.kind == "conv":
            sums = self._convolve(number, op, operands[0], out)
        elif op.kind == "add":
            kernels.add(*operands[0].parts(), *operands[1].parts(), out)
        elif op.kind == "max":
            kernels.max_pool(*operands[0].parts(), _window(op), out)
        else:
            self._rearrange(op, operands[0], out)
        self.raw[op.target] = out
        return sums

    def _rearrange(self, op: Op, operand: Operand, out: Array) -> None:
        """The mean over windows, or features in the place of channels and positions."""
        read = self.buffers.take(operand.raw.shape)
        kernels.values_of(*operand.parts(), read)
        if op.kind == "mean":
            np.mean(_windows(read, op), axis=(3, 5), out=out)
        else:
            c, n, h, w = read.shape
            out.reshape(c, h, w, n)[...] = read.transpose(0, 2, 3, 1)
        self.buffers.give(read)

    def _convolve(self, number: int, op: Op, operand: Operand, out: Array) -> Array | None:
        weight, bias = self._weight(op)
        if op.name in self.executor.dense:
            self._convolve_dense(op, operand, out)
            if len(bias):
                out += bias[:, None, None, None]
            return None
        layout = self.executor.layout(number, self.n)
        sums = np.empty((2, len(out), layout.images)) if self._needs_sums(op.target) else _NO_SUMS
        positions = self.executor.positions(f"{op.name}.weight", weight.size)
        parts = operand.parts(layout)
        kernels.conv_forward(*parts, positions, weight, bias, layout.geometry, layout.view(out), sums)
        return sums if sums.size else None

    def _convolve_dense(self, op: Op, operand: Operand, out: Array) -> None:
        weight = self._dense_weight(op)
        if _is_product(op):
            torch.mm(weight.flatten(1), self._matrix(operand), out=torch.from_numpy(out).flatten(1))
        else:
            y = torch.conv2d(self._images(operand), weight, None, op.stride, op.padding, op.dilation)
            out[...] = _array(y.transpose(0, 1))

    def _matrix(self, operand: Operand) -> Tensor:
        """An operand as (channels, n * h * w)."""
        out = np.empty(operand.raw.shape, np.float32)
        kernels.values_of(*operand.parts(), out)
        return torch.from_numpy(out).flatten(1)

    def _images(self, operand: Operand) -> Tensor:
        """An operand as a dense layer reads it, (n, channels, h, w).

        In the default order: convolution_backward of torch 2.13 corrupts the heap on small images in channels-last.
        """
        c, n, h, w = operand.raw.shape
        out = np.empty((n, c, h, w), np.float32)
        kernels.values_of(*operand.parts(), out.transpose(1, 0, 2, 3))
        return torch.from_numpy(out)

    def _weight(self, op: Op) -> tuple[Array, Array]:
        """A layer's flat (kept) weights and its bias. Raises UserError where they do not fit the mask or the layer."""
        name = f"{op.name}.weight"
        weight = _array(self.params[name]).reshape(-1)
        wanted = len(self.executor.mask[name]) if name in self.executor.mask else math.prod(self.program.shape(op))
        if weight.size != wanted or weight.dtype != np.float32:
            raise UserError(f"{name} has {weight.size} {weight.dtype} values, {wanted} float32 values are wanted")
        bias = _array(self.params[f"{op.name}.bias"]) if op.bias else _NONE1
        outputs = self.program.values[op.target].channels
        if op.bias and (bias.size != outputs or bias.dtype != np.float32):
            raise UserError(f"{op.name}.bias has {bias.size} {bias.dtype} values, {outputs} float32 values are wanted")
        return weight, bias

    def _dense_weight(self, op: Op) -> Tensor:
        """A layer's weight as a dense layer reads it, (outputs, inputs, kernel height, kernel width)."""
        name = f"{op.name}.weight"
        shape = self.program.shape(op)
        weight = self.params[name].detach()
        return spread(weight, self.executor.mask[name], shape) if name in self.executor.mask else weight.view(shape)

    # --- norms

    def _needs_sums(self, value: int) -> bool:
        norm = self.program.values[value].norm
        return norm is not None and (self.train or norm.groups > 0)

    def _normalise(self, value: int, sums: Array | None) -> None:
        """Set a value's scale and shift: what its norm does in this pass."""
        v, raw = self.program.values[value], self.raw[value]
        assert raw is not None
        if v.norm is None:
            self.scales[value] = np.ones(raw.shape[:2], np.float32), np.zeros(raw.shape[:2], np.float32)
            return
        if sums is None and self._needs_sums(value):
            sums = np.empty((2, *raw.shape[:2]))
            kernels.moments(raw, raw, sums)
        statistics = self._group(v, sums) if v.norm.groups else self._batch(v, sums)
        weight, bias = self._affine(v)
        whole = (v.channels, self.n)
        scale = np.ascontiguousarray(np.broadcast_to(weight * statistics.inverse, whole), np.float32)
        shift = bias.astype(np.float32) - statistics.mean.astype(np.float32) * scale  # rounded as in the kernels
        self.statistics[value] = statistics
        self.scales[value] = scale, shift

    def _affine(self, v: Value) -> tuple[Array, Array]:
        """A norm's weight and bias, (channels, 1) float64."""
        assert v.norm is not None
        if not v.norm.affine:
            return np.ones((v.channels, 1)), np.zeros((v.channels, 1))
        weight, bias = (_array(self.params[f"{v.norm.name}.{part}"]) for part in ("weight", "bias"))
        return weight.astype(np.float64)[:, None], bias.astype(np.float64)[:, None]

    def _batch(self, v: Value, sums: Array | None) -> _Statistics:
        """Batch norm: over examples and positions, or from the running statistics."""
        assert v.norm is not None
        running_mean, running_var = (self.params[f"{v.norm.name}.running_{part}"] for part in ("mean", "var"))
        if sums is None:
            mean, var = (_array(t).astype(np.float64) for t in (running_mean, running_var))
            return _Statistics(mean[:, None], 1 / np.sqrt(var + v.norm.eps)[:, None], fixed=True)
        count = self.n * v.height * v.width
        if count < 2:
            raise UserError(f"batch norm {v.norm.name} needs more than one value a channel in training")
        mean = sums[0].sum(1) / count
        var = np.maximum(sums[1].sum(1) / count - mean * mean, 0)
        for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            running.mul_(1 - v.norm.momentum).add_(torch.from_numpy(new).float(), alpha=v.norm.momentum)
        return _Statistics(mean[:, None], 1 / np.sqrt(var + v.norm.eps)[:, None], fixed=False)

    def _group(self, v: Value, sums: Array | None) -> _Statistics:
        """Group norm: over the channels of a group and the positions, for each example."""
        assert v.norm is not None and sums is not None
        count = v.channels // v.norm.groups * v.height * v.width
        first, second = (_by_group(s, v.norm.groups) / count for s in sums)
        inverse = 1 / np.sqrt(np.maximum(second - first * first, 0) + v.norm.eps)
        return _Statistics(first, inverse, fixed=False)

    def _norm_backward(self, value: int, sums: Array, grads: dict[str, Array]) -> Array:
        """From the sums of the gradient behind a norm (and of its products with the norm's input): the gradients of
        the norm's parameters, and (3, channels, n) factors a, b, d with d_raw = a * grad + b * raw + d."""
        v, s = self.program.values[value], self.statistics[value]
        assert v.norm is not None and s is not None
        weight, _ = self._affine(v)
        by_bias = sums[0]  # (channels, n)
        by_weight = s.inverse * (sums[1] - s.mean * sums[0])
        if v.norm.affine:
            grads[f"{v.norm.name}.weight"] = by_weight.sum(1).astype(np.float32)
            grads[f"{v.norm.name}.bias"] = by_bias.sum(1).astype(np.float32)
        lines = np.zeros((3, v.channels, self.n))
        lines[0] = weight * s.inverse
        if not s.fixed:
            if v.norm.groups:
                count = v.channels // v.norm.groups * v.height * v.width
                level, slope = (_by_group(weight * part, v.norm.groups) / count for part in (by_bias, by_weight))
            else:
                count = self.n * v.height * v.width
                level, slope = (weight * part.sum(1, keepdims=True) / count for part in (by_bias, by_weight))
            lines[1] = -slope * s.inverse**2
            lines[2] = -level * s.inverse + slope * s.inverse**2 * s.mean
        return lines.astype(np.float32)

    # --- values

    def _operand(self, value: int) -> Operand:
        """A value to read, computed again if it is gone."""
        raw = self.raw[value]
        if raw is None:
            self._make(self.maker[value])
            raw = self.raw[value]
        assert raw is not None
        scale, shift = self.scales[value]
        return Operand(raw, scale, shift, self.program.values[value].relu)

    def _drop(self, value: int) -> None:
        raw = self.raw[value]
        if raw is not None:
            self.buffers.give(raw)
            self.raw[value] = None

    def close(self) -> None:
        """Give all buffers back."""
        for value in range(len(self.raw)):
            self._drop(value)

    # --- backward

    def backward(self, d_logits: Tensor) -> dict[str, Array]:
        """The gradients of all parameters, by name, from that of the logits (n, classes)."""
        return self.back_from(_array(d_logits.t()).reshape(d_logits.shape[1], self.n, 1, 1))

    def back_from(self, d_output: Array) -> dict[str, Array]:
        """The same from the gradient of the output value, (channels, n, height, width)."""
        grads: dict[str, Array] = {}
        flow = _Flow(self)
        first = self.buffers.take(d_output.shape)
        first[...] = d_output
        flow.uses[self.program.output] += 1
        flow.give(self.program.output, first)
        for number in reversed(range(len(self.program.ops))):
            op = self.program.ops[number]
            self._back(number, op, flow, grads)
            flow.drop(op.target)
            self._drop(op.target)
        if self.statistics[0] is not None:
            self._norm_backward(0, flow.sums[0], grads)
        flow.drop(0)
        self.close()
        return grads

    def _back(self, number: int, op: Op, flow: _Flow, grads: dict[str, Array]) -> None:
        norm = self.program.values[op.target].norm
        lines = self._norm_backward(op.target, flow.sums[op.target], grads) if norm else _NO_LINES
        if op.kind == "conv":
            self._back_conv(number, op, flow, lines, grads)
            return
        grad = flow.after_norm(op.target, lines)
        source = op.sources[0]
        if op.kind == "add":
            for one in op.sources:
                flow.give(one, self.buffers.share(grad))
        elif flow.wanted(source):
            operand = self._operand(source)
            out = self.buffers.take(operand.raw.shape)
            active = op.kind == "max"  # the ReLU's derivative is in its gradient
            if op.kind == "max":
                kernels.max_pool_backward(*operand.parts(), _window(op), self._operand(op.target).raw, grad, out)
            elif op.kind == "mean":
                out[:] = 0
                _windows(out, op)[...] = grad[:, :, :, None, :, None] / (op.kernel[0] * op.kernel[1])
            else:
                c, n, h, w = out.shape
                out[...] = grad.reshape(c, h, w, n).transpose(0, 3, 1, 2)
            flow.give(source, out, active=active)
        self.buffers.give(grad)

    def _show(self, number: int, op: Op, flow: _Flow, lines: Array, show: Show) -> None:
        """Some rows at a time, so that the gradient of the whole weight never exists."""
        operand = self._operand(op.sources[0])
        grad, out = flow.grad(op.target), self._operand(op.target).raw if lines.size else _NONE4
        cells = operand.raw.shape[0] * op.kernel[0] * op.kernel[1]
        step = max(1, SEARCH_PIECE // cells)
        for start in range(0, len(grad), step):
            part = slice(start, start + step)
            rows = np.empty(len(grad[part]) * cells, np.float32)
            layout = self.executor.layout(number, self.n, outputs=len(grad[part]))
            kernels.conv_backward(
                *operand.parts(layout),
                np.arange(len(rows), dtype=np.int32),
                np.zeros_like(rows),
                layout.view(grad[part]),
                layout.view(out[part]),
                layout.factors(lines[:, part]),
                layout.geometry,
                rows,
                _NONE1,
                _NONE4,
                _NONE4,
                False,
                _NO_SUMS,
            )
            show(start * cells, torch.from_numpy(rows))

    def _back_conv(self, number: int, op: Op, flow: _Flow, lines: Array, grads: dict[str, Array]) -> None:
        if op.name in self.shows:
            self._show(number, op, flow, lines, self.shows[op.name])
        if op.name in self.executor.dense:
            self._back_dense(op, flow, lines, grads)
            return
        weight, bias = self._weight(op)
        source = op.sources[0]
        operand = self._operand(source)
        out = self._operand(op.target).raw if lines.size else _NONE4
        d_weight, d_bias = np.empty_like(weight), np.empty_like(bias)
        layout = self.executor.layout(number, self.n)
        target, before, last, sums = flow.open(source, layout.images)
        kernels.conv_backward(
            *operand.parts(layout),
            self.executor.positions(f"{op.name}.weight", weight.size),
            weight,
            layout.view(flow.grad(op.target)),
            layout.view(out),
            layout.factors(lines),
            layout.geometry,
            d_weight,
            d_bias,
            layout.view(before),
            layout.view(target),
            last,
            sums,
        )
        flow.close(source, target, before)
        self._note(op, d_weight, d_bias, grads)

    def _back_dense(self, op: Op, flow: _Flow, lines: Array, grads: dict[str, Array]) -> None:
        source = op.sources[0]
        grad, operand, weight = flow.after_norm(op.target, lines), self._operand(source), self._dense_weight(op)
        d_source = self.buffers.take(operand.raw.shape) if flow.wanted(source) else None
        d_weight: Tensor | None = None
        if _is_product(op):
            dy = torch.from_numpy(grad).flatten(1)
            d_weight = dy @ self._matrix(operand).t() if self.weights else None
            if d_source is not None:
                torch.mm(weight.flatten(1).t(), dy, out=torch.from_numpy(d_source).flatten(1))
        elif self.weights or d_source is not None:
            dy = torch.from_numpy(grad).transpose(0, 1).clone(memory_format=torch.contiguous_format)
            wanted = [d_source is not None, self.weights, False]
            dx, d_weight, _ = torch.ops.aten.convolution_backward(
                dy, self._images(operand), weight, None, op.stride, op.padding, op.dilation, False, (0, 0), 1, wanted
            )
            if d_source is not None:
                d_source[...] = _array(dx.transpose(0, 1))
        if d_weight is not None:
            kept = _array(d_weight.flatten())[self.executor.positions(f"{op.name}.weight", weight.numel())]
            self._note(op, kept, grad.sum((1, 2, 3)) if op.bias else _NONE1, grads)
        self.buffers.give(grad)
        if d_source is not None:
            flow.give(source, d_source)

    def _note(self, op: Op, d_weight: Array, d_bias: Array, grads: dict[str, Array]) -> None:
        name = f"{op.name}.weight"
        grads[name] = d_weight.reshape(self.params[name].shape)
        if op.bias:
            grads[f"{op.name}.bias"] = d_bias


class _Flow:
    """Gradients on their way back: of each value behind its norm and ReLU, until all that read it have given theirs.

    The last giver applies the ReLU's derivative and takes the sums that the norm needs.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.uses = list(run.program.uses)
        self.grads: list[Array | None] = [None] * len(self.uses)
        self.sums: list[Array] = [_NO_SUMS] * len(self.uses)

    def wanted(self, value: int) -> bool:
        """Whether anything trains behind a value: all but the input, unless that has a norm of its own."""
        return value > 0 or self.run.program.values[0].norm is not None

    def grad(self, value: int) -> Array:
        grad = self.grads[value]
        assert grad is not None
        return grad

    def open(self, value: int, images: int) -> tuple[Array, Array, bool, Array]:
        """For a kernel that gives: where to write, what was given before, whether it is the last, where sums go.

        images: for how many parts of the batch sums are taken.
        """
        if not self.wanted(value):
            return _NONE4, _NONE4, False, _NO_SUMS
        self.uses[value] -= 1
        v = self.run.program.values[value]
        last = not self.uses[value] and (v.relu or v.norm is not None)
        shape = (v.channels, self.run.n, v.height, v.width)
        if last:
            self.sums[value] = np.empty((2, v.channels, images))
        before = self.grads[value]
        if before is None:
            return self.run.buffers.take(shape), _NONE4, last, self.sums[value]
        target = self.run.buffers.take(shape) if self.run.buffers.shared(before) else before
        return target, before, last, self.sums[value]

    def close(self, value: int, target: Array, before: Array) -> None:
        """After that kernel: ``target`` holds what was given so far."""
        if not target.size:
            return
        if before.size and before is not target:
            self.run.buffers.give(before)
        self.grads[value] = target

    def give(self, value: int, grad: Array, *, active: bool = False) -> None:
        """A gradient in an array that the caller hands over. active: it is zero where the ReLU is not active."""
        if not self.wanted(value):
            self.run.buffers.give(grad)
            return
        v, first = self.run.program.values[value], self.grads[value] is None
        if first and self.uses[value] > 1:
            self.uses[value] -= 1
            self.grads[value] = grad
            return
        if first and (active or not v.relu):  # nothing to change
            self.uses[value] -= 1
            self.grads[value] = grad
            if v.norm is not None:
                self.sums[value] = np.empty((2, *grad.shape[:2]))
                kernels.moments(grad, self.run._operand(value).raw, self.sums[value])
            return
        target, before, last, sums = self.open(value, self.run.n)
        operand = self.run._operand(value)
        sums = sums if sums.size else np.empty((2, *grad.shape[:2]))
        kernels.finish(grad, before, operand.raw, operand.scale, operand.shift, v.relu and last, target, sums)
        self.run.buffers.give(grad)
        self.close(value, target, before)

    def after_norm(self, value: int, lines: Array) -> Array:
        """The gradient of a value itself, before its norm; the caller gives it back."""
        grad = self.grad(value)
        if not lines.size:
            return self.run.buffers.share(grad)
        out = self.run.buffers.take(grad.shape)
        np.multiply(self.run._operand(value).raw, lines[1][..., None, None], out=out)
        out += lines[0][..., None, None] * grad
        out += lines[2][..., None, None]
        return out

    def drop(self, value: int) -> None:
        grad = self.grads[value]
        if grad is not None:
            self.run.buffers.give(grad)
            self.grads[value] = None


class _Function(torch.autograd.Function):
    """The whole network as one node of torch's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        executor: Executor,
        params: Mapping[str, Tensor],
        x: Tensor,
        train: bool,
        shows: Mapping[str, Show] | None,
        *leaves: Tensor,
    ) -> Tensor:
        run = ctx.run = Run(executor, params, x, train=train, shows=shows)
        return run.forward()

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Any, ...]:
        if ctx.run.raw[0] is None:
            raise RuntimeError("the sparse executor keeps nothing for a second backward pass over the same batch")
        grads = ctx.run.backward(d_logits.contiguous())
        names = ctx.run.executor.parameters
        return (None, None, None, None, None, *(torch.from_numpy(grads[name]) for name in names))


def _parameter_names(program: Program) -> list[str]:
    names = []
    for value in program.values:
        if value.norm is not None and value.norm.affine:
            names += [f"{value.norm.name}.weight", f"{value.norm.name}.bias"]
    for op in program.ops:
        if op.kind == "conv":
            names += [f"{op.name}.weight", f"{op.name}.bias"] if op.bias else [f"{op.name}.weight"]
    return names


def _by_group(values: Array, groups: int) -> Array:
    """Sums over the channels of a group, at each of its channels: (channels, n) to (channels, n)."""
    size = len(values) // groups
    return np.repeat(values.reshape(groups, size, -1).sum(1), size, axis=0)


def _is_vector_product(op: Op, source: Value, target: Value) -> bool:
    """Whether an operation is a linear layer of which all examples may be treated alike."""
    vectors = source.height * source.width * target.height * target.width == 1
    return vectors and _is_product(op) and not any(v.norm is not None and v.norm.groups for v in (source, target))


def _images_of_vectors(n: int, features: int) -> int:
    """The fewest images that ``n`` vectors fill evenly, each small enough for the cache."""
    fits = (t for t in range(1, n + 1) if n % t == 0 and n // t * features <= _CACHED)
    return next(fits, n)


def _is_product(op: Op) -> bool:
    """Whether a convolution is a matrix product over channels."""
    return (op.kernel, op.stride, op.padding) == ((1, 1), (1, 1), (0, 0))


def _windows(array: Array, op: Op) -> Array:
    """A view of (c, n, h, w) as (c, n, rows, kernel height, columns, kernel width): windows that do not overlap."""
    (kh, kw), (c, n, h, w), (sc, sn, sh, sw) = op.kernel, array.shape, array.strides
    shape = (c, n, h // kh, kh, w // kw, kw)
    return np.lib.stride_tricks.as_strided(array, shape, (sc, sn, kh * sh, sh, kw * sw, sw))


def _window(op: Op) -> tuple[int, int, int, int, int, int]:
    return (*op.kernel, *op.stride, *op.padding)


def _array(tensor: Tensor) -> Array:
    """A view of a tensor's memory."""
    array: Array = tensor.detach().contiguous().numpy()
    return array
