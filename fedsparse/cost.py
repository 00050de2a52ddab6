"""The cost model: multiply-adds, training flops, storage and memory of a network under masks and channel cuts.

One multiply-add = 2 flops; norms, activations, loss and optimiser are not counted (FedRTS, arXiv 2501.19122, and
FedTiny, arXiv 2212.01977, count the same way). Training has two conventions:

* ``exact``: forward + weight gradient + input gradient, the last only where autograd needs it, so not for a layer
  that reads the network's input. PyTorch's own flop counter gives the same for dense networks.
* ``paper``: 3 x forward everywhere, as published tables have it.

Under a cut all three parts scale with the layer's weight density: pruned weights are neither used nor updated.

Modules whose formula is not here (attention, transposed convolutions, a custom layer) are counted by PyTorch's flop
counter: what it sees of them, matrix products and convolutions, is what is counted elsewhere too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.errors import UserError, unknown
from fedsparse.threads import one_thread

Cut = Mapping[str, tuple[float, float]]
"""Layer name -> (weight density, output density), both in [0, 1]; a layer that is absent is dense.

An element mask has output density 1. A channel cut has (kept_out * kept_in / (out * in), kept_out / out).
A norm has its own entry; only the output density counts there.
"""

BYTES = 4  # of a float32
_DENSE = (1.0, 1.0)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)  # instance norms derive from the first
CONVENTIONS = ("exact", "paper")


@dataclass(frozen=True)
class Layer:
    """One module with parameters.

    name: its path in the model; kind: "conv", "linear", "norm", "embedding", "lstm" (any recurrent layer) or "other",
    whose weights are its matrices (two axes or more) and whose biases are the rest. Products of activations with each
    other (attention scores) may stand in a layer "other" without weights and biases.
    weight_name: path of its weight ("" where there is none; the first of several);
    weights: trainable scalars that a mask may prune (0 for a norm); biases: its other trainable scalars;
    units_in, units_out: channels or features (vocabulary for an embedding, hidden units for a recurrent layer);
    macs: multiply-adds per example, forward, dense (a whole sequence for tokens);
    activations: output elements per example; first: reads the network's input, so needs no input gradient (never set
    for a recurrent layer, whose hidden states need one, nor for an other one); buffers: its float scalars that are not
    trained; calls: how often the model calls it for one example.
    """

    name: str
    kind: str
    weight_name: str
    weights: int
    biases: int
    units_in: int
    units_out: int
    macs: int
    activations: int
    first: bool
    buffers: int = 0
    calls: int = 0


# ---------------------------------------------------------------------------------------------------- tracing


def trace(model: nn.Module, input_shape: Sequence[int], *, tokens: bool = False) -> tuple[Layer, ...]:
    """The model's layers with parameters, in the order of ``model.named_modules()``.

    Runs one example of zeros (int64 tokens if ``tokens``) through a copy with zeros for parameters, on one thread: no
    randomness, and the model itself stays as it is; it may lie on the meta device. (The copy is not on the meta device,
    where the first operation imports sympy and so takes 1.7 s. So does the flop counter, which runs only for a model
    with layers of kind "other".) A layer that runs twice counts twice in macs and activations, once in weights.
    Raises UserError where the input does not fit.
    """
    clone = _zero_copy(model).eval()
    counted: set[int] = set()  # ids of parameters, so that a tied weight counts once
    layers = {name: _static(name, m, counted) for name, m in clone.named_modules() if _holds_parameters(m)}
    for name in layers:
        clone.get_submodule(name).register_forward_hook(_Recorder(layers, name), with_kwargs=True)
    x = torch.zeros(1, *input_shape, dtype=torch.int64 if tokens else torch.float32)
    others = any(layer.kind == "other" for layer in layers.values())
    metered: AbstractContextManager[Mapping[str, int]] = _metered(clone) if others else nullcontext({})
    try:  # with gradients, since they tell which layers need them
        with one_thread(), torch.enable_grad(), metered as macs:
            clone(x)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model does not run on inputs of shape {tuple(input_shape)}: {reason}") from error
    _share_out(clone, layers, macs)
    return tuple(layers[name] for name, _ in clone.named_modules() if name in layers)


def _zero_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters and buffers are zeros; the originals are not even read."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_zeros(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _zeros(buffer)
    return copy.deepcopy(model, memo)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _static(name: str, module: nn.Module, counted: set[int]) -> Layer:
    """What is known of a layer before it runs."""
    kind, units_in, units_out = _kind(module)
    own = dict(module.named_parameters(recurse=False))
    keys = weight_keys(module)
    sizes = {key: p.numel() for key, p in own.items() if id(p) not in counted and p.requires_grad}
    counted.update(id(p) for p in own.values())
    weights = sum(sizes.get(key, 0) for key in keys)
    return Layer(
        name=name,
        kind=kind,
        weight_name=f"{name}.{keys[0]}".lstrip(".") if keys else "",
        weights=weights,
        biases=sum(sizes.values()) - weights,
        units_in=units_in,
        units_out=units_out,
        macs=0,
        activations=0,
        first=False,
        buffers=sum(b.numel() for b in module.buffers(recurse=False) if b.is_floating_point()),
    )


def _kind(module: nn.Module) -> tuple[str, int, int]:
    """Kind, input units and output units."""
    if isinstance(module, _CONV):
        return "conv", module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.RNNBase):
        return "lstm", module.input_size, module.hidden_size
    own = list(module.parameters(recurse=False))
    if isinstance(module, _NORM):
        return "norm", own[0].numel(), own[0].numel()
    matrices = [p for p in own if p.ndim >= 2]
    if not matrices:
        return "other", own[0].numel(), own[0].numel()
    rows = max(1, len(matrices[0]))
    return "other", matrices[0].numel() // rows, rows


def weight_keys(module: nn.Module) -> tuple[str, ...]:
    """The names, in the module, of its own parameters that are weights (see :class:`Layer`), frozen ones included."""
    own = dict(module.named_parameters(recurse=False))
    kind = _kind(module)[0] if own else "norm"
    if kind == "norm":
        return ()
    if kind == "other":
        return tuple(key for key, p in own.items() if p.ndim >= 2)
    return tuple(key for key in own if key.startswith("weight"))


class _Recorder:
    """Forward hook that adds a run of one layer to the table."""

    def __init__(self, layers: dict[str, Layer], name: str) -> None:
        self.layers = layers
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = self.layers[self.name]
        x, y = _tensor_in((args, kwargs)), _tensor_in(output)
        if y is None:
            return
        reads_input = layer.kind in ("conv", "linear") and x is not None and not x.requires_grad
        self.layers[self.name] = replace(
            layer,
            macs=layer.macs + _forward_macs(module, y if x is None else x, y),
            activations=layer.activations + y.numel(),
            first=reads_input and (layer.first or not layer.activations),  # in all of its runs
            calls=layer.calls + 1,
        )


def _tensor_in(value: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and dicts (a packed sequence is a tuple); None if there is none."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for item in items if (found := _tensor_in(item)) is not None), None)


def _forward_macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Multiply-adds of one forward pass of one example: every weight once per output position or time step."""
    if isinstance(module, _CONV):
        return module.weight.numel() * math.prod(y.shape[2:])
    if isinstance(module, nn.Linear):
        return module.weight.numel() * math.prod(y.shape[:-1])
    if isinstance(module, nn.RNNBase):
        steps = x.numel() // module.input_size
        return steps * sum(p.numel() for key, p in module.named_parameters() if key.startswith("weight"))
    return 0  # norms are not counted, an embedding is a look-up, the others are metered


# -------------------------------------------------------------------------------------------- layers without a formula


@contextmanager
def _metered(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count multiply-adds while the model runs: by the innermost module, with an entry for every module that ran.

    Attention is computed by its parts meanwhile, since the counter does not know the fused kernels of the CPU.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # needs sympy when it runs

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._trilinear: _trilinear_flops})
    meter = _Meter(counter.get_total_flops)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(meter.enter, name))
        module.register_forward_hook(meter.leave)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter, sdpa_kernel(SDPBackend.MATH):
            yield meter.macs
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Meter:
    """Puts what a running total gains down to the module that is innermost at that time."""

    def __init__(self, total_flops: Callable[[], int]) -> None:
        self.total_flops = total_flops
        self.macs: dict[str, int] = {}
        self._stack: list[str] = []
        self._seen = 0

    def enter(self, name: str, *_: Any) -> None:
        self._settle()
        self._stack.append(name)
        self.macs.setdefault(name, 0)

    def leave(self, *_: Any) -> None:
        self._settle()
        self._stack.pop()

    def _settle(self) -> None:
        total = self.total_flops()
        if self._stack:
            self.macs[self._stack[-1]] += (total - self._seen) // 2
        self._seen = total


def _trilinear_flops(a: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of nn.Bilinear: every weight once per row of the (rows, inputs) operands."""
    return 2 * a[0] * math.prod(weight)


def _share_out(model: nn.Module, layers: dict[str, Layer], macs: Mapping[str, int]) -> None:
    """Add what the meter saw to the layers, except where a formula has counted it.

    It goes to the weights that a module holds and to those of the modules inside it that never ran themselves (it has
    used their parameters directly), in proportion to their elements; where there are none, to a layer without weights.
    """
    for name, module in model.named_modules():
        amount = macs.get(name, 0)
        if not amount or (name in layers and layers[name].kind != "other"):
            continue
        takers = [taker for taker in (name, *_silent(module, name, macs)) if taker in layers]
        sizes = [_weight_elements(model.get_submodule(taker)) for taker in takers]
        if not sum(sizes):
            takers, sizes = [name], [1]
            layers.setdefault(name, Layer(name, "other", "", 0, 0, 0, 0, macs=0, activations=0, first=False))
        for taker, share in zip(takers, shares_of(amount, sizes), strict=True):
            layers[taker] = replace(layers[taker], macs=layers[taker].macs + share)


def _silent(module: nn.Module, name: str, ran: Collection[str]) -> Iterator[str]:
    """The modules inside one that never ran, but not what is inside of those that did."""
    for key, child in module.named_children():
        path = f"{name}.{key}".lstrip(".")
        if path not in ran:
            yield path
            yield from _silent(child, path, ran)


def _weight_elements(module: nn.Module) -> int:
    own = dict(module.named_parameters(recurse=False))
    return sum(own[key].numel() for key in weight_keys(module))


def shares_of(amount: int, sizes: Sequence[int]) -> list[int]:
    """Whole parts of ``amount`` in proportion to ``sizes`` (not all 0): rounded, with the total kept."""
    total = sum(sizes)
    ends = [amount * end // total for end in accumulate(sizes)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


# ----------------------------------------------------------------------------------------------- multiply-adds


def forward_macs(layers: Sequence[Layer], cut: Cut | None = None) -> float:
    """Multiply-adds of one forward pass of one example under a cut."""
    cut = _checked(layers, cut)
    return sum(layer.macs * cut.get(layer.name, _DENSE)[0] for layer in layers)


def train_flops(layers: Sequence[Layer], samples: float, cut: Cut | None = None, convention: str = "exact") -> float:
    """Flops of training on ``samples`` examples (examples a round x epochs) in one of the two conventions."""
    if convention not in CONVENTIONS:
        raise unknown("cost convention", convention, CONVENTIONS)
    cut = _checked(layers, cut)
    total = 0.0
    for layer in layers:
        parts = 2 if layer.first and convention == "exact" else 3
        total += parts * layer.macs * cut.get(layer.name, _DENSE)[0]
    return 2 * samples * total


def search_flops(
    layers: Sequence[Layer],
    samples: float,
    searched: Collection[str],
    cut: Cut | None = None,
    convention: str = "exact",
) -> float:
    """Flops, beyond training's, of looking for the largest gradients of pruned weights in the layers ``searched``.

    ``exact``: an extra batch of ``samples`` examples: forward, input gradients of all layers, dense weight gradients of
    the searched ones. ``paper``: a batch that is trained anyway, so only what the dense weight gradients add to the
    kept ones (with it the savings of FedTiny's abstract, arXiv 2212.01977, come out for a search of all layers).
    """
    if convention not in CONVENTIONS:
        raise unknown("cost convention", convention, CONVENTIONS)
    cut = _checked(layers, cut)
    found = [layer for layer in layers if layer.name in searched]
    if convention == "paper":
        return 2 * samples * sum(layer.macs * (1 - cut.get(layer.name, _DENSE)[0]) for layer in found)
    return 2 * samples * (2 * forward_macs(layers, cut) + sum(layer.macs for layer in found))


# ------------------------------------------------------------------------------------------ counts and densities


def trainable_count(layers: Sequence[Layer]) -> int:
    """Trainable scalars of the dense model."""
    return sum(layer.weights + layer.biases for layer in layers)


def kept_count(layers: Sequence[Layer], cut: Cut | None = None) -> int:
    """Trainable scalars that are used under a cut: biases and norms follow the output density of their layer."""
    cut = _checked(layers, cut)
    return sum(sum(_kept(layer, cut)) for layer in layers)


def true_density(layers: Sequence[Layer], cut: Cut | None = None, extra: int = 0) -> float:
    """Kept trainable scalars, plus ``extra`` ones (a gate), over those of the dense model. Above 1 is possible."""
    return (kept_count(layers, cut) + extra) / max(1, trainable_count(layers))


def exempt_layers(layers: Sequence[Layer]) -> tuple[str, ...]:
    """The layers that papers leave dense: convolutions and embeddings that read the input, and the classifier.

    The classifier is the last linear layer.
    """
    linear = [layer.name for layer in layers if layer.kind == "linear"]
    opening = [layer.name for layer in layers if layer.kind == "embedding" or (layer.kind == "conv" and layer.first)]
    return tuple(opening + linear[-1:])


def nominal_density(
    layers: Sequence[Layer], cut: Cut | None = None, exempt: Collection[str] | None = None
) -> float | None:
    """Kept over all maskable weights, as papers quote it; maskable = weights of layers not in ``exempt``.

    exempt: layer names; None = those of :func:`exempt_layers`. Returns None where nothing is maskable.
    """
    cut = _checked(layers, cut)
    left_out = exempt_layers(layers) if exempt is None else exempt
    maskable = [layer for layer in layers if layer.weights and layer.name not in left_out]
    total = sum(layer.weights for layer in maskable)
    return sum(_kept(layer, cut)[0] for layer in maskable) / total if total else None


def _kept(layer: Layer, cut: Cut) -> tuple[int, int]:
    """Kept weights and kept other scalars of a layer. Densities are ratios of counts, so rounding restores them."""
    weight, output = cut.get(layer.name, _DENSE)
    return round(layer.weights * weight), round(layer.biases * output)


def _checked(layers: Sequence[Layer], cut: Cut | None) -> Cut:
    """The cut, none as empty; refuses names that no layer has and densities outside [0, 1]."""
    if not cut:
        return {}
    names = {layer.name for layer in layers}
    for name, (weight, output) in cut.items():
        if name not in names:
            raise unknown("layer", name, names)
        if not (0 <= weight <= 1 and 0 <= output <= 1):
            raise UserError(f"densities of layer {name} must be in [0, 1], got ({weight}, {output})")
    return cut


# -------------------------------------------------------------------------------------------- storage and memory


@dataclass(frozen=True)
class Storage:
    """Bits of a sparse tensor in its cheapest format: "dense", "bitmap", "coo" or "csr"."""

    format: str
    bits: int


def storage_bits(n: int, kept: int, rows: int, cols: int, value_bits: int = 32) -> Storage:
    """The cheapest storage of ``kept`` out of ``n`` = rows x cols values (formulas of FedRTS, arXiv 2501.19122).

    dense n*b; bitmap n + m*b; COO m*ceil(log2 n) + m*b; CSR m*ceil(log2 cols) + rows*ceil(log2 m) + m*b, or the same
    of the transpose. Of equals the first.
    """
    if not 0 <= kept <= n:
        raise UserError(f"kept must be in [0, {n}], got {kept}")
    values = kept * value_bits
    by_rows = kept * _log2(cols) + rows * _log2(kept)
    by_cols = kept * _log2(rows) + cols * _log2(kept)
    sizes = {
        "dense": n * value_bits,
        "bitmap": n + values,
        "coo": kept * _log2(n) + values,
        "csr": min(by_rows, by_cols) + values,
    }
    best = min(sizes, key=lambda name: sizes[name])
    return Storage(best, sizes[best])


def _log2(n: int) -> int:
    """ceil(log2 n), 0 for n = 0."""
    return max(0, n - 1).bit_length()


def model_bytes(
    layers: Sequence[Layer], cut: Cut | None = None, *, structured: bool = False, buffers: bool = True
) -> int:
    """Bytes of the model in its cheapest storage, indices included.

    structured: the cut is one of whole channels, so that kept weights are smaller dense tensors without indices.
    buffers: count norm statistics too.
    """
    cut = _checked(layers, cut)
    bits = 0
    for layer in layers:
        weights, others = _kept(layer, cut)
        if buffers:
            others += round(layer.buffers * cut.get(layer.name, _DENSE)[1])
        rows = max(1, layer.units_out)
        stored = storage_bits(layer.weights, weights, rows, -(-layer.weights // rows)).bits
        bits += (8 * BYTES * weights if structured else stored) + 8 * BYTES * others
    return math.ceil(bits / 8)


@dataclass(frozen=True)
class MemoryReport:
    """Peak memory of training on a device by purpose, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    decision: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.decision + self.activations


def memory_bytes(
    layers: Sequence[Layer],
    batch: int,
    cut: Cut | None = None,
    *,
    optimizer_copies: int = 0,
    gate: int = 0,
    decision: int = 0,
    structured: bool = False,
) -> MemoryReport:
    """What training under a cut holds in memory at once, by purpose.

    batch: examples; optimizer_copies: tensors of state per weight (0 plain SGD, 1 momentum, 2 Adam); gate: scalars of a
    gate, dense, trained; decision: bytes of buffers for choosing masks; structured: as in :func:`model_bytes`.
    Gradients and optimiser state exist for kept scalars only. Activations are the outputs of layers with parameters:
    ReLUs, norms' saved statistics and pools are taken to reuse them.
    """
    trained = BYTES * (kept_count(layers, cut) + gate)
    outputs = sum(layer.activations * (cut or {}).get(layer.name, _DENSE)[1] for layer in layers)
    return MemoryReport(
        weights=model_bytes(layers, cut, structured=structured) + BYTES * gate,
        gradients=trained,
        optimizer=optimizer_copies * trained,
        decision=decision,
        activations=math.ceil(BYTES * batch * outputs),
    )
