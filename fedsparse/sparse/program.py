"""A network as a short program over activations, read from the ``nn.Module`` itself.

Five operations (convolution, sum, two pools, flattening) make values; a value carries the norm and the ReLU that follow
it, which are never stored. A linear layer is a convolution of 1x1 images.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

Pair = tuple[int, int]


class UnsupportedError(Exception):
    """Why a network cannot be run by the sparse executor: one line."""


@dataclass(frozen=True)
class Norm:
    """A norm by its path in the model. groups: 0 for batch norm. affine: it has weight and bias."""

    name: str
    groups: int
    eps: float
    momentum: float
    affine: bool


@dataclass(frozen=True)
class Value:
    """An activation before its norm and ReLU: (channels, n, height, width)."""

    channels: int
    height: int
    width: int
    norm: Norm | None = None
    relu: bool = False


@dataclass(frozen=True)
class Op:
    """kind: "conv", "add", "max", "mean" or "flatten"; sources and target: numbers of values.

    name: path of a convolution or linear layer, bias: whether it has one; kernel, stride, padding, dilation: (height,
    width).
    """

    kind: str
    sources: tuple[int, ...]
    target: int
    name: str = ""
    bias: bool = False
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


@dataclass(frozen=True)
class Program:
    """values[0] is the input, of ``input_shape`` an example; ``output`` the logits. uses: how many operations read a
    value."""

    input_shape: tuple[int, ...]
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    output: int
    uses: tuple[int, ...]

    def shape(self, op: Op) -> tuple[int, int, int, int]:
        """Of a convolution's weight: (outputs, inputs, kernel height, kernel width)."""
        return (self.values[op.target].channels, self.values[op.sources[0]].channels, *op.kernel)


def read_program(model: nn.Module, input_shape: tuple[int, ...]) -> Program:
    """The program of ``model`` on examples of ``input_shape``. Raises UnsupportedError with the reason."""
    if sum(1 for _ in model.named_parameters(remove_duplicate=False)) > sum(1 for _ in model.parameters()):
        raise UnsupportedError("layers share a parameter")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or parametrize.is_parametrized(module):
            raise UnsupportedError(f"layer {name or 'the model itself'} has hooks or parametrizations")
    graph, in_evaluation = (traced(model, train=train) for train in (True, False))
    if str(graph) != str(in_evaluation):
        raise UnsupportedError("it computes something else in training than in evaluation")
    return _Reader(model, input_shape).read(graph)


def traced(model: nn.Module, *, train: bool) -> fx.Graph:
    """The graph in a mode; every module keeps the mode it has."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        graph = fx.symbolic_trace(model.train(train)).graph
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"it cannot be traced ({reason})") from error
    finally:
        for module, mode in modes:
            module.training = mode
    graph.eliminate_dead_code()
    return graph


class _Reader:
    """Turns the nodes of a graph, one after the other, into values and operations."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        if len(input_shape) not in (1, 3):
            raise UnsupportedError(f"its input has {len(input_shape)} axes, where images (3) or features (1) are known")
        c, h, w = input_shape if len(input_shape) == 3 else (*input_shape, 1, 1)
        self.model = model
        self.input_shape = input_shape
        self.values = [Value(c, h, w)]
        self.ops: list[Op] = []
        self.at: dict[fx.Node, int] = {}

    def read(self, graph: fx.Graph) -> Program:
        output = -1
        for node in graph.nodes:
            if node.op == "placeholder":
                if 0 in self.at.values():
                    raise UnsupportedError("it has more than one input")
                self.at[node] = 0
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise UnsupportedError("it returns more than one tensor")
                output = self.at[node.args[0]]
            else:
                self.at[node] = self._step(node)
        value = self.values[output]
        if (value.height, value.width) != (1, 1):
            raise UnsupportedError("its output is no vector of logits")
        names = [op.name for op in self.ops if op.kind == "conv"]
        names += [v.norm.name for v in self.values if v.norm is not None]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise UnsupportedError(f"layer {twice} is used more than once")
        uses = [sum(op.sources.count(v) for op in self.ops) for v in range(len(self.values))]
        return Program(self.input_shape, tuple(self.values), tuple(self.ops), output, tuple(uses))

    def _step(self, node: fx.Node) -> int:
        """Read one node; the number of the value that it makes."""
        target, sources = self._meaning(node)
        plain = len(sources) == len(node.args) and node.kwargs.keys() <= {"inplace"}
        if isinstance(target, nn.Module):
            reader = next((f for kinds, f in _MODULES if isinstance(target, kinds)), None)
            if reader is not None and len(sources) == 1 and plain:
                return reader(self, target, str(node.target), sources[0])
            raise UnsupportedError(f"layer {node.target} ({type(target).__name__}) has no sparse form")
        if target == "add" and len(sources) == 2 and plain:
            return self._add(self.at[sources[0]], self.at[sources[1]])
        if target == "relu" and len(sources) == 1 and plain:
            return self._relu(nn.ReLU(), "relu", sources[0])
        if target == "flatten" and (node.args[1:], dict(node.kwargs)) in _FROM_FIRST:
            return self._flatten(nn.Flatten(), "flatten", sources[0])
        raise UnsupportedError(f"operation {node.name} ({getattr(node.target, '__name__', node.target)}) is not known")

    def _meaning(self, node: fx.Node) -> tuple[Any, list[fx.Node]]:
        """The module, or the word for the function, and the tensors it reads."""
        sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target)), sources
        if node.op == "call_function":
            return _FUNCTIONS.get(node.target), sources
        return node.target if node.op == "call_method" else None, sources

    # --- operations

    def _new(self, op: Op, channels: int, height: int, width: int) -> int:
        if height < 1 or width < 1:
            raise UnsupportedError(f"{op.name or op.kind} leaves nothing of its input")
        self.values.append(Value(channels, height, width))
        self.ops.append(replace(op, target=len(self.values) - 1))
        return len(self.values) - 1

    def _window(self, kind: str, name: str, node: fx.Node, layer: Any, channels: int, bias: bool = False) -> int:
        """A convolution or a pool."""
        source = self.at[node]
        value = self.values[source]
        kernel, padding, dilation = _pair(layer.kernel_size), _pair(layer.padding), _pair(getattr(layer, "dilation", 1))
        stride = _pair(layer.stride if layer.stride is not None else layer.kernel_size)
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip((value.height, value.width), kernel, stride, padding, dilation, strict=True)
        ]
        op = Op(kind, (source,), 0, name, bias, kernel, stride, padding, dilation)
        return self._new(op, channels, *size)

    def _conv(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        assert isinstance(layer, nn.Conv2d)
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UnsupportedError(f"layer {name} has groups or a padding other than a number of zeros")
        return self._window("conv", name, node, layer, layer.out_channels, layer.bias is not None)

    def _linear(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        assert isinstance(layer, nn.Linear)
        source = self.at[node]
        value = self.values[source]
        if (value.channels, value.height, value.width) != (layer.in_features, 1, 1):
            raise UnsupportedError(f"layer {name} is applied to more than one vector an example")
        return self._new(Op("conv", (source,), 0, name, layer.bias is not None), layer.out_features, 1, 1)

    def _max(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        assert isinstance(layer, nn.MaxPool2d)
        if layer.ceil_mode or layer.return_indices or _pair(layer.dilation) != (1, 1):
            raise UnsupportedError(f"layer {name} uses ceil_mode, dilation or indices")
        return self._window("max", name, node, layer, self.values[self.at[node]].channels)

    def _mean(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        assert isinstance(layer, nn.AvgPool2d)
        if layer.ceil_mode or layer.divisor_override or _pair(layer.padding) != (0, 0):
            raise UnsupportedError(f"layer {name} uses ceil_mode, padding or a divisor")
        if _pair(layer.stride or layer.kernel_size) != _pair(layer.kernel_size):
            raise UnsupportedError(f"layer {name} takes means of windows that overlap or leave gaps")
        return self._window("mean", name, node, layer, self.values[self.at[node]].channels)

    def _adaptive(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        assert isinstance(layer, nn.AdaptiveAvgPool2d)
        source = self.at[node]
        value = self.values[source]
        size = (value.height, value.width)
        wanted = [n if n is not None else own for n, own in zip(_pair(layer.output_size), size, strict=True)]
        if any(own % n for n, own in zip(wanted, size, strict=True)):
            raise UnsupportedError(f"layer {name} pools windows of unequal size")
        kernel = (size[0] // wanted[0], size[1] // wanted[1])
        return self._new(Op("mean", (source,), 0, name, kernel=kernel, stride=kernel), value.channels, *wanted)

    def _flatten(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        assert isinstance(layer, nn.Flatten)
        if (layer.start_dim, layer.end_dim) != (1, -1):
            raise UnsupportedError(f"layer {name} flattens some axes only")
        source = self.at[node]
        value = self.values[source]
        if (value.height, value.width) == (1, 1):
            return self._nothing(layer, name, node)
        return self._new(Op("flatten", (source,), 0), value.channels * value.height * value.width, 1, 1)

    def _add(self, a: int, b: int) -> int:
        va, vb = self.values[a], self.values[b]
        if (va.channels, va.height, va.width) != (vb.channels, vb.height, vb.width):
            raise UnsupportedError("it adds tensors of different shapes")
        return self._new(Op("add", (a, b), 0), va.channels, va.height, va.width)

    # --- what a value carries

    def _carry(self, node: fx.Node, **change: Any) -> int:
        if len(node.users) > 1:
            raise UnsupportedError(f"{node.name} is read both before and after its norm or ReLU")
        source = self.at[node]
        self.values[source] = replace(self.values[source], **change)
        return source

    def _norm(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        value = self.values[self.at[node]]
        if value.norm is not None or value.relu:
            raise UnsupportedError(f"layer {name} follows another norm or a ReLU")
        if isinstance(layer, nn.GroupNorm):
            return self._carry(node, norm=Norm(name, layer.num_groups, layer.eps, 0.0, layer.affine))
        assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        if layer.momentum is None or not layer.track_running_stats:
            raise UnsupportedError(f"layer {name} keeps no exponential running statistics")
        return self._carry(node, norm=Norm(name, 0, layer.eps, layer.momentum, layer.affine))

    def _relu(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        return self._carry(node, relu=True)

    def _nothing(self, layer: nn.Module, name: str, node: fx.Node) -> int:
        if isinstance(layer, nn.Dropout) and layer.p:
            raise UnsupportedError(f"layer {name} draws random numbers")
        if len(node.users) > 1:
            raise UnsupportedError(f"{node.name} is read both before and after {name}")
        return self.at[node]


_MODULES: tuple[tuple[Any, Callable[[_Reader, nn.Module, str, fx.Node], int]], ...] = (
    (nn.Conv2d, _Reader._conv),
    (nn.Linear, _Reader._linear),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm), _Reader._norm),
    (nn.ReLU, _Reader._relu),
    (nn.MaxPool2d, _Reader._max),
    (nn.AvgPool2d, _Reader._mean),
    (nn.AdaptiveAvgPool2d, _Reader._adaptive),
    (nn.Flatten, _Reader._flatten),
    ((nn.Identity, nn.Dropout), _Reader._nothing),
)
_FROM_FIRST: tuple[tuple[Any, dict[str, Any]], ...] = (((1,), {}), ((1, -1), {}), ((), {"start_dim": 1}))
_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    torch.add: "add",
    torch.relu: "relu",
    functional.relu: "relu",
    torch.flatten: "flatten",
}


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)
