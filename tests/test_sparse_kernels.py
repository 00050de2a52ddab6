"""Sparse convolutions against dense autograd in float64, on every kind of tile and run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from torch import Tensor
from torch.nn import functional

from fedsparse.seeding import numpy_rng
from fedsparse.sparse import kernels

Array = np.ndarray
Pair = tuple[int, int]
TOLERANCE = 1e-4  # of the largest magnitude
FENCE = 64  # floats on both sides of an array, NaN around what is read, a known number around what is written
MARK = 12345.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A convolution and how it is called. pattern: see :func:`draw_pattern`; before: "none", "other" or "same" (the
    gradient that was there is added in place); lines: a norm follows; last: the gradient goes through the ReLU."""

    inputs: int
    size: Pair
    outputs: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    batch: int = 3
    pattern: str = "half"
    relu: bool = True
    bias: bool = True
    lines: bool = True
    before: str = "other"
    last: bool = True
    cache: int = 1 << 20
    seed: int = 0

    @property
    def geometry(self) -> kernels.Geometry:
        return kernels.geometry(
            self.inputs,
            self.size,
            self.outputs,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            batch=self.batch,
            cache=self.cache,
        )


def draw_pattern(case: Case, rng: np.random.Generator) -> Array:
    """The kept positions: none, one, all of them, a part, or a part of every second row."""
    rows, columns = case.outputs, case.inputs * case.kernel[0] * case.kernel[1]
    density = {"none": 0.0, "one": 0.0, "few": 0.05, "some": 0.2, "half": 0.5, "rows": 0.5, "full": 1.0}[case.pattern]
    kept = rng.random((rows, columns)) < density
    if case.pattern == "rows":
        kept[::2] = False
    if case.pattern == "one":
        kept.reshape(-1)[rng.integers(kept.size)] = True
    return np.flatnonzero(kept).astype(np.int32)


class Fenced:
    """Arrays with a border in memory, so that what is read or written outside of them shows."""

    def __init__(self) -> None:
        self.outer: list[Array] = []

    def read(self, values: Array) -> Array:
        """A copy between NaNs."""
        outer = np.full(values.size + 2 * FENCE, np.nan, np.float32)
        inner = outer[FENCE : FENCE + values.size].reshape(values.shape)
        inner[...] = values
        return inner

    def write(self, *shape: int, dtype: type = np.float32) -> Array:
        """NaNs to overwrite, between marks."""
        size = int(np.prod(shape))
        outer = np.full(size + 2 * FENCE, MARK, dtype)
        self.outer.append(outer)
        inner = outer[FENCE : FENCE + size].reshape(shape)
        inner[...] = np.nan
        return inner

    def check(self) -> None:
        for outer in self.outer:
            assert (outer[:FENCE] == MARK).all() and (outer[-FENCE:] == MARK).all()


@dataclass
class Data:
    """What a case reads, and the arrays that it is to fill."""

    raw: Array
    scale: Array
    shift: Array
    positions: Array
    values: Array
    bias: Array
    grad: Array
    lines: Array
    before: Array
    fenced: Fenced


@dataclass
class Result:
    """What a case filled."""

    out: Array
    sums: Array
    d_values: Array
    d_bias: Array
    d_raw: Array
    d_sums: Array

    def arrays(self) -> list[Array]:
        return [self.out, self.sums, self.d_values, self.d_bias, self.d_raw, self.d_sums]


def grid(rng: np.random.Generator, step: float, *shape: int) -> Array:
    """Multiples of ``step`` in [-3, 3]: the activations are exact, so that none is on another side of the ReLU than
    in float64, and some are exactly 0."""
    return (rng.integers(-round(3 / step), round(3 / step) + 1, shape) * step).astype(np.float32)


def draw(case: Case) -> Data:
    rng, fenced, geo = numpy_rng("kernels", case.seed), Fenced(), case.geometry
    c, o, n = case.inputs, case.outputs, case.batch
    out_shape = (o, n, geo.out_h, geo.out_w)
    positions = draw_pattern(case, rng)
    wants = case.before != "unwanted"
    return Data(
        raw=fenced.read(grid(rng, 1 / 16, c, n, *case.size)),
        scale=fenced.read(grid(rng, 1 / 8, c, n)),
        shift=fenced.read(grid(rng, 1 / 16, c, n)),
        positions=positions,
        values=fenced.read(grid(rng, 1 / 8, len(positions))),
        bias=fenced.read(grid(rng, 1 / 8, o if case.bias else 0)),
        grad=fenced.read(grid(rng, 1 / 8, *out_shape)),
        lines=fenced.read(grid(rng, 1 / 8, 3, o, n)) if case.lines else np.empty((3, 0, 0), np.float32),
        before=fenced.read(grid(rng, 1 / 8, *((c, n, *case.size) if wants and case.before != "none" else [0] * 4))),
        fenced=fenced,
    )


def run_forward(case: Case, data: Data, *, with_sums: bool = True) -> tuple[Array, Array]:
    geo, write = case.geometry, data.fenced.write
    out = write(case.outputs, case.batch, geo.out_h, geo.out_w)
    sums = write(2, case.outputs, case.batch, dtype=np.float64) if with_sums else np.empty((2, 0, 0))
    operand = data.raw, data.scale, data.shift, case.relu
    kernels.conv_forward(*operand, data.positions, data.values, data.bias, geo, out, sums)
    data.fenced.check()
    return out, sums


def run_backward(case: Case, data: Data, out: Array) -> tuple[Array, Array, Array, Array]:
    write = data.fenced.write
    d_values, d_bias = write(len(data.values)), write(len(data.bias))
    d_sums = write(2, case.inputs, case.batch, dtype=np.float64)
    d_raw, before = write(*data.raw.shape), data.before
    if case.before == "unwanted":
        d_raw = np.empty((0, 0, 0, 0), np.float32)
    if case.before == "same":
        d_raw[...] = before
        before = d_raw
    kernels.conv_backward(
        data.raw, data.scale, data.shift, case.relu, data.positions, data.values, data.grad,
        out if case.lines else np.empty((0, 0, 0, 0), np.float32), data.lines, case.geometry,
        d_values, d_bias, before, d_raw, case.last, d_sums,
    )  # fmt: skip
    data.fenced.check()
    return d_values, d_bias, d_raw, d_sums


def run(case: Case, data: Data) -> Result:
    out, sums = run_forward(case, data)
    return Result(out, sums, *run_backward(case, data, out))


def double(array: Array, *, batch_first: bool = False) -> Tensor:
    tensor = torch.from_numpy(array.astype(np.float64))
    return tensor.transpose(0, 1) if batch_first else tensor


def close(got: Array, want: Tensor, scale: Tensor | None = None) -> None:
    """Within the tolerance of the largest magnitude of ``scale``, by default what is wanted. NaN is never close."""
    bound = TOLERANCE * float((want if scale is None else scale).abs().max()) if want.numel() else 0.0
    assert got.shape == tuple(want.shape)
    assert np.abs(got - want.numpy()).max(initial=0.0) <= bound


def check(case: Case) -> None:
    """All results of both kernels against autograd on the dense weight."""
    data = draw(case)
    got = run(case, data)

    z = double(data.raw, batch_first=True) * double(data.scale).t()[:, :, None, None]
    z = (z + double(data.shift).t()[:, :, None, None]).requires_grad_()  # (n, inputs, h, w)
    activation = torch.relu(z) if case.relu else z.clone()
    weight = torch.zeros(case.outputs * case.inputs * case.kernel[0] * case.kernel[1], dtype=torch.float64)
    weight[torch.from_numpy(data.positions).long()] = double(data.values)
    weight = weight.view(case.outputs, case.inputs, *case.kernel).requires_grad_()
    bias = double(data.bias).requires_grad_() if case.bias else None
    out = functional.conv2d(activation, weight, bias, case.stride, case.padding, case.dilation)  # (n, outputs, h, w)
    y = out.detach().transpose(0, 1)
    close(got.out, y)
    close(got.sums[0], y.sum((2, 3)), scale=y.abs().sum((2, 3)))
    close(got.sums[1], (y * y).sum((2, 3)))

    grad = double(data.grad)
    if case.lines:
        a, b, d = double(data.lines)[:, :, :, None, None]
        grad = a * grad + b * double(got.out) + d
    d_weight, d_act = torch.autograd.grad(out, [weight, activation], grad.transpose(0, 1), retain_graph=True)
    kept = d_weight.reshape(-1)[torch.from_numpy(data.positions).long()]
    close(got.d_values, kept, scale=d_weight)
    close(got.d_bias, grad.sum((1, 2, 3)) if case.bias else torch.empty(0), scale=grad.abs().sum((1, 2, 3)))

    if case.before == "unwanted":
        return
    if data.before.size:
        d_act = d_act + double(data.before, batch_first=True)
    if not case.last:
        close(got.d_raw, d_act.transpose(0, 1))
        return
    (d_z,) = torch.autograd.grad(activation, z, d_act)
    d_z = d_z.transpose(0, 1)
    close(got.d_raw, d_z, scale=d_act)
    product = d_z * double(data.raw)
    close(got.d_sums[0], d_z.sum((2, 3)), scale=d_act.abs().sum((2, 3)))
    close(got.d_sums[1], product.sum((2, 3)), scale=3 * d_act.abs().sum((2, 3)))


# What the shapes of the strategy below do not reach: long rows of non-zeros, long runs, many features.
LARGE = [
    Case(20, (9, 33), 5, (3, 3), padding=(1, 1), batch=9),
    Case(20, (9, 33), 5, (3, 3), padding=(1, 1), batch=9, pattern="full", cache=40_000),
    Case(3, (4, 105), 2, (3, 3), padding=(1, 1), batch=2, pattern="full"),
    Case(3, (5, 205), 2, (1, 3), batch=3, cache=1, last=False, before="none"),
    Case(8, (33, 17), 12, (3, 3), (2, 2), (1, 1), batch=7, pattern="some", cache=60_000),
    Case(8, (33, 17), 12, (1, 1), (2, 2), batch=7, pattern="full"),
    Case(4, (3, 70), 3, (7, 7), (1, 3), (3, 3), batch=5, pattern="half"),
    Case(6, (16, 16), 7, (3, 3), padding=(2, 2), dilation=(2, 2), batch=7, pattern="few"),
    Case(12, (4, 4), 16, (3, 3), padding=(1, 1), batch=37, pattern="some", cache=15_000),
    Case(12, (4, 4), 16, (3, 3), padding=(1, 1), batch=37, pattern="rows", lines=False, relu=False),
    Case(5, (8, 8), 6, (7, 7), padding=(6, 6), dilation=(2, 2), batch=17),
    Case(4, (9, 64), 5, (7, 7), padding=(6, 6), dilation=(2, 2), batch=2, pattern="some", cache=1),
    Case(15, (2, 2), 9, (2, 2), batch=64, pattern="some", before="none"),
]
LINEAR = [
    Case(300, (1, 1), 40, (1, 1), batch=64, pattern="some"),
    Case(300, (1, 1), 40, (1, 1), batch=65, pattern="few", cache=50_000, before="same"),
    Case(40, (1, 1), 300, (1, 1), batch=31, pattern="half", before="none", lines=False),
    Case(257, (1, 1), 10, (1, 1), batch=1, pattern="full", last=False),
    Case(64, (1, 1), 64, (1, 1), batch=130, pattern="rows", before="unwanted"),
    Case(33, (1, 1), 1, (1, 1), batch=9, pattern="none", relu=False),
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small convolutions whose output is not empty."""
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    kernel = tuple(
        draw(st.integers(1, min(7, (n + 2 * p - 1) // d + 1))) for n, p, d in zip(size, padding, dilation, strict=True)
    )
    return Case(
        inputs=draw(st.integers(1, 6)),
        size=size,
        outputs=draw(st.integers(1, 6)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        batch=draw(st.integers(1, 9)),
        pattern=draw(st.sampled_from(["half", "none", "one", "few", "some", "rows", "full"])),
        relu=draw(st.booleans()),
        bias=draw(st.booleans()),
        lines=draw(st.booleans()),
        before=draw(st.sampled_from(["other", "none", "same", "unwanted"])),
        last=draw(st.booleans()),
        cache=draw(st.sampled_from([1 << 20, 1, 2_000, 10_000])),
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=300)
@given(cases())
@example(Case(1, (1, 1), 1, (1, 1), batch=1, pattern="full"))
@example(Case(1, (1, 1), 2, (7, 7), (3, 3), (3, 3), batch=1, pattern="full"))
@example(Case(2, (1, 12), 2, (1, 7), (1, 2), (0, 3), batch=1, pattern="full"))
@example(Case(2, (12, 1), 2, (7, 1), (3, 1), (1, 0), (2, 1), batch=9, pattern="full", cache=1))
@example(Case(3, (5, 4), 2, (3, 2), padding=(3, 3), pattern="one", batch=1))
def test_small_convolutions(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LARGE, ids=range(len(LARGE)))
def test_long_rows_and_long_runs(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LINEAR, ids=range(len(LINEAR)))
def test_linear_layers(case: Case) -> None:
    check(case)


def test_the_large_cases_reach_every_kind_of_tile_and_run() -> None:
    """One run a row and one over all rows; one tile, several, and a last one that is not full; long and short runs."""
    known = [(case, case.geometry) for case in LARGE]
    assert any(geo.group == case.batch for case, geo in known)
    assert any(1 == geo.group < case.batch for case, geo in known)
    for single in (True, False):
        assert any(
            1 < geo.group < case.batch and case.batch % geo.group and (geo.runs == 1) == single
            for case, geo in known
            if geo.out_h > 1
        )
    runs = [geo.group * geo.out_w for _, geo in known]
    assert max(runs) > 8 * kernels.LANES + 4 * kernels.LANES
    assert any(run % kernels.LANES for run in runs)
    rows = [np.bincount(draw(c).positions // (c.inputs * c.kernel[0] * c.kernel[1])) for c in LARGE]
    assert {min(8, n % 8) for row in rows for n in row if n > 8} == set(range(8))


@pytest.mark.parametrize("case", [LARGE[1], LARGE[4], LARGE[8], LINEAR[1]], ids=range(4))
def test_the_same_bits_twice_and_from_two_threads(case: Case) -> None:
    """Each call has memory of its own, so that nothing depends on what it held before."""
    want = [array.tobytes() for array in run(case, draw(case)).arrays()]
    found: list[list[bytes]] = []
    start = threading.Barrier(2)

    def work() -> None:
        mine = [draw(case) for _ in range(20)]
        start.wait()
        results = [run(case, data) for data in mine]
        found.extend([array.tobytes() for array in result.arrays()] for result in results)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(one == want for one in found)


def test_compiled_code_releases_the_gil() -> None:
    compiled = [f for f in vars(kernels).values() if isinstance(f, Dispatcher)]
    assert len(compiled) > 3
    assert all(f.targetoptions["nogil"] for f in compiled)


def loop_forward(case: Case, data: Data) -> Array:
    """Weight by weight, so that weights that are not there do not meet infinities."""
    geo = case.geometry
    with np.errstate(invalid="ignore"):
        z = data.raw.astype(np.float64) * data.scale[..., None, None] + data.shift[..., None, None]
        z = np.where(case.relu & (z < 0), 0.0, z)
        z = np.pad(z, [(0, 0), (0, 0), *((p, p) for p in case.padding)])
        out = np.zeros((case.outputs, case.batch, geo.out_h, geo.out_w))
        if case.bias:
            out += data.bias[:, None, None, None]
        for position, value in zip(data.positions, data.values, strict=True):
            o, c, kh, kw = np.unravel_index(position, (case.outputs, case.inputs, *case.kernel))
            rows = kh * case.dilation[0] + case.stride[0] * np.arange(geo.out_h)
            columns = kw * case.dilation[1] + case.stride[1] * np.arange(geo.out_w)
            out[o] += np.float64(value) * z[c][:, rows][:, :, columns]
    return out


SPECIAL = [
    Case(3, (9, 7), 4, (3, 3), padding=(1, 1), batch=5),
    Case(3, (9, 33), 4, (3, 2), batch=3, cache=1),
    Case(3, (9, 33), 4, (3, 2), batch=3, relu=False),
    Case(2, (11, 8), 3, (3, 3), (2, 2), (1, 1), batch=9, cache=3_000),
    Case(40, (1, 1), 7, (1, 1), batch=19),
]


@pytest.mark.parametrize("case", SPECIAL, ids=range(len(SPECIAL)))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_visible(case: Case, bad: float) -> None:
    """In each output that reads one, and in no other; in the sums, and in the gradient of a weight that reads one."""
    data = draw(case)
    data.scale[data.scale == 0] = 1.0
    data.values[data.values == 0] = 1.0
    rng = numpy_rng("special", case.seed)
    c, n = case.inputs - 1, int(rng.integers(case.batch))
    h, w = (int(rng.integers(s)) for s in case.size)
    data.raw[c, n, h, w] = bad
    out, sums = run_forward(case, data)
    want = loop_forward(case, data)
    visible = np.isnan(bad) or not case.relu or bad * data.scale[c, n] > 0
    assert np.isfinite(want).all() != visible
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
    np.testing.assert_array_equal(np.where(np.isinf(out), out, 0), np.where(np.isinf(want), want, 0))
    finite = np.isfinite(want)
    assert np.abs(out[finite] - want[finite]).max() <= TOLERANCE * np.abs(want[finite]).max()
    np.testing.assert_array_equal(np.isfinite(sums).all(0), finite.all((2, 3)))

    d_values, *_ = run_backward(replace(case, lines=False), replace(data, lines=np.empty((3, 0, 0), np.float32)), out)
    taps = case.kernel[0] * case.kernel[1]
    reads = data.positions // taps % case.inputs == c
    assert np.isfinite(d_values[~reads]).all()
    assert np.isfinite(d_values).all() != visible


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_gradient_stays_visible(bad: float) -> None:
    case = replace(SPECIAL[0], relu=False, before="none", pattern="full")
    data = draw(case)
    data.values[data.values == 0] = 1.0
    data.lines[0] = 1.0
    data.grad[1, 2, 4, 3] = bad
    d_values, d_bias, d_raw, d_sums = run_backward(case, data, run_forward(case, data)[0])
    cells = case.inputs * 9
    assert not np.isfinite(d_values[cells : 2 * cells]).any()
    assert np.isfinite(np.delete(d_values, range(cells, 2 * cells))).all()
    assert list(np.flatnonzero(~np.isfinite(d_bias))) == [1]
    there = np.zeros(d_raw.shape, bool)
    there[:, 2, 3:6, 2:5] = True
    np.testing.assert_array_equal(~np.isfinite(d_raw), there)
    np.testing.assert_array_equal(~np.isfinite(d_sums).all(0), there.any((2, 3)))


def test_the_gradient_passes_where_a_relu_saw_nan() -> None:
    """As in torch; where it saw less than 0 it does not."""
    case = replace(SPECIAL[0], lines=False, before="none")
    data = draw(case)
    (want,) = run_backward(replace(case, relu=False), data, data.grad)[2:3]
    data.raw[1, 2, 4, 3] = np.nan
    data.raw[1, 2, 4, 4], data.scale[1, 2], data.shift[1, 2] = -1.0, 1.0, 0.5
    got = run_backward(case, data, data.grad)[2]
    assert got[1, 2, 4, 3] == want[1, 2, 4, 3] != 0
    assert got[1, 2, 4, 4] == 0


def test_sums_are_optional() -> None:
    case = LARGE[0]
    data = draw(case)
    out, _ = run_forward(case, data, with_sums=False)
    np.testing.assert_array_equal(out, run_forward(case, data)[0])


def test_an_empty_output_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\) kernel leaves nothing of an image of \(2, 5\)"):
        kernels.geometry(1, (2, 5), 1, (3, 3))


def test_the_other_vector_width(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same cases in a process that takes this machine for one with (or without) the wide registers.

    A folder of its own for compiled code, since the width is no part of numba's key; kept from run to run.
    """
    lanes = 24 - kernels.LANES
    code = f"""
from llvmlite import binding
from numba.core.registry import cpu_target
cpu_target.target_context  # the compiler asks for the features once, here
binding.get_host_cpu_features = lambda: {{"avx512f": {lanes == 16}}}
from fedsparse.sparse import kernels
from tests.test_sparse_kernels import LARGE, LINEAR, check, test_the_large_cases_reach_every_kind_of_tile_and_run
test_the_large_cases_reach_every_kind_of_tile_and_run()
assert kernels.LANES == {lanes}
for case in LARGE + LINEAR:
    check(case)
"""
    cache = getattr(request.config, "cache", None)  # pytest can run without
    folder = cache.mkdir(f"lanes{lanes}") if cache is not None else tmp_path
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
