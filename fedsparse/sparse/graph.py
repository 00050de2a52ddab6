"""Reads a model's graph: which channels and hidden units belong together, and what of each tensor follows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsparse.errors import UserError
from fedsparse.sparse.attention import ENCODERS
from fedsparse.sparse.program import UnsupportedError, traced
from fedsparse.sparse.reader import NORMS, Act, Reader, UncutError, Value, acts_in, cannot_cut
from fedsparse.sparse.reader_layers import LAYERS, WRITERS
from fedsparse.sparse.reader_operations import FUNCTIONS, METHODS, MODULES
from fedsparse.sparse.spaces import Axis, Found
from fedsparse.threads import one_thread


def find_spaces(
    model: nn.Module, input_shape: tuple[int, ...], *, tokens: bool, keep: bool, class_gates: bool = False
) -> Found:
    """The spaces of a model that takes (n, *input_shape), of int64 if ``tokens``.

    The space of the logits stays whole; with ``class_gates`` its units are scaled, none is dropped. keep: those stay
    whole that reach something that cannot be cut; else raises UserError, naming it. Raises UserError for a model that
    cannot be traced or has no space that could be cut, and for logits that cannot be scaled.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len(names) > sum(1 for _ in model.parameters()):
        raise cannot_cut("a model whose layers share a parameter")
    try:
        graph = traced(model, train=False)
    except UnsupportedError as error:
        raise cannot_cut(f"a {type(model).__name__}: {error}") from error
    reader = Reader(model, _shapes(model, graph, input_shape, tokens=tokens))
    after = _after_logits(reader, graph)
    for node in graph.nodes:
        _read(reader, node, after, class_gates)
    found = reader.result(keep=keep)
    if class_gates and not any(scaled and multiple == 1 for _, _, multiple, scaled in found.spaces):
        raise UserError(
            "class_gates = true needs logits that are each made of one unit of a linear layer or a convolution"
        )
    return found


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.shapes[n] = _shape(result)
        return result


def _shape(result: Any) -> Any:
    """Of a tensor its shape, of several a list; None for anything else."""
    if isinstance(result, Tensor):
        return tuple(result.shape)
    return [_shape(part) for part in result] if type(result) in (tuple, list) else None


def _shapes(model: nn.Module, graph: fx.Graph, input_shape: tuple[int, ...], *, tokens: bool) -> dict[fx.Node, Any]:
    """The shapes of all that a graph makes of one example of zeros; the model keeps its modes and tensors."""
    x = torch.zeros(1, *input_shape, dtype=torch.int64 if tokens else torch.float32)
    modes = [(module, module.training) for module in model.modules()]
    runner = _Shapes(model.eval(), graph)
    try:
        with one_thread(), torch.no_grad():
            runner.run(x)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model does not run on inputs of shape {input_shape}: {reason}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    return runner.shapes


def _after_logits(reader: Reader, graph: fx.Graph) -> set[fx.Node]:
    """The nodes between the layers that give the logits and the output."""
    found: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.op == "output"]
    while todo:
        node = todo.pop()
        if node in found or (node.op == "call_module" and isinstance(reader.module(node), WRITERS)):
            continue
        found.add(node)
        todo += node.all_input_nodes
    return found


def _read(reader: Reader, node: fx.Node, after: set[fx.Node], class_gates: bool) -> None:
    """Read one node; what cannot be cut is noted with the spaces that it reaches, except behind the logits."""
    if node.op in ("placeholder", "get_attr"):
        reader.values[node] = None
        return
    acts = [act for source in node.all_input_nodes for act in acts_in(reader.values[source])]
    if node.op == "output":
        for act in acts:
            if class_gates and act.axis == Axis(act.space):
                reader.only_scale(act.space)
            else:
                reader.pin(act.space)
        return
    try:
        reader.values[node] = _step(reader, node, acts)
    except UncutError as reason:
        reader.values[node] = None
        if node in after:
            for act in acts:
                reader.pin(act.space)
        else:
            what = _describe(reader, node, str(reason))
            reader.blame(what, [act.space for act in acts], always=_weighted(reader, node))


def _step(reader: Reader, node: fx.Node, acts: list[Act]) -> Value:
    if node.op == "call_module":
        module = reader.module(node)
        layer = next((f for kinds, f in (*LAYERS, *ENCODERS) if isinstance(module, kinds)), None)
        if layer is not None:
            return layer(reader, node, str(node.target), module)
        operation = next((f for kinds, f in MODULES if isinstance(module, kinds)), None)
    else:
        operation = FUNCTIONS.get(node.target) if node.op == "call_function" else METHODS.get(str(node.target))
    if not acts and not _weighted(reader, node):
        return None
    if operation is None:
        raise UncutError
    return _checked(operation(reader, node), reader.shapes[node])


def _checked(value: Value, shape: Any) -> Value:
    assert not isinstance(value, Act) or value.shape == shape, f"{value} has the shape {shape}"
    return value


def _weighted(reader: Reader, node: fx.Node) -> bool:
    """Whether it holds weights that blocks should own: it is named even if no space reaches it."""
    if node.op != "call_module":
        return False
    module = reader.module(node)
    return not isinstance(module, (*NORMS, nn.LayerNorm)) and any(True for _ in module.parameters())


def _describe(reader: Reader, node: fx.Node, reason: str) -> str:
    if node.op == "call_module":
        what = f"layer {str(node.target)!r} ({type(reader.module(node)).__name__})"
    else:
        what = f"operation {node.name!r} ({getattr(node.target, '__name__', node.target)})"
    return f"{what}, {reason}" if reason else what
