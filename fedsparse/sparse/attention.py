"""Self-attention by heads: how transformer encoders read and write spaces, and the pass with the kept heads.

A block is a group of heads: their rows of the query, key and value projections; the output projection's columns for
them are dead with it. The stream around it stays whole, for its layer norms mix all features. So does the output of
a head scale with its gate, as if the value projection's rows did.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fedsparse.sparse.reader import Act, Reader, UncutError, Value, acts_in, tensors_of
from fedsparse.sparse.reader_layers import Layer, source_of
from fedsparse.sparse.reader_operations import is_channelwise
from fedsparse.sparse.spaces import Axis, CutTensor, Gated


def encoder(reader: Reader, node: fx.Node, name: str, module: nn.TransformerEncoder) -> Value:
    source = source_of(reader, node)
    layers = [(f"{name}.layers.{i}", layer) for i, layer in enumerate(module.layers)]
    if name in reader.layers or not all(type(layer) is nn.TransformerEncoderLayer for _, layer in layers):
        raise UncutError
    for path, layer in layers:
        _encoder_layer(reader, path, layer, source, reader.shapes[node])
    return None


def encoder_layer(reader: Reader, node: fx.Node, name: str, module: nn.TransformerEncoderLayer) -> Value:
    _encoder_layer(reader, name, module, source_of(reader, node), reader.shapes[node])
    return None


def _encoder_layer(
    reader: Reader, name: str, module: nn.TransformerEncoderLayer, source: Act | None, shape: tuple[int, ...]
) -> None:
    if f"{name}.linear1" in reader.layers or len(shape) != 3:
        raise UncutError
    reader.blame(f"layer {name + '.norm1'!r} (LayerNorm)", [act.space for act in acts_in(source)])
    if _by_heads(module.self_attn):
        _heads(reader, f"{name}.self_attn", module.self_attn, shape[1])
    else:
        reader.blame(f"layer {name + '.self_attn'!r} (MultiheadAttention)", [], always=True)
    if is_channelwise(module.activation):
        _feed_forward(reader, name, module, math.prod(shape[:-1]), shape)
    else:
        reader.blame(f"layer {name!r} (TransformerEncoderLayer), with its activation", [], always=True)


def self_attention(reader: Reader, node: fx.Node, name: str, module: nn.MultiheadAttention) -> Value:
    """A call on three times the same input that asks for no weights."""
    plain = len(node.args) == 3 and len(node.all_input_nodes) == 1 and node.kwargs == {"need_weights": False}
    shape = reader.shapes[node.all_input_nodes[0]]
    if not plain or name in reader.layers or not _by_heads(module) or len(shape) != 3:
        raise UncutError("with other arguments than x, x, x, need_weights=False")
    spaces = [act.space for act in acts_in(reader.values[node.all_input_nodes[0]])]
    reader.blame(f"layer {name!r} (MultiheadAttention), whose input stays whole,", spaces)
    _heads(reader, name, module, shape[1])
    return None


def _by_heads(module: nn.MultiheadAttention) -> bool:
    return module.batch_first and module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn


def _heads(reader: Reader, name: str, module: nn.MultiheadAttention, steps: int) -> None:
    out = reader.new(name, module.num_heads)
    rows, cols = Axis(out, repeats=3, span=module.head_dim), Axis(out, span=module.head_dim)
    own = [
        replace(t, axes=(rows, None), owner=0, uses=steps if t.name.endswith("weight") else 0)
        for t in tensors_of(name, module)
    ]
    projection = [
        replace(t, axes=(None, cols), uses=steps) if t.name.endswith("weight") else t
        for t in tensors_of(f"{name}.out_proj", module.out_proj)
    ]
    reader.record(name, None, out, own)
    reader.record(f"{name}.out_proj", None, out, projection)
    reader.attentions.append(Gated(name, Axis(out), 2))
    reader.unit_macs.append((out, 2 * steps * steps * module.head_dim))  # scores, and their sums of values


def _feed_forward(
    reader: Reader, name: str, module: nn.TransformerEncoderLayer, positions: int, shape: tuple[int, ...]
) -> None:
    first, second = f"{name}.linear1", f"{name}.linear2"
    out = reader.new(first, module.linear1.out_features)
    rows = [replace(t, axes=(Axis(out), None), owner=0) for t in tensors_of(first, module.linear1)]
    cols: list[CutTensor] = tensors_of(second, module.linear2)
    rows[0], cols[0] = replace(rows[0], uses=positions), replace(cols[0], axes=(None, Axis(out)), uses=positions)
    reader.record(first, None, out, rows)
    reader.record(second, None, out, cols)
    reader.scale(first, Act(out, len(shape) - 1, (*shape[:-1], module.linear1.out_features)))


ENCODERS: tuple[tuple[Any, Layer], ...] = (
    (nn.TransformerEncoder, encoder),
    (nn.TransformerEncoderLayer, encoder_layer),
    (nn.MultiheadAttention, self_attention),
)


def attend(module: Any, scale: Tensor, x: Tensor, *_: Tensor, need_weights: bool, **masks: Any) -> tuple[Tensor, None]:
    """What ``module(x, x, x, need_weights=False)`` gives, by its kept heads: (n, steps, features), and None.

    scale: (heads, 1, 1), factors of the heads' outputs. The module's projections are bound to those of the kept heads.
    With all of them the operations are those of ``torch.nn.functional.multi_head_attention_forward``.
    """
    assert not need_weights and not any(masks.values()), masks
    n, steps, features = x.shape
    heads = len(scale)
    packed = functional.linear(x.transpose(0, 1), module.in_proj_weight, module.in_proj_bias)
    packed = packed.view(steps, n, 3, heads * module.head_dim).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    q, k, v = (t.view(steps, n * heads, module.head_dim).transpose(0, 1) for t in packed)
    q, k, v = (t.view(n, heads, steps, module.head_dim) for t in (q, k, v))
    dropout = module.dropout if module.training else 0.0
    mixed = functional.scaled_dot_product_attention(q, k, v, None, dropout) * scale  # (n, heads, steps, head_dim)
    flat = mixed.permute(2, 0, 1, 3).reshape(n * steps, heads * module.head_dim)
    out = functional.linear(flat, module.out_proj.weight, module.out_proj.bias).view(steps, n, features)
    return torch.transpose(out, 0, 1), None
