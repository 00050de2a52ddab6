"""The exact knapsack against all subsets, and its speed."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.sparse.knapsack import knapsack


def best_value(values: list[float], sizes: list[int], capacity: int) -> float:
    """Over all subsets."""
    best = 0.0
    for subset in itertools.product([False, True], repeat=len(values)):
        if sum(s for s, t in zip(sizes, subset, strict=True) if t) <= capacity:
            best = max(best, sum(v for v, t in zip(values, subset, strict=True) if t))
    return best


blocks = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.51, 0.9]), st.integers(0, 7)), max_size=9)
any_blocks = st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 40)), max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.one_of(blocks, any_blocks), st.integers(-3, 90))
def test_as_good_as_the_best_of_all_subsets(items: list[tuple[float, int]], capacity: int) -> None:
    values, sizes = [v for v, _ in items], [s for _, s in items]
    taken = knapsack(values, sizes, capacity)
    assert taken.dtype == bool
    assert taken.shape == (len(items),)
    if capacity < 0:
        assert not taken.any()
        return
    assert np.dot(taken, np.array(sizes, np.int64)) <= capacity
    assert np.dot(taken, np.array(values)) == pytest.approx(best_value(values, sizes, capacity), abs=1e-9)
    np.testing.assert_array_equal(taken, knapsack(values, sizes, capacity))


def test_ties_go_to_the_lower_index() -> None:
    np.testing.assert_array_equal(knapsack([0.5] * 6, [3] * 6, 10), [True] * 3 + [False] * 3)


@pytest.mark.parametrize(
    ("values", "sizes", "message"),
    [([1.0, float("nan")], [1, 1], "block 1 is nan"), ([1.0], [-2], "size -2"), ([1.0], [1, 2], "sizes")],
)
def test_bad_input_is_named(values: list[float], sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knapsack(values, sizes, 1)


def test_thousands_of_blocks_take_milliseconds() -> None:
    rng = np.random.default_rng(0)
    values, sizes = 0.5 + 0.01 * rng.random(4000), rng.choice([25, 801, 802, 1025], 4000)
    start = time.perf_counter()
    taken = knapsack(values, sizes, int(sizes.sum() * 0.3))
    assert time.perf_counter() - start < 1  # about 10 ms; the bound is for busy machines
    assert 0 < np.dot(taken, sizes) <= int(sizes.sum() * 0.3)
