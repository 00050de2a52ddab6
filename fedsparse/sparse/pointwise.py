"""What lies between convolutions: sums, pools, flattening and the sums that norms need, compiled with numba.

Activations are ``[channels, n, height, width]`` float32. An operand comes as ``raw, scale, shift, relu``: the value is
``act(raw * scale + shift)`` with scale and shift of shape (channels, n), so that norms and ReLUs are never stored. Sums
are taken in float64.
"""

from __future__ import annotations

import numpy as np

from fedsparse.sparse.kernels import Array, active, kernel, row, tail

Window = tuple[int, int, int, int, int, int]


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
                    if relu and not y[j] * a + d > 0:
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


@kernel
def _reach(taps: int, step: int, pad: int, size: int, count: int) -> tuple[int, int, int]:
    """For tap number ``taps`` of a window: its first position, and which windows have it inside the image."""
    start = taps - pad
    first = max(0, -(start // step)) if start < 0 else 0
    return start, first, min(count, (size - 1 - start) // step + 1)


@kernel
def max_pool(raw: Array, scale: Array, shift: Array, relu: bool, window: Window, out: Array) -> None:
    """Window: kernel height and width, stride, padding. NaN is the largest value, as in torch."""
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
def _halve_backward(raw: Array, scale: Array, shift: Array, relu: bool, grad: Array, out: Array) -> None:
    """:func:`max_pool_backward` for windows of 2 x 2 that do not overlap."""
    zero = np.float32(0.0)
    for c in range(grad.shape[0]):
        for n in range(grad.shape[1]):
            a, d = scale[c, n], shift[c, n]
            for i in range(grad.shape[2]):
                top, low = row(raw, c, n, 2 * i), row(raw, c, n, 2 * i + 1)
                to_top, to_low = row(out, c, n, 2 * i), row(out, c, n, 2 * i + 1)
                g = row(grad, c, n, i)
                for j in range(len(g)):
                    z0, z1 = active(top[2 * j], a, d, relu), active(top[2 * j + 1], a, d, relu)
                    z2, z3 = active(low[2 * j], a, d, relu), active(low[2 * j + 1], a, d, relu)
                    first, second = max(z0, z1), max(z2, z3)
                    upper = first >= second
                    to_top[2 * j] = g[j] if upper and z0 >= z1 else zero
                    to_top[2 * j + 1] = g[j] if upper and not z0 >= z1 else zero
                    to_low[2 * j] = g[j] if not upper and z2 >= z3 else zero
                    to_low[2 * j + 1] = g[j] if not upper and not z2 >= z3 else zero


@kernel
def max_pool_backward(
    raw: Array, scale: Array, shift: Array, relu: bool, window: Window, best: Array, grad: Array, out: Array
) -> None:
    """``out`` gets each window's gradient at its largest value (the first of equals), zero elsewhere.

    best: the pool's output.
    """
    kh, kw, sh, sw, ph, pw = window
    out[:] = 0
    if window == (2, 2, 2, 2, 0, 0):
        _halve_backward(raw, scale, shift, relu, grad, out)
        return
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
                            to[j * sw + start] += left[j] if hit else np.float32(0.0)
                            left[j] = np.float32(0.0) if hit else left[j]
