"""How operations without weights hand spaces on. Each function reads one node of which some input follows a space."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from fedsparse.sparse.reader import Act, Reader, UncutError, Value, acts_in

Operation = Callable[[Reader, fx.Node], Value]
_PRODUCTS = ("mul", "imul")
_QUOTIENTS = ("div", "truediv", "itruediv")


def _passed(reader: Reader, node: fx.Node) -> Act:
    """The first input, which follows a space."""
    value = reader.values[node.all_input_nodes[0]]
    if not isinstance(value, Act):
        raise UncutError
    return value


def same(reader: Reader, node: fx.Node) -> Value:
    """Entry by entry."""
    if len(node.all_input_nodes) != 1:
        raise UncutError
    return _passed(reader, node)


def pool(axes: int, reader: Reader, node: fx.Node) -> Value:
    """Over the ``axes`` after the channels."""
    act, shape = _passed(reader, node), reader.shapes[node]
    if act.dim != 1 or act.trailing != axes or not isinstance(shape, tuple):
        raise UncutError
    return replace(act, shape=shape)


def arithmetic(reader: Reader, node: fx.Node) -> Value:
    """Sums and products: each entry of one meets the same unit of the other; a whole tensor keeps the other whole."""
    operands = [a for a in node.args if isinstance(a, fx.Node) and reader.shapes.get(a) is not None]
    acts = [act for operand in operands for act in acts_in(reader.values[operand])]
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    if len(operands) == 1 or operands[0] is operands[1]:
        return _with_number(node, name, acts[0], alone=len(operands) == 1)
    if name in _QUOTIENTS or any(operand.op == "get_attr" for operand in operands):
        raise UncutError
    if len(acts) == 1:
        reader.pin(acts[0].space)
        return None
    if not acts[0].like(acts[1]):
        raise UncutError
    reader.unite(acts[0].space, acts[1].space)
    return acts[0]


def _with_number(node: fx.Node, name: str, act: Act, *, alone: bool) -> Value:
    """A factor keeps 0 at 0; so does a tensor that meets itself, except as a divisor."""
    scaled = name in _PRODUCTS or (name in _QUOTIENTS and isinstance(node.args[0], fx.Node))
    if (alone and not scaled) or (not alone and name in _QUOTIENTS):
        raise UncutError
    return act


def flatten(reader: Reader, node: fx.Node) -> Value:
    act = _passed(reader, node)
    if node.op == "call_module":
        module: Any = reader.module(node)
        return _flattened(act, module.start_dim, module.end_dim)
    return _flattened(act, _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))


def _flattened(act: Act, start: int, end: int) -> Act:
    start, end = start % len(act.shape), end % len(act.shape)
    if start == 0:
        raise UncutError
    shape = (*act.shape[:start], math.prod(act.shape[start : end + 1]), *act.shape[end + 1 :])
    if not start <= act.dim <= end:
        return replace(act, shape=shape, dim=act.dim - (end - start if act.dim > end else 0))
    before, behind = math.prod(act.shape[start : act.dim]), math.prod(act.shape[act.dim + 1 : end + 1])
    return replace(act, shape=shape, dim=start, repeats=before * act.repeats, span=behind * act.span)


def view(reader: Reader, node: fx.Node) -> Value:
    """Only as a flattening of all but the examples: with other sizes a smaller model would not run."""
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    assert isinstance(sizes, tuple | list)
    if len(sizes) != 2 or sizes[1] != -1 or not _is_batch_size(sizes[0]):
        raise UncutError
    return _flattened(_passed(reader, node), 1, -1)


def _is_batch_size(size: Any) -> bool:
    """x.size(0) or x.shape[0]."""
    if not isinstance(size, fx.Node):
        return False
    return size.args[1:] == (0,) and (size.target == "size" or size.target is operator.getitem)


def reduce(reader: Reader, node: fx.Node) -> Value:
    """Mean or sum over some axes, not that of the channels."""
    act, dims = _passed(reader, node), _argument(node, 1, "dim", None)
    if dims is None:
        raise UncutError
    gone = {d % len(act.shape) for d in ((dims,) if isinstance(dims, int) else dims)}
    if act.dim in gone:
        raise UncutError
    kept = _argument(node, 2, "keepdim", False)
    return replace(act, shape=reader.shapes[node], dim=act.dim - (0 if kept else sum(d < act.dim for d in gone)))


def getitem(reader: Reader, node: fx.Node) -> Value:
    """One of several values, or some positions of a tensor with all of its channels."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    value = reader.values[source]
    if isinstance(value, tuple):
        if not isinstance(index, int):
            raise UncutError
        return value[index]
    act = _passed(reader, node)
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(act.shape) - len(parts) + 1)
    parts += [slice(None)] * (len(act.shape) - len(parts))
    if not all(isinstance(p, int | slice) for p in parts) or parts[act.dim] != slice(None):
        raise UncutError
    return replace(act, shape=reader.shapes[node], dim=act.dim - sum(isinstance(p, int) for p in parts[: act.dim]))


def transpose(reader: Reader, node: fx.Node) -> Value:
    act = _passed(reader, node)
    a, b = (_argument(node, i, f"dim{i - 1}", None) for i in (1, 2))
    order = list(range(len(act.shape)))
    order[a], order[b] = order[b], order[a]
    return replace(act, shape=reader.shapes[node], dim=order.index(act.dim))


def permute(reader: Reader, node: fx.Node) -> Value:
    act, dims = _passed(reader, node), node.args[1:]
    order: Any = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    return replace(act, shape=reader.shapes[node], dim=[d % len(act.shape) for d in order].index(act.dim))


def squeeze(reader: Reader, node: fx.Node) -> Value:
    """Of one given axis: all that have length 1 may be others in a smaller model."""
    act, dim, shape = _passed(reader, node), _argument(node, 1, "dim", None), reader.shapes[node]
    if not isinstance(dim, int) or dim % len(act.shape) == act.dim:
        raise UncutError
    gone = len(act.shape) - len(shape)
    return replace(act, shape=shape, dim=act.dim - (gone if dim % len(act.shape) < act.dim else 0))


def unsqueeze(reader: Reader, node: fx.Node) -> Value:
    act, dim = _passed(reader, node), _argument(node, 1, "dim", None)
    return replace(act, shape=reader.shapes[node], dim=act.dim + (dim % (len(act.shape) + 1) <= act.dim))


def sizes(reader: Reader, node: fx.Node) -> Value:
    """x.size() or x.shape; no tensor."""
    if reader.shapes[node] is not None:
        raise UncutError
    return None


def _argument(node: fx.Node, position: int, key: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(key, default)


_F = functional
_POOL_1D, _POOL_2D = partial(pool, 1), partial(pool, 2)
# Channel by channel, and 0 stays 0: what a dropped channel would have fed forward is nothing.
_CHANNELWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Hardswish,
    nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
)  # fmt: skip
ACTIVATIONS = (
    torch.relu, torch.tanh, _F.relu, _F.relu6, _F.leaky_relu, _F.tanh, _F.gelu, _F.silu, _F.elu, _F.selu, _F.celu,
    _F.mish, _F.hardswish, _F.softsign,
)  # fmt: skip
MODULES: tuple[tuple[Any, Operation], ...] = (
    (_CHANNELWISE, same),
    ((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), _POOL_1D),
    ((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), _POOL_2D),
    (nn.Flatten, flatten),
)
METHODS: dict[str, Operation] = {
    **dict.fromkeys(("relu", "relu_", "tanh", "tanh_", "neg", "contiguous", "clone"), same),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"), arithmetic),
    **dict.fromkeys(("mean", "sum"), reduce),
    **dict.fromkeys(("view", "reshape"), view),
    "flatten": flatten,
    "transpose": transpose,
    "permute": permute,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "size": sizes,
}
FUNCTIONS: dict[Any, Operation] = {
    **dict.fromkeys((*ACTIVATIONS, torch.neg, operator.neg, _F.dropout, _F.dropout1d, _F.dropout2d), same),
    **dict.fromkeys((_F.max_pool1d, _F.avg_pool1d, _F.adaptive_avg_pool1d, _F.adaptive_max_pool1d), _POOL_1D),
    **dict.fromkeys((_F.max_pool2d, _F.avg_pool2d, _F.adaptive_avg_pool2d, _F.adaptive_max_pool2d), _POOL_2D),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub), arithmetic),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), arithmetic),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), arithmetic),
    **dict.fromkeys((torch.mean, torch.sum), reduce),
    torch.flatten: flatten,
    torch.reshape: view,
    torch.transpose: transpose,
    torch.permute: permute,
    torch.squeeze: squeeze,
    torch.unsqueeze: unsqueeze,
    operator.getitem: getitem,
    getattr: sizes,
}


def is_channelwise(function: Any) -> bool:
    """Whether a function or module keeps channels apart and 0 at 0."""
    return function in ACTIVATIONS or isinstance(function, _CHANNELWISE)
