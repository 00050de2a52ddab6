"""How layers with weights read and write spaces. Each function reads one call of one module."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fedsparse.sparse.reader import NORMS, Act, Reader, UncutError, Value, tensors_of
from fedsparse.sparse.spaces import Axis, Counter, CutTensor, Gated

_CONVS = (nn.Conv1d, nn.Conv2d)
WRITERS = (*_CONVS, nn.Linear, nn.Embedding, nn.RNNBase)
_STACKED = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}  # gates in a weight
Layer = Callable[[Reader, fx.Node, str, Any], Value]


def source_of(reader: Reader, node: fx.Node) -> Act | None:
    """What a layer with one input reads."""
    inputs = node.all_input_nodes
    if len(inputs) != 1 or len(node.args) + len(node.kwargs) != 1:
        raise UncutError("with more than one input")
    value = reader.values[inputs[0]]
    if isinstance(value, tuple):
        raise UncutError
    return value


def convolution(reader: Reader, node: fx.Node, name: str, module: nn.Conv1d | nn.Conv2d) -> Value:
    source, shape = source_of(reader, node), reader.shapes[node]
    if len(shape) != module.weight.ndim or (source is not None and source.dim != 1):
        raise UncutError("which is applied along channels")
    positions = math.prod(shape[2:])
    if module.groups > 1:
        return _depthwise(reader, node, name, module, source, positions)
    return _dense(reader, node, name, module, source, 1, positions)


def linear(reader: Reader, node: fx.Node, name: str, module: nn.Linear) -> Value:
    source, shape = source_of(reader, node), reader.shapes[node]
    if source is not None and source.trailing:
        raise UncutError("which is applied along another axis than that of the channels")
    return _dense(reader, node, name, module, source, len(shape) - 1, math.prod(shape[:-1]))


def _dense(
    reader: Reader, node: fx.Node, name: str, module: Any, source: Act | None, dim: int, positions: int
) -> Value:
    """Rows are outputs, columns inputs."""
    out = reader.again(name, source)
    if out is None:
        out = reader.new(name, len(module.weight))
    rows, cols = Axis(out), None if source is None else source.axis
    tensors = [
        replace(t, axes=(rows, cols), owner=0, uses=positions)
        if t.name == f"{name}.weight"
        else replace(t, axes=(rows, None), owner=0)
        for t in tensors_of(name, module)
    ]
    reader.record(name, source, out, tensors)
    act = Act(out, dim, reader.shapes[node])
    reader.gate(node, name, act)
    return act


def _depthwise(reader: Reader, node: fx.Node, name: str, module: Any, source: Act | None, positions: int) -> Value:
    """Its channels follow the layer before."""
    if not module.groups == module.in_channels == module.out_channels:
        raise UncutError("a grouped convolution")
    reader.again(name, source)
    if source is None:
        return None
    if (source.repeats, source.span) != (1, 1):
        raise UncutError("which reads a flattened input")
    if name not in reader.layers:
        reader.counters.append(Counter(name, "groups", source.space))
    reader.record(name, source, source.space, _vectors(name, module, source.axis, positions))
    act = replace(source, shape=reader.shapes[node])
    reader.gate(node, name, act)
    return act


def _vectors(name: str, module: nn.Module, axis: Axis, uses: int) -> list[CutTensor]:
    """Tensors with a row for each unit."""
    return [
        replace(t, axes=(axis, None), owner=0, uses=uses if t.name == f"{name}.weight" else 0)
        for t in tensors_of(name, module)
    ]


def embedding(reader: Reader, node: fx.Node, name: str, module: nn.Embedding) -> Value:
    """Cut by columns, so that every token keeps its row."""
    if module.max_norm is not None or module.sparse:
        raise UncutError("with max_norm or sparse gradients")
    out = reader.again(name, source_of(reader, node))
    if out is None:
        out = reader.new(name, module.embedding_dim)
    tensors = [replace(t, axes=(None, Axis(out)), owner=1) for t in tensors_of(name, module)]
    reader.record(name, None, out, tensors)
    act = Act(out, len(reader.shapes[node]) - 1, reader.shapes[node])
    reader.gate(node, name, act)
    return act


def recurrent(reader: Reader, node: fx.Node, name: str, module: nn.RNNBase) -> Value:
    """All layers of a module share one space, for torch runs them with one hidden size."""
    source, (states, _) = source_of(reader, node), reader.shapes[node]
    if module.bidirectional or module.proj_size or (source is not None and source.trailing):
        raise UncutError("bidirectional, with projections or read along another axis than that of the features")
    new = name not in reader.layers
    out = reader.again(name, source)
    if out is None:
        out = reader.new(name, module.hidden_size)
    steps = math.prod(states[:-1])
    tensors = [_recurrent_tensor(t, module, out, source, steps) for t in tensors_of(name, module)]
    if new:
        reader.counters.append(Counter(name, "hidden_size", out))
        if source is not None:
            reader.counters.append(Counter(name, "input_size", source.space, source.repeats * source.span))
        reader.weights_gated += [Gated(t.name, t.axes[0], len(t.shape) - 1) for t in tensors if t.axes[0] is not None]
    reader.record(name, source, out, tensors)
    return _followed(reader.shapes[node], out)


def _recurrent_tensor(tensor: CutTensor, module: nn.RNNBase, out: int, source: Act | None, steps: int) -> CutTensor:
    """Rows: the units, once for each stacked gate; columns: the units or the inputs."""
    rows, cols = Axis(out, repeats=_STACKED[module.mode]), Axis(out)
    key = tensor.name.rpartition(".")[2]
    if key.startswith("bias"):
        return replace(tensor, axes=(rows, None), owner=0)
    if key == "weight_ih_l0":
        return replace(tensor, axes=(rows, None if source is None else source.axis), owner=0, uses=steps)
    return replace(tensor, axes=(rows, cols), owner=0, uses=steps)


def _followed(shapes: Any, space: int) -> Value:
    """A recurrent layer's outputs: hidden units are the last axis of all of them."""
    if isinstance(shapes, list):
        return tuple(_followed(part, space) for part in shapes)
    return Act(space, len(shapes) - 1, shapes)


def norm(reader: Reader, node: fx.Node, name: str, module: nn.Module) -> Value:
    source = source_of(reader, node)
    if source is None:
        return None
    if source.dim != 1:
        raise UncutError("which normalizes another axis than that of the channels")
    reader.again(name, source)
    if isinstance(module, nn.GroupNorm):
        _whole_groups(reader, name, module, source)
    reader.record(name, source, source.space, _vectors(name, module, source.axis, 0))
    reader.scale(name, source)
    return source


def _whole_groups(reader: Reader, name: str, module: nn.GroupNorm, source: Act) -> None:
    """A group norm's groups are kept or dropped as a whole."""
    if (source.repeats, source.span) != (1, 1):
        raise UncutError("which reads a flattened input")
    per = module.num_channels // module.num_groups
    reader.bind(source.space, per)
    if name not in reader.layers:
        reader.counters.append(Counter(name, "num_groups", source.space, per=per))


LAYERS: tuple[tuple[Any, Layer], ...] = (
    (_CONVS, convolution),
    (nn.Linear, linear),
    (nn.Embedding, embedding),
    (nn.RNNBase, recurrent),
    (NORMS, norm),
)
