"""Convolution over kept weights only: forward, input gradient and weight gradient, compiled with numba.

A convolution with a sparse weight is, for each output channel, a short list of (value, shift): the output row is the
sum of value * (input row, shifted). The work goes tile by tile. A tile is a few examples, copied into a buffer with a
zero border in which every shift is a plain offset, so that no tap needs a border test, and small enough to stay in the
cache for all output channels. A linear layer is a convolution of 1x1 images.

Layouts: activations between layers are ``[channels, n, height, width]``. The input buffer of a tile is
``[channels, phases, rows, columns, examples]``: with stride s there are s*s phases, one for each remainder of row and
column, which turns a stride into plain shifts too. Examples lie innermost, so that small images still give long runs.

The two inner loops are written in LLVM's vector form, since numba does not turn a sum over a list of shifted rows into
register code by itself: ``_sums`` keeps a block of the output in registers while it runs over the non-zeros, ``_dots``
keeps one accumulator for each of several non-zeros while it runs over the positions. No weight matrix, no gradient of
one and no im2col buffer exists anywhere. Offsets are computed from the positions of the kept weights at each call, so
that a pattern costs nothing beyond its positions.

Every kernel runs on one thread, releases the GIL and has a fixed order of summation: the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Array = Any  # a NumPy array inside compiled code

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Floats in a vector register; run lengths are multiples of it."""

_FAST = {"contract", "reassoc", "nsz", "arcp"}  # not nnan, not ninf: a NaN must stay visible
_FLAGS = ("contract", "reassoc", "nsz")
_FLOAT, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


class Geometry(NamedTuple):
    """A convolution's shapes and the layout of its tile buffers; lengths in floats.

    group: examples a tile. low, high: border cells before and behind, in cells of a phase. row, plane: from one buffer
    row or phase to the next. flat: one run over all rows, border columns included; else one run a row.
    """

    inputs: int
    height: int
    width: int
    outputs: int
    out_h: int
    out_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    group: int
    low_h: int
    low_w: int
    high_h: int
    high_w: int
    phase_h: int
    phase_w: int
    row: int
    plane: int
    flat: int

    @property
    def phases(self) -> int:
        return self.stride_h * self.stride_w


def geometry(
    inputs: int,
    size: tuple[int, int],
    outputs: int,
    kernel: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    batch: int = 1,
    cache: int = 1280 * 1024,
) -> Geometry:
    """The layout for a convolution of images of ``size`` (height, width); ``cache``: bytes that a tile may take.

    The output must not be empty.
    """
    outs, lows, highs, phase = [], [], [], []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        outs.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
        shifts = [(d * tap - p) // s for tap in range(k)]
        lows.append(max(0, -min(shifts)))
        highs.append(max(0, *shifts))
        phase.append(-(-n // s))
    if min(outs) < 1:
        raise ValueError(f"a {kernel} kernel leaves nothing of an image of {size}")
    columns = lows[1] + highs[1] + max(outs[1], phase[1])
    rows = lows[0] + highs[0] + max(outs[0], phase[0])
    per_example = 4 * rows * columns * max(inputs * stride[0] * stride[1], outputs)
    tiles = -(-batch // max(1, min(batch, cache // per_example, -(-8 * LANES // outs[1]))))
    group = -(-batch // tiles)
    run = _round(outs[1] * group)
    row = max(columns * group, run)
    flat = int(row * (outs[0] - 1) + run < 1.1 * outs[0] * _cost(run)) if outs[0] > 1 else 0
    return Geometry(
        inputs,
        *size,
        outputs,
        *outs,
        *kernel,
        *stride,
        *padding,
        *dilation,
        group,
        *lows,
        *highs,
        *phase,
        row,
        rows * row + 2 * LANES,
        flat,
    )


def _round(n: int) -> int:
    return -(-n // LANES) * LANES


def _cost(run: int) -> float:
    """What a run costs, in floats of a long run: short blocks pay for the list of non-zeros again."""
    blocks, rest = divmod(run // LANES, 8)
    return LANES * (8 * blocks + {0: 0}.get(rest, rest + 2.0))


# ------------------------------------------------------------------------------------------------- inner loops


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(builder: Any, pointer: Any, lanes: int) -> Any:
    """A vector of floats from an address without alignment."""
    at = builder.gep(pointer, [_I64(lanes)])
    return builder.load(builder.bitcast(at, _VECTOR.as_pointer()), align=4)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FLAGS), c, flags=_FLAGS)


def _sums(blocks: int) -> Any:
    """``y[yo : yo + blocks * LANES] = sum_k values[k] * x[xo + offsets[k] :]`` over ``n`` entries from ``start``."""

    @intrinsic
    def sums(_: Any, offsets: Any, values: Any, start: Any, n: Any, x: Any, xo: Any, y: Any, yo: Any) -> Any:
        signature = types.void(offsets, values, types.int64, types.int64, x, types.int64, y, types.int64)

        def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            offsets, values, start, n, x, xo, y, yo = args
            offset = _pointer(context, builder, sig.args[0], offsets, start)
            value = _pointer(context, builder, sig.args[1], values, start)
            source = _pointer(context, builder, sig.args[4], x, xo)
            target = _pointer(context, builder, sig.args[6], y, yo)
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(blocks)]
            for total in totals:
                builder.store(zero, total)
            with cgutils.for_range(builder, n) as loop:
                shift = builder.sext(builder.load(builder.gep(offset, [loop.index])), _I64)
                weight = _splat(builder, builder.load(builder.gep(value, [loop.index])))
                row = builder.gep(source, [shift])
                for j, total in enumerate(totals):
                    part = _multiply_add(builder, weight, _load(builder, row, j * LANES), builder.load(total))
                    builder.store(part, total)
            for j, total in enumerate(totals):
                at = builder.bitcast(builder.gep(target, [_I64(j * LANES)]), _VECTOR.as_pointer())
                builder.store(builder.load(total), at, align=4)
            return context.get_dummy_value()

        return signature, code

    return sums


def _dots(count: int) -> Any:
    """``out[k] += sum_p y[yo + p] * x[xo + offsets[k] + p]`` for ``count`` entries from ``k``.

    p runs over ``runs`` runs of ``length`` floats, ``row`` apart in both.
    """

    @intrinsic
    def dots(
        _: Any, offsets: Any, k: Any, x: Any, xo: Any, y: Any, yo: Any, runs: Any, row: Any, length: Any, out: Any
    ) -> Any:
        i64 = types.int64
        signature = types.void(offsets, i64, x, i64, y, i64, i64, i64, i64, out)

        def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            offsets, k, x, xo, y, yo, runs, row, length, out = args
            offset = _pointer(context, builder, sig.args[0], offsets, k)
            result = _pointer(context, builder, sig.args[9], out, k)
            left = _pointer(context, builder, sig.args[4], y, yo)
            base = _pointer(context, builder, sig.args[2], x, xo)
            shifts = [builder.sext(builder.load(builder.gep(offset, [_I64(j)])), _I64) for j in range(count)]
            rights = [builder.gep(base, [shift]) for shift in shifts]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(count)]
            for total in totals:
                builder.store(zero, total)
            vectors = builder.sdiv(length, _I64(LANES))
            with cgutils.for_range(builder, runs) as outer:
                start = builder.mul(outer.index, row)
                with cgutils.for_range(builder, vectors) as inner:
                    at = builder.add(start, builder.mul(inner.index, _I64(LANES)))
                    a = _load(builder, builder.gep(left, [at]), 0)
                    for right, total in zip(rights, totals, strict=True):
                        b = _load(builder, builder.gep(right, [at]), 0)
                        builder.store(_multiply_add(builder, a, b, builder.load(total)), total)
            name = f"llvm.vector.reduce.fadd.v{LANES}f32"
            reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR]), name)
            for j, total in enumerate(totals):
                at = builder.gep(result, [_I64(j)])
                summed = builder.call(reduce, [ir.Constant(_FLOAT, 0.0), builder.load(total)], fastmath=_FLAGS)
                builder.store(builder.fadd(builder.load(at), summed), at)
            return context.get_dummy_value()

        return signature, code

    return dots


_sums8, _sums4, _sums1 = _sums(8), _sums(4), _sums(1)
_dots8, _dots4, _dots1 = _dots(8), _dots(4), _dots(1)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at first call; keep the result on disk where a folder for it can be written."""
    options = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to write to
        return njit(**options)(function)


@kernel
def _row_sum(offsets: Array, values: Array, start: int, n: int, x: Array, xo: int, y: Array, yo: int, run: int) -> None:
    """One run of one output row."""
    p = 0
    while p + 8 * LANES <= run:
        _sums8(offsets, values, start, n, x, xo + p, y, yo + p)
        p += 8 * LANES
    if p + 4 * LANES <= run:
        _sums4(offsets, values, start, n, x, xo + p, y, yo + p)
        p += 4 * LANES
    while p < run:
        _sums1(offsets, values, start, n, x, xo + p, y, yo + p)
        p += LANES


@kernel
def _rows_sum(
    offsets: Array, values: Array, start: int, n: int, x: Array, xo: int, y: Array, runs: int, row: int, run: int
) -> None:
    for i in range(runs):
        _row_sum(offsets, values, start, n, x, xo + i * row, y, i * row, run)


@kernel
def _rows_dot(
    offsets: Array, k: int, end: int, x: Array, y: Array, yo: int, runs: int, row: int, run: int, out: Array
) -> None:
    """The dot products of one output row with the shifted inputs of its non-zeros."""
    while k + 8 <= end:
        _dots8(offsets, k, x, 0, y, yo, runs, row, run, out)
        k += 8
    if k + 4 <= end:
        _dots4(offsets, k, x, 0, y, yo, runs, row, run, out)
        k += 4
    while k < end:
        _dots1(offsets, k, x, 0, y, yo, runs, row, run, out)
        k += 1


# ------------------------------------------------------------------------------------------------- patterns


@kernel
def _runs(geo: Geometry, height: int, width: int) -> tuple[int, int]:
    """How many runs cover ``height`` rows of ``width`` cells, and their length."""
    length = -(-width * geo.group // LANES) * LANES
    if geo.flat:
        return 1, -(-((height - 1) * geo.row + width * geo.group) // LANES) * LANES
    return height, length


@kernel
def _shift(tap: int, dilation: int, padding: int, stride: int) -> tuple[int, int]:
    """Phase and shift of a tap: input = stride * (output + shift) + phase."""
    u = tap * dilation - padding
    return u % stride, u // stride


@kernel
def _pattern(positions: Array, geo: Geometry) -> tuple[Array, Array]:
    """Offsets into the input buffer, (kept,) int32, and where each output row begins, (outputs + 1,)."""
    taps = geo.kernel_h * geo.kernel_w
    cells = geo.inputs * taps
    shifts = np.empty(taps, np.int64)
    for kh in range(geo.kernel_h):
        fh, dh = _shift(kh, geo.dilation_h, geo.pad_h, geo.stride_h)
        for kw in range(geo.kernel_w):
            fw, dw = _shift(kw, geo.dilation_w, geo.pad_w, geo.stride_w)
            start = (dh + geo.low_h) * geo.row + (dw + geo.low_w) * geo.group
            shifts[kh * geo.kernel_w + kw] = (fh * geo.stride_w + fw) * geo.plane + start
    offsets = np.empty(len(positions), np.int32)
    begins = np.zeros(geo.outputs + 1, np.int64)
    channel = geo.stride_h * geo.stride_w * geo.plane
    for k in range(len(positions)):
        output, rest = divmod(positions[k], cells)
        c, tap = divmod(rest, taps)
        offsets[k] = c * channel + shifts[tap]
        begins[output + 1] += 1
    for r in range(geo.outputs):
        begins[r + 1] += begins[r]
    return offsets, begins


@kernel
def _transposed(positions: Array, values: Array, geo: Geometry) -> tuple[Array, Array, Array]:
    """The same for the input gradient: rows are (input channel, phase), offsets go into the gradient buffer."""
    taps = geo.kernel_h * geo.kernel_w
    cells = geo.inputs * taps
    phases = geo.stride_h * geo.stride_w
    phase = np.empty(taps, np.int64)
    shifts = np.empty(taps, np.int64)
    for kh in range(geo.kernel_h):
        fh, dh = _shift(kh, geo.dilation_h, geo.pad_h, geo.stride_h)
        for kw in range(geo.kernel_w):
            fw, dw = _shift(kw, geo.dilation_w, geo.pad_w, geo.stride_w)
            phase[kh * geo.kernel_w + kw] = fh * geo.stride_w + fw
            shifts[kh * geo.kernel_w + kw] = (geo.high_h - dh) * geo.row + (geo.high_w - dw) * geo.group
    begins = np.zeros(geo.inputs * phases + 1, np.int64)
    for k in range(len(positions)):
        c, tap = divmod(positions[k] % cells, taps)
        begins[c * phases + phase[tap] + 1] += 1
    for r in range(geo.inputs * phases):
        begins[r + 1] += begins[r]
    free = begins.copy()
    offsets = np.empty(len(positions), np.int32)
    turned = np.empty(len(positions), np.float32)
    for k in range(len(positions)):
        output, rest = divmod(positions[k], cells)
        c, tap = divmod(rest, taps)
        at = free[c * phases + phase[tap]]
        free[c * phases + phase[tap]] += 1
        offsets[at] = output * geo.plane + shifts[tap]
        turned[at] = values[k]
    return offsets, turned, begins


# ------------------------------------------------------------------------------------------------- tile buffers


@kernel
def active(v: float, scale: float, shift: float, relu: bool) -> float:
    z = v * scale + shift
    return np.float32(0.0) if relu and z < 0 else z  # a NaN passes


@kernel
def _pack_row(source: Array, scale: float, shift: float, relu: bool, target: Array, step: int) -> None:
    """Copy one row of one example, every ``step``-th float of the target, through its norm and ReLU."""
    if step == 1:
        if relu:
            for j in range(len(source)):
                z = source[j] * scale + shift
                target[j] = np.float32(0.0) if z < 0 else z
        else:
            for j in range(len(source)):
                target[j] = source[j] * scale + shift
    else:
        for j in range(len(source)):
            target[j * step] = active(source[j], scale, shift, relu)


@kernel
def _pack_input(
    raw: Array, scale: Array, shift: Array, relu: bool, first: int, geo: Geometry, c: int, buffer: Array
) -> None:
    """Fill channel ``c`` of the input buffer with the examples from ``first`` on; missing ones are zero."""
    n = raw.shape[1]
    rows = min(geo.phase_h, geo.out_h + geo.high_h)
    columns = min(geo.phase_w, geo.out_w + geo.high_w)
    for b in range(geo.group):
        for fh in range(geo.stride_h):
            for fw in range(geo.stride_w):
                start = ((c * geo.stride_h + fh) * geo.stride_w + fw) * geo.plane + geo.low_w * geo.group + b
                for i in range(rows):
                    h = i * geo.stride_h + fh
                    if h >= geo.height:
                        break
                    at = start + (geo.low_h + i) * geo.row
                    if first + b < n:
                        line = raw[c, first + b, h, fw :: geo.stride_w]
                        if geo.stride_w == 1:
                            line_1 = raw[c, first + b, h]
                            _pack_row(
                                line_1[:columns],
                                scale[c, first + b],
                                shift[c, first + b],
                                relu,
                                buffer[at:],
                                geo.group,
                            )
                        else:
                            for j in range(min(columns, len(line))):
                                buffer[at + j * geo.group] = active(
                                    line[j], scale[c, first + b], shift[c, first + b], relu
                                )
                    else:
                        for j in range(columns):
                            buffer[at + j * geo.group] = 0


@kernel
def _pack_gradient(
    grad: Array, raw: Array, lines: Array, first: int, geo: Geometry, c: int, buffer: Array
) -> float:
    """Fill channel ``c`` of the gradient buffer with ``a * grad + b * raw + d``; returns the sum of what it holds.

    lines: (3, channels, n): a, b, d, the backward pass of the norm behind the convolution; empty where there is none.
    """
    n = grad.shape[1]
    total = 0.0
    for b in range(geo.group):
        start = c * geo.plane + geo.high_h * geo.row + geo.high_w * geo.group + b
        for i in range(geo.out_h):
            target = buffer[start + i * geo.row :]
            if first + b >= n:
                for j in range(geo.out_w):
                    target[j * geo.group] = 0
                continue
            g = grad[c, first + b, i]
            if lines.shape[1]:
                y = raw[c, first + b, i]
                a, k, d = lines[0, c, first + b], lines[1, c, first + b], lines[2, c, first + b]
                if geo.group == 1:
                    for j in range(geo.out_w):
                        target[j] = a * g[j] + k * y[j] + d
                else:
                    for j in range(geo.out_w):
                        target[j * geo.group] = a * g[j] + k * y[j] + d
            elif geo.group == 1:
                for j in range(geo.out_w):
                    target[j] = g[j]
            else:
                for j in range(geo.out_w):
                    target[j * geo.group] = g[j]
            part = np.float32(0.0)
            for j in range(geo.out_w):
                part += target[j * geo.group]
            total += part
    return total


# ------------------------------------------------------------------------------------------------- convolution


@kernel
def conv_forward(
    raw: Array,
    scale: Array,
    shift: Array,
    relu: bool,
    positions: Array,
    values: Array,
    bias: Array,
    geo: Geometry,
    out: Array,
    sums: Array,
) -> None:
    """``out`` (outputs, n, out_h, out_w) = convolution of act(raw * scale + shift) + bias.

    raw: (inputs, n, height, width); scale, shift: (inputs, n), what the norm before does; bias: (outputs,) or empty.
    sums: (2, outputs, n) float64, gets sums of outputs and of their squares; not written where it is empty.
    """
    n = raw.shape[1]
    offsets, begins = _pattern(positions, geo)
    buffer = np.zeros(geo.inputs * geo.stride_h * geo.stride_w * geo.plane, np.float32)
    line = np.empty(geo.plane + 8 * LANES, np.float32)
    runs, run = _runs(geo, geo.out_h, geo.out_w)
    for first in range(0, n, geo.group):
        for c in range(geo.inputs):
            _pack_input(raw, scale, shift, relu, first, geo, c, buffer)
        for r in range(geo.outputs):
            k = begins[r]
            _rows_sum(offsets, values, k, begins[r + 1] - k, buffer, 0, line, runs, geo.row, run)
            constant = bias[r] if len(bias) else np.float32(0.0)
            for b in range(min(geo.group, n - first)):
                s1, s2 = 0.0, 0.0
                for i in range(geo.out_h):
                    target = out[r, first + b, i]
                    source = line[i * geo.row + b :]
                    if geo.group == 1:
                        for j in range(geo.out_w):
                            target[j] = source[j] + constant
                    else:
                        for j in range(geo.out_w):
                            target[j] = source[j * geo.group] + constant
                    if sums.shape[1]:
                        for j in range(geo.out_w):
                            v = np.float64(target[j])
                            s1 += v
                            s2 += v * v
                if sums.shape[1]:
                    sums[0, r, first + b] = s1
                    sums[1, r, first + b] = s2


@kernel
def _finish_row(
    z: Array, step: int, before: Array, raw: Array, scale: float, shift: float, relu: bool, out: Array
) -> tuple[float, float]:
    """``out = (z + before) * relu'``: a row of a gradient; returns its sum and that of its products with ``raw``."""
    s1, s2 = 0.0, 0.0
    for j in range(len(out)):
        v = z[j * step]
        if len(before):
            v += before[j]
        if relu and not raw[j] * scale + shift > 0:
            v = np.float32(0.0)
        out[j] = v
        s1 += np.float64(v)
        s2 += np.float64(v) * np.float64(raw[j])
    return s1, s2


@kernel
def conv_backward(
    raw: Array,
    scale: Array,
    shift: Array,
    relu: bool,
    positions: Array,
    values: Array,
    grad: Array,
    out: Array,
    lines: Array,
    geo: Geometry,
    d_values: Array,
    d_bias: Array,
    before: Array,
    d_raw: Array,
    last: bool,
    sums: Array,
) -> None:
    """All gradients of :func:`conv_forward` at once.

    grad: (outputs, n, out_h, out_w), of what follows the convolution's norm, with ``lines`` as in ``_pack_gradient`` and
    ``out`` the forward result (empty without a norm). d_values: (kept,), d_bias: (outputs,) or empty.
    d_raw: (inputs, n, height, width), or empty where no input gradient is wanted: gets ``before`` (empty = 0; may be
    ``d_raw``) plus the gradient of the activation; with ``last`` the ReLU's derivative is applied and ``sums``
    (2, inputs, n) gets the sums of the result and of its products with ``raw``.
    """
    n = raw.shape[1]
    offsets, begins = _pattern(positions, geo)
    phases = geo.stride_h * geo.stride_w
    buffer = np.zeros(geo.inputs * phases * geo.plane, np.float32)
    gradient = np.zeros(geo.outputs * geo.plane, np.float32)
    runs, run = _runs(geo, geo.out_h, geo.out_w)
    corner = geo.high_h * geo.row + geo.high_w * geo.group
    wants = d_raw.shape[0] > 0
    back, turned, starts = _transposed(positions, values, geo)
    back_runs, back_run = _runs(geo, geo.phase_h, geo.phase_w)
    line = np.empty(geo.plane + 8 * LANES, np.float32)
    nothing = np.empty(0, np.float32)
    for k in range(len(d_values)):
        d_values[k] = 0
    for r in range(len(d_bias)):
        d_bias[r] = 0
    for first in range(0, n, geo.group):
        for c in range(geo.inputs):
            _pack_input(raw, scale, shift, relu, first, geo, c, buffer)
        for r in range(geo.outputs):
            total = _pack_gradient(grad, out, lines, first, geo, r, gradient)
            if len(d_bias):
                d_bias[r] += total
            _rows_dot(
                offsets, begins[r], begins[r + 1], buffer, gradient, r * geo.plane + corner, runs, geo.row, run, d_values
            )
        if not wants:
            continue
        for c in range(geo.inputs):
            s = np.zeros((2, geo.group))
            for f in range(phases):
                fh, fw = divmod(f, geo.stride_w)
                k = starts[c * phases + f]
                count = starts[c * phases + f + 1] - k
                _rows_sum(back, turned, k, count, gradient, 0, line, back_runs, geo.row, back_run)
                for b in range(min(geo.group, n - first)):
                    a, d = scale[c, first + b], shift[c, first + b]
                    for i in range(geo.phase_h):
                        h = i * geo.stride_h + fh
                        if h >= geo.height:
                            break
                        target = d_raw[c, first + b, h, fw :: geo.stride_w]
                        held = before[c, first + b, h, fw :: geo.stride_w] if before.shape[0] else nothing
                        source = line[i * geo.row + b :]
                        if last:
                            y = raw[c, first + b, h, fw :: geo.stride_w]
                            s1, s2 = _finish_row(source, geo.group, held, y, a, d, relu, target)
                            s[0, b] += s1
                            s[1, b] += s2
                        elif len(held):
                            for j in range(len(target)):
                                target[j] = held[j] + source[j * geo.group]
                        else:
                            for j in range(len(target)):
                                target[j] = source[j * geo.group]
            if last:
                for b in range(min(geo.group, n - first)):
                    sums[0, c, first + b] = s[0, b]
                    sums[1, c, first + b] = s[1, b]
