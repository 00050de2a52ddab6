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

All compiled code stands in this file: numba recompiles what it keeps on disk when this file changes, not when another
does.
Every kernel runs on one thread, releases the GIL and has a fixed order of summation: the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import extending, njit, types
from numba.core import cgutils

Array = Any  # a NumPy array inside compiled code
Real = Any  # a float32 or float64 there
Window = tuple[int, int, int, int, int, int]  # kernel height and width, stride, padding
intrinsic: Any = extending.intrinsic  # compiled functions call these with one argument less

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Floats in a vector register; run lengths are multiples of it."""

_FAST = {"reassoc", "nsz", "arcp"}
"""Not nnan, not ninf: a NaN must stay visible. Not contract: where all values of a channel are equal and its norm's
bias is 0, ``raw * scale + shift`` is 0 only if the product is rounded as it was for the shift."""

_FLAGS = ("contract", "reassoc", "nsz")
_FLOAT, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


class Geometry(NamedTuple):
    """A convolution's shapes and the layout of its tile buffers; lengths in floats.

    group: examples a tile. low, high: border cells before and behind, in cells of a phase. row, plane: from one buffer
    row or phase to the next. runs, run: how many runs cover the output of a channel, ``row`` apart, and their length:
    one a row, or a single one over all rows with their border columns. back_runs, back_run: the same for a phase of
    the input.
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
    runs: int
    run: int
    back_runs: int
    back_run: int


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
    enough = 1 if outs[1] >= 2 * LANES else -(-8 * LANES // outs[1])  # examples for runs that are worth their start
    tiles = -(-batch // max(1, min(batch, cache // per_example, enough)))
    group = -(-batch // tiles)
    run = _round(outs[1] * group)
    row = max(columns * group, run)
    flat = outs[0] > 1 and row * (outs[0] - 1) + run < 1.1 * outs[0] * _cost(run)
    (height, width), (kernel_h, kernel_w), (stride_h, stride_w) = size, kernel, stride
    return Geometry(
        inputs=inputs,
        height=height,
        width=width,
        outputs=outputs,
        out_h=outs[0],
        out_w=outs[1],
        kernel_h=kernel_h,
        kernel_w=kernel_w,
        stride_h=stride_h,
        stride_w=stride_w,
        pad_h=padding[0],
        pad_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        group=group,
        low_h=lows[0],
        low_w=lows[1],
        high_h=highs[0],
        high_w=highs[1],
        phase_h=phase[0],
        phase_w=phase[1],
        row=row,
        plane=rows * row + (LANES if flat else 0),  # a single run may end behind the last row
        runs=1 if flat else outs[0],
        run=_round(row * (outs[0] - 1) + outs[1] * group) if flat else run,
        back_runs=1 if flat else phase[0],
        back_run=_round((row * (phase[0] - 1) if flat else 0) + phase[1] * group),
    )


def _round(n: int) -> int:
    return -(-n // LANES) * LANES


def _cost(run: int) -> float:
    """What a run costs, in floats of a long run: short blocks pay for the list of non-zeros again."""
    blocks, rest = divmod(run // LANES, 8)
    return LANES * (8 * blocks + (rest + 2.0 if rest else 0.0))


# ------------------------------------------------------------------------------------------------- inner loops


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _bare(context: Any, builder: Any, kind: Any, data: Any, length: Any) -> Any:
    """A one-dimensional array over memory that another array owns, without a reference to count."""
    array = context.make_array(kind)(context, builder)
    size = context.get_constant(types.intp, 4)
    context.populate_array(array, data=data, shape=[length], strides=[size], itemsize=size, meminfo=None)
    return array._getvalue()


@intrinsic
def row(_: Any, array: Any, c: Any, n: Any, i: Any) -> Any:
    """``array[c, n, i]`` of a contiguous array of four axes. NumPy's own slices count references, with a bus lock
    each: in loops over short rows that costs as much as the work."""
    line = types.Array(array.dtype, 1, "C")
    signature = line(array, types.int64, types.int64, types.int64)

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = context.make_array(sig.args[0])(context, builder, args[0])
        sizes = cgutils.unpack_tuple(builder, whole.shape, 4)
        at = builder.add(builder.mul(args[1], sizes[1]), args[2])
        at = builder.mul(builder.add(builder.mul(at, sizes[2]), args[3]), sizes[3])
        return _bare(context, builder, sig.return_type, builder.gep(whole.data, [at]), sizes[3])

    return signature, code


@intrinsic
def tail(_: Any, array: Any, start: Any) -> Any:
    """``array[start:]`` of a contiguous array of one axis, as :func:`row`."""
    signature = types.Array(array.dtype, 1, "C")(array, types.int64)

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = context.make_array(sig.args[0])(context, builder, args[0])
        (size,) = cgutils.unpack_tuple(builder, whole.shape, 1)
        data = builder.gep(whole.data, [args[1]])
        return _bare(context, builder, sig.return_type, data, builder.sub(size, args[1]))

    return signature, code


def _load(builder: Any, pointer: Any, lanes: int) -> Any:
    """A vector of floats from an address without alignment."""
    at = builder.gep(pointer, [_I64(lanes)])
    return builder.load(builder.bitcast(at, _VECTOR.as_pointer()), align=4)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FLAGS), c, flags=_FLAGS)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums over the lanes of 1, 2, 4 or 8 vectors, as one vector with a lane for each.

    Pairs are folded into one vector each until one is left, whose lanes are then folded in halves.
    """
    width = vectors[0].type.count
    step = 1
    while len(vectors) > 1:  # of each pair, lanes that differ in this bit are added; a's result takes the 0 side
        even = [i if not i & step else i - step + width for i in range(width)]
        odd = [i + step if not i & step else i + width for i in range(width)]
        vectors = [
            builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd), flags=_FLAGS)
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        step *= 2
    (total,) = vectors
    while total.type.count > step:
        half = total.type.count // 2
        low, high = list(range(half)), list(range(half, 2 * half))
        total = builder.fadd(_shuffle(builder, total, total, low), _shuffle(builder, total, total, high), flags=_FLAGS)
    return total


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
            part = _lane_sums(builder, [builder.load(total) for total in totals])
            at = builder.bitcast(result, part.type.as_pointer())
            builder.store(builder.fadd(builder.load(at, align=4), part, flags=_FLAGS), at, align=4)
            return context.get_dummy_value()

        return signature, code

    return dots


_sums8, _sums4, _sums1 = _sums(8), _sums(4), _sums(1)
_dots8, _dots4, _dots1 = _dots(8), _dots(4), _dots(1)


_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at first call; keep the result on disk where a folder for it can be written.

    Kernels call inlined functions, never each other: compiled code that calls other compiled code finds one copy of it
    in the process that compiles it and another one in those that read it from the disk, and the two may sum in another
    order.
    """
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder to write to
        return njit(**_OPTIONS)(function)


inlined = njit(forceinline=True, **_OPTIONS)
"""What kernels share: it becomes a piece of each kernel that calls it."""


@inlined
def _rows_sum(
    offsets: Array, values: Array, start: int, n: int, x: Array, y: Array, runs: int, row: int, run: int
) -> None:
    """An output row: ``runs`` runs of ``run`` floats, ``row`` apart."""
    for i in range(runs):
        at, end = i * row, i * row + run
        while at + 8 * LANES <= end:
            _sums8(offsets, values, start, n, x, at, y, at)
            at += 8 * LANES
        if at + 4 * LANES <= end:
            _sums4(offsets, values, start, n, x, at, y, at)
            at += 4 * LANES
        while at < end:
            _sums1(offsets, values, start, n, x, at, y, at)
            at += LANES


@inlined
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


@lru_cache(maxsize=256)
def _taps(geo: Geometry) -> Array:
    """For each tap of the kernel: its phase, and its offset in a channel of the input and of the gradient buffer.

    (3, kernel_h * kernel_w) int64. A tap reads input = stride * (output + shift) + phase.
    """
    down, across = (np.arange(k) * d - p for k, d, p in _axes(geo))
    fh, fw = (down % geo.stride_h)[:, None], (across % geo.stride_w)[None]
    dh, dw = (down // geo.stride_h)[:, None], (across // geo.stride_w)[None]
    phase = fh * geo.stride_w + fw
    ahead = phase * geo.plane + (dh + geo.low_h) * geo.row + (dw + geo.low_w) * geo.group
    back = (geo.high_h - dh) * geo.row + (geo.high_w - dw) * geo.group
    return np.stack([phase.ravel(), ahead.ravel(), back.ravel()]).astype(np.int64)


def _axes(geo: Geometry) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (geo.kernel_h, geo.dilation_h, geo.pad_h), (geo.kernel_w, geo.dilation_w, geo.pad_w)


def _begins(positions: Array, geo: Geometry) -> Array:
    """Where each output row begins in ``positions``: (outputs + 1,) int64."""
    cells = geo.inputs * geo.kernel_h * geo.kernel_w
    return np.searchsorted(positions, np.arange(geo.outputs + 1) * cells).astype(np.int64)


@inlined
def _channel(rest: int, taps: int, per_tap: Real) -> int:
    """``rest // taps``. Exact for 31-bit numbers, and several times as fast as a 64-bit division."""
    return rest if taps == 1 else int((rest + 0.5) * per_tap)


@inlined
def _offsets(positions: Array, begins: Array, taps: Array, geo: Geometry) -> Array:
    """Where in the input buffer each non-zero reads, (kept,) int32."""
    count = taps.shape[1]
    offsets = np.empty(len(positions), np.int32)
    channel = geo.stride_h * geo.stride_w * geo.plane
    for r in range(geo.outputs):
        for k in range(begins[r], begins[r + 1]):
            rest = positions[k] - r * geo.inputs * count
            c = _channel(rest, count, 1.0 / count)
            offsets[k] = c * channel + taps[1, rest - c * count]
    return offsets


@inlined
def _transposed(positions: Array, values: Array, rows: Array, taps: Array, geo: Geometry) -> tuple[Array, Array, Array]:
    """The pattern of the input gradient, whose rows are (input channel, phase): where in the gradient buffer each
    non-zero reads, the values in that order, and where the rows begin. rows: the begins of the output rows."""
    count = taps.shape[1]
    phases = geo.stride_h * geo.stride_w
    channels = np.empty(len(positions), np.int32)
    begins = np.zeros(geo.inputs * phases + 1, np.int64)
    for r in range(geo.outputs):
        for k in range(rows[r], rows[r + 1]):
            rest = positions[k] - r * geo.inputs * count
            c = _channel(rest, count, 1.0 / count)
            channels[k] = c
            begins[c * phases + taps[0, rest - c * count] + 1] += 1
    for place in range(geo.inputs * phases):
        begins[place + 1] += begins[place]
    free = begins.copy()
    offsets = np.empty(len(positions), np.int32)
    turned = np.empty(len(positions), np.float32)
    for r in range(geo.outputs):
        for k in range(rows[r], rows[r + 1]):
            tap = positions[k] - (r * geo.inputs + channels[k]) * count
            place = channels[k] * phases + taps[0, tap]
            offsets[free[place]] = r * geo.plane + taps[2, tap]
            turned[free[place]] = values[k]
            free[place] += 1
    return offsets, turned, begins


# ------------------------------------------------------------------------------------------------- tile buffers


@inlined
def active(v: Real, scale: Real, shift: Real, relu: bool) -> Real:
    z = v * scale + shift
    return np.float32(0.0) if relu and z < 0 else z  # a NaN passes


@inlined
def _pack_row(
    source: Array, step: int, count: int, scale: Real, shift: Real, relu: bool, target: Array, pitch: int
) -> None:
    """Every ``step``-th float of a row through its norm and ReLU, to every ``pitch``-th of the target."""
    if step == 1 and pitch == 1:
        if relu:
            for j in range(count):
                z = source[j] * scale + shift
                target[j] = np.float32(0.0) if z < 0 else z
        else:
            for j in range(count):
                target[j] = source[j] * scale + shift
    else:
        for j in range(count):
            target[j * pitch] = active(source[j * step], scale, shift, relu)


@inlined
def _pack_input(
    raw: Array, scale: Array, shift: Array, relu: bool, first: int, geo: Geometry, c: int, buffer: Array
) -> None:
    """Fill channel ``c`` of the input buffer with the examples from ``first`` on; missing ones are zero."""
    rows = min(geo.phase_h, geo.out_h + geo.high_h)
    columns = min(geo.phase_w, geo.out_w + geo.high_w)
    for b in range(geo.group):
        there = first + b < raw.shape[1]
        a, d = (scale[c, first + b], shift[c, first + b]) if there else (np.float32(0.0), np.float32(0.0))
        for fh in range(geo.stride_h):
            for fw in range(geo.stride_w):
                start = ((c * geo.stride_h + fh) * geo.stride_w + fw) * geo.plane
                start += geo.low_h * geo.row + geo.low_w * geo.group + b
                count = min(columns, (geo.width - fw + geo.stride_w - 1) // geo.stride_w)
                for i in range(min(rows, (geo.height - fh + geo.stride_h - 1) // geo.stride_h)):
                    target = tail(buffer, start + i * geo.row)
                    if there:
                        source = tail(row(raw, c, first + b, i * geo.stride_h + fh), fw)
                        _pack_row(source, geo.stride_w, count, a, d, relu, target, geo.group)
                    else:
                        for j in range(count):
                            target[j * geo.group] = 0


@inlined
def _pack_gradient(grad: Array, raw: Array, lines: Array, first: int, geo: Geometry, c: int, buffer: Array) -> Real:
    """Fill channel ``c`` of the gradient buffer with ``a * grad + b * raw + d``; returns the sum of what it holds.

    lines: (3, channels, n): a, b, d, the backward pass of the norm behind the convolution; empty where there is none.
    """
    total = 0.0
    for b in range(geo.group):
        start = c * geo.plane + geo.high_h * geo.row + geo.high_w * geo.group + b
        there = first + b < grad.shape[1]
        a, k, d = np.float32(1.0), np.float32(0.0), np.float32(0.0)
        if there and lines.shape[1]:
            a, k, d = lines[0, c, first + b], lines[1, c, first + b], lines[2, c, first + b]
        for i in range(geo.out_h):
            target = tail(buffer, start + i * geo.row)
            if not there:
                for j in range(geo.out_w):
                    target[j * geo.group] = 0
                continue
            g = row(grad, c, first + b, i)
            y = row(raw, c, first + b, i) if lines.shape[1] else g
            part: Real = np.float32(0.0)
            if geo.group == 1:
                for j in range(geo.out_w):
                    v = a * g[j] + k * y[j] + d
                    target[j] = v
                    part += v
            else:
                for j in range(geo.out_w):
                    v = a * g[j] + k * y[j] + d
                    target[j * geo.group] = v
                    part += v
            total += part
    return total


# ------------------------------------------------------------------------------------------------- convolution


@inlined
def _unpack_output(line: Array, r: int, first: int, geo: Geometry, constant: Real, out: Array, sums: Array) -> None:
    """Write one output channel of a tile, and its sums for the norm behind."""
    count = min(geo.group, out.shape[1] - first)
    for b in range(count):
        s1, s2 = 0.0, 0.0
        for i in range(geo.out_h):
            target = row(out, r, first + b, i)
            source = tail(line, i * geo.row + b)
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

    raw: (inputs, n, height, width); scale, shift: (inputs, n), what the norm before does; positions: (kept,) int32,
    ascending in the flat (outputs, inputs, kernel_h, kernel_w) weight; values: (kept,); bias: (outputs,) or empty.
    sums: (2, outputs, n) float64, gets sums of outputs and of their squares; not written where it is empty.
    """
    begins, taps = _begins(positions, geo), _taps(geo)
    _forward(raw, scale, shift, relu, positions, begins, taps, values, bias, geo, out, sums)


@kernel
def _forward(
    raw: Array,
    scale: Array,
    shift: Array,
    relu: bool,
    positions: Array,
    begins: Array,
    taps: Array,
    values: Array,
    bias: Array,
    geo: Geometry,
    out: Array,
    sums: Array,
) -> None:
    n = raw.shape[1]
    offsets = _offsets(positions, begins, taps, geo)
    buffer = np.zeros(geo.inputs * geo.stride_h * geo.stride_w * geo.plane + LANES, np.float32)
    line = np.empty(geo.plane + 8 * LANES, np.float32)
    for first in range(0, n, geo.group):
        for c in range(geo.inputs):
            _pack_input(raw, scale, shift, relu, first, geo, c, buffer)
        for r in range(geo.outputs):
            k = begins[r]
            _rows_sum(offsets, values, k, begins[r + 1] - k, buffer, line, geo.runs, geo.row, geo.run)
            constant = bias[r] if len(bias) else np.float32(0.0)
            _unpack_output(line, r, first, geo, constant, out, sums)


@inlined
def _finish_row(
    z: Array,
    pitch: int,
    held: Array,
    raw: Array,
    step: int,
    count: int,
    scale: Real,
    shift: Real,
    relu: bool,
    out: Array,
) -> tuple[Real, Real]:
    """``out = (z + held) * relu'``: a row of a gradient; returns its sum and that of its products with ``raw``.

    pitch: of z; step: of held, raw and out; an empty ``held`` is zero.
    """
    s1, s2 = 0.0, 0.0
    if pitch == 1 and step == 1:  # the same with strides that the compiler can vectorise
        for j in range(count):
            v = z[j]
            if len(held):
                v += held[j]
            if relu and raw[j] * scale + shift <= 0:
                v = np.float32(0.0)
            out[j] = v
            s1 += np.float64(v)
            s2 += np.float64(v) * np.float64(raw[j])
        return s1, s2
    for j in range(count):
        v = z[j * pitch]
        if len(held):
            v += held[j * step]
        if relu and raw[j * step] * scale + shift <= 0:  # as torch: at NaN the gradient passes
            v = np.float32(0.0)
        out[j * step] = v
        s1 += np.float64(v)
        s2 += np.float64(v) * np.float64(raw[j * step])
    return s1, s2


@inlined
def _unpack_gradient(
    line: Array,
    c: int,
    phase: int,
    first: int,
    geo: Geometry,
    raw: Array,
    scale: Array,
    shift: Array,
    relu: bool,
    before: Array,
    d_raw: Array,
    last: bool,
    sums: Array,
) -> None:
    """Write one phase of one input channel of a tile: see :func:`conv_backward`."""
    count = min(geo.group, raw.shape[1] - first)
    fh, fw = divmod(phase, geo.stride_w)
    width = (geo.width - fw + geo.stride_w - 1) // geo.stride_w
    for b in range(count):
        a, d = scale[c, first + b], shift[c, first + b]
        total, product = 0.0, 0.0
        for i in range((geo.height - fh + geo.stride_h - 1) // geo.stride_h):
            h = i * geo.stride_h + fh
            to = tail(row(d_raw, c, first + b, h), fw)
            held = tail(row(before, c, first + b, h), fw) if before.shape[0] else tail(line, len(line))
            z = tail(line, i * geo.row + b)
            if last:
                y = tail(row(raw, c, first + b, h), fw)
                s1, s2 = _finish_row(z, geo.group, held, y, geo.stride_w, width, a, d, relu, to)
                total += s1
                product += s2
            elif len(held):
                for j in range(width):
                    to[j * geo.stride_w] = held[j * geo.stride_w] + z[j * geo.group]
            else:
                for j in range(width):
                    to[j * geo.stride_w] = z[j * geo.group]
        if last:
            sums[0, c, first + b] += total
            sums[1, c, first + b] += product


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

    grad: (outputs, n, out_h, out_w), of what follows the convolution's norm, with ``lines`` as in ``_pack_gradient``
    and ``out`` the forward result (empty without a norm). d_values: (kept,), d_bias: (outputs,) or empty.
    d_raw: (inputs, n, height, width), or empty where no input gradient is wanted: gets ``before`` (empty = 0; may be
    ``d_raw``) plus the gradient of the activation; with ``last`` the ReLU's derivative is applied and ``sums``
    (2, inputs, n) gets the sums of the result and of its products with ``raw``.
    """
    begins, taps = _begins(positions, geo), _taps(geo)
    d_values[:] = 0
    d_bias[:] = 0
    if last:
        sums[:] = 0
    _backward(
        raw, scale, shift, relu, positions, begins, taps, values, grad, out, lines, geo,
        d_values, d_bias, before, d_raw, last, sums,
    )  # fmt: skip


@kernel
def _backward(
    raw: Array,
    scale: Array,
    shift: Array,
    relu: bool,
    positions: Array,
    begins: Array,
    taps: Array,
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
    offsets = _offsets(positions, begins, taps, geo)
    phases = geo.stride_h * geo.stride_w
    buffer = np.zeros(geo.inputs * phases * geo.plane + LANES, np.float32)
    gradient = np.zeros(geo.outputs * geo.plane + LANES, np.float32)
    line = np.empty(geo.plane + 8 * LANES, np.float32)
    corner = geo.high_h * geo.row + geo.high_w * geo.group
    wants = d_raw.shape[0] > 0
    back, turned, starts = _transposed(positions, values, begins, taps, geo)
    for first in range(0, raw.shape[1], geo.group):
        for c in range(geo.inputs):
            _pack_input(raw, scale, shift, relu, first, geo, c, buffer)
        for r in range(geo.outputs):
            total = _pack_gradient(grad, out, lines, first, geo, r, gradient)
            if len(d_bias):
                d_bias[r] += total
            at = r * geo.plane + corner
            _rows_dot(offsets, begins[r], begins[r + 1], buffer, gradient, at, geo.runs, geo.row, geo.run, d_values)
        if wants:
            for c in range(geo.inputs):
                for f in range(phases):
                    k = starts[c * phases + f]
                    count = starts[c * phases + f + 1] - k
                    _rows_sum(back, turned, k, count, gradient, line, geo.back_runs, geo.row, geo.back_run)
                    _unpack_gradient(line, c, f, first, geo, raw, scale, shift, relu, before, d_raw, last, sums)


# ------------------------------------------------------------------------------------------------- between convolutions

# An operand comes as ``raw, scale, shift, relu``: its value is ``act(raw * scale + shift)``.


@kernel
def moments(a: Array, b: Array, sums: Array) -> None:
    """``sums`` (2, channels, n): for each channel and example the sums of ``a`` and of ``a * b``."""
    for c in range(a.shape[0]):
        for n in range(a.shape[1]):
            s1, s2 = 0.0, 0.0
            for i in range(a.shape[2]):
                x, y = row(a, c, n, i), row(b, c, n, i)
                for j in range(len(x)):
                    v = np.float64(x[j])
                    s1 += v
                    s2 += v * np.float64(y[j])
            sums[0, c, n] = s1
            sums[1, c, n] = s2


@kernel
def finish(
    z: Array, before: Array, raw: Array, scale: Array, shift: Array, relu: bool, out: Array, sums: Array
) -> None:
    """``out = (z + before) * relu'(raw * scale + shift)``, and the sums of ``out`` and of ``out * raw``.

    before: empty for none. ``out`` may be ``z`` or ``before``.
    """
    for c in range(z.shape[0]):
        for n in range(z.shape[1]):
            s1, s2 = 0.0, 0.0
            a, d = scale[c, n], shift[c, n]
            for i in range(z.shape[2]):
                g, y, to = row(z, c, n, i), row(raw, c, n, i), row(out, c, n, i)
                held = row(before, c, n, i) if before.shape[0] else tail(g, len(g))
                for j in range(len(g)):
                    v = g[j]
                    if len(held):
                        v += held[j]
                    if relu and y[j] * a + d <= 0:
                        v = np.float32(0.0)
                    to[j] = v
                    s1 += np.float64(v)
                    s2 += np.float64(v) * np.float64(y[j])
            sums[0, c, n] = s1
            sums[1, c, n] = s2


@kernel
def add(
    a: Array, a_scale: Array, a_shift: Array, a_relu: bool,
    b: Array, b_scale: Array, b_shift: Array, b_relu: bool,
    out: Array,
) -> None:  # fmt: skip
    """The sum of two operands."""
    for c in range(out.shape[0]):
        for n in range(out.shape[1]):
            p, q, r, s = a_scale[c, n], a_shift[c, n], b_scale[c, n], b_shift[c, n]
            for i in range(out.shape[2]):
                x, y, to = row(a, c, n, i), row(b, c, n, i), row(out, c, n, i)
                for j in range(len(to)):
                    to[j] = active(x[j], p, q, a_relu) + active(y[j], r, s, b_relu)


@kernel
def values_of(raw: Array, scale: Array, shift: Array, relu: bool, out: Array) -> None:
    """The operand itself; ``out`` has any layout."""
    for c in range(out.shape[0]):
        for n in range(out.shape[1]):
            a, d = scale[c, n], shift[c, n]
            for i in range(out.shape[2]):
                x, to = row(raw, c, n, i), out[c, n, i]
                for j in range(len(x)):
                    to[j] = active(x[j], a, d, relu)


@inlined
def _reach(taps: int, step: int, pad: int, size: int, count: int) -> tuple[int, int, int]:
    """For tap number ``taps`` of a window: its first position, and which windows have it inside the image."""
    start = taps - pad
    first = max(0, -(start // step)) if start < 0 else 0
    return start, first, min(count, (size - 1 - start) // step + 1)


@inlined
def _halve_row(top: Array, low: Array, a: Real, d: Real, best: Array) -> None:
    """The largest values of windows of 2 x 2 in two rows."""
    for j in range(len(best)):
        z = top[2 * j] * a + d
        for v in (top[2 * j + 1] * a + d, low[2 * j] * a + d, low[2 * j + 1] * a + d):
            z = v if (v > z) | (v != v) else z
        best[j] = z


_HALVES = (2, 2, 2, 2, 0, 0)  # the usual window, in loops that vectorise


def max_pool(raw: Array, scale: Array, shift: Array, relu: bool, window: Window, out: Array) -> None:
    """The largest value of each window, into ``out``. NaN is the largest value of all, as in torch."""
    if window == _HALVES:
        _halve(raw, scale, shift, relu, out)
    else:
        _max_pool(raw, scale, shift, relu, window, out)


@kernel
def _max_pool(raw: Array, scale: Array, shift: Array, relu: bool, window: Window, out: Array) -> None:
    kh, kw, sh, sw, ph, pw = window
    for c in range(out.shape[0]):
        for n in range(out.shape[1]):
            a, d = scale[c, n], shift[c, n]
            for i in range(out.shape[2]):
                best = row(out, c, n, i)
                best[:] = -np.inf
                for y in range(max(0, ph - i * sh), min(kh, raw.shape[2] + ph - i * sh)):
                    line = row(raw, c, n, i * sh - ph + y)
                    for x in range(kw):
                        start, first, end = _reach(x, sw, pw, raw.shape[3], out.shape[3])
                        for j in range(first, end):
                            z = active(line[j * sw + start], a, d, relu)
                            best[j] = z if z > best[j] or z != z else best[j]


@kernel
def _halve(raw: Array, scale: Array, shift: Array, relu: bool, out: Array) -> None:
    for c in range(out.shape[0]):
        for n in range(out.shape[1]):
            a, d = scale[c, n], shift[c, n]
            for i in range(out.shape[2]):
                best = row(out, c, n, i)
                _halve_row(row(raw, c, n, 2 * i), row(raw, c, n, 2 * i + 1), a, d, best)
                if relu:
                    for j in range(len(best)):
                        best[j] = np.float32(0.0) if best[j] < 0 else best[j]


def max_pool_backward(
    raw: Array, scale: Array, shift: Array, relu: bool, window: Window, best: Array, grad: Array, out: Array
) -> None:
    """``out`` gets each window's gradient at its largest value (the first of equals), zero elsewhere and where the ReLU
    is not active.

    best: the pool's output.
    """
    if window != _HALVES or out.shape[2] % 2 or out.shape[3] % 2:
        out[:] = 0  # else every place is written
    if window == _HALVES:
        _halve_backward(raw, scale, shift, relu, grad, out)
    else:
        _max_pool_backward(raw, scale, shift, relu, window, best, grad, out)


@kernel
def _halve_backward(raw: Array, scale: Array, shift: Array, relu: bool, grad: Array, out: Array) -> None:
    zero = np.float32(0.0)
    width = grad.shape[3]
    best, left = np.empty(width, np.float32), np.empty(width, np.float32)
    for c in range(grad.shape[0]):
        for n in range(grad.shape[1]):
            a, d = scale[c, n], shift[c, n]
            for i in range(grad.shape[2]):
                g = row(grad, c, n, i)
                _halve_row(row(raw, c, n, 2 * i), row(raw, c, n, 2 * i + 1), a, d, best)
                for j in range(width):
                    left[j] = zero if relu & (best[j] <= 0) else g[j]
                for y in range(2):
                    line, to = row(raw, c, n, 2 * i + y), row(out, c, n, 2 * i + y)
                    for j in range(width):
                        v = left[j]
                        first, second = line[2 * j] * a + d >= best[j], line[2 * j + 1] * a + d >= best[j]
                        rest = zero if first else v
                        to[2 * j] = v if first else zero
                        to[2 * j + 1] = rest if second else zero
                        left[j] = zero if second else rest


@kernel
def _max_pool_backward(
    raw: Array, scale: Array, shift: Array, relu: bool, window: Window, best: Array, grad: Array, out: Array
) -> None:
    kh, kw, sh, sw, ph, pw = window
    left = np.empty(grad.shape[3], np.float32)
    for c in range(grad.shape[0]):
        for n in range(grad.shape[1]):
            a, d = scale[c, n], shift[c, n]
            for i in range(grad.shape[2]):
                top = best[c, n, i]
                left[:] = row(grad, c, n, i)
                for y in range(max(0, ph - i * sh), min(kh, raw.shape[2] + ph - i * sh)):
                    line, to = row(raw, c, n, i * sh - ph + y), row(out, c, n, i * sh - ph + y)
                    for x in range(kw):
                        start, first, end = _reach(x, sw, pw, raw.shape[3], grad.shape[3])
                        for j in range(first, end):
                            hit = active(line[j * sw + start], a, d, relu) == top[j]
                            gone = relu and top[j] <= 0
                            to[j * sw + start] += left[j] if hit and not gone else np.float32(0.0)
                            left[j] = np.float32(0.0) if hit else left[j]


@inlined
def _larger(v: Real, place: int, best: Real, at: Any) -> tuple[Real, Any]:
    more = (v > best) | (v != v)
    return (v if more else best), (np.int32(place) if more else at)


@kernel
def halve(x: Array, relu: bool, out: Array, places: Array) -> None:
    """``out`` gets the largest value of each window of 2 x 2, or its ReLU, ``places`` where in its image it is.

    x: any two axes before height and width; a last row or column of an odd size is in no window. places: int32, the
    first of equals, ``~place`` where the ReLU is not active. NaN is the largest value of all, as in torch.
    """
    width = np.int32(x.shape[3])
    for c in range(out.shape[0]):
        for n in range(out.shape[1]):
            for i in range(out.shape[2]):
                top, low = row(x, c, n, 2 * i), row(x, c, n, 2 * i + 1)
                best, place = row(out, c, n, i), row(places, c, n, i)
                for j in range(len(best)):
                    z, k = top[2 * j], np.int32(0)
                    z, k = _larger(top[2 * j + 1], 1, z, k)
                    z, k = _larger(low[2 * j], width, z, k)
                    z, k = _larger(low[2 * j + 1], width + 1, z, k)
                    k += np.int32(2 * i * width + 2 * j)
                    best[j] = np.float32(0.0) if relu & (z < 0) else z
                    place[j] = ~k if relu & (z <= 0) else k


@kernel
def halve_backward(grad: Array, places: Array, out: Array) -> None:
    """``out`` (images, height * width) gets each window's gradient at its place, and zero elsewhere.

    grad, places: (images, windows); see :func:`halve`.
    """
    for m in range(grad.shape[0]):
        for k in range(out.shape[1]):
            out[m, k] = np.float32(0.0)
        for j in range(grad.shape[1]):
            if places[m, j] >= 0:
                out[m, places[m, j]] = grad[m, j]
