"""Layer densities, criteria, candidates, prune and regrow, and packed positions, against slow and obvious versions."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.cost import exempt_layers, trace
from fedsparse.errors import UserError
from fedsparse.models import build_model
from fedsparse.seeding import numpy_rng, torch_rng
from fedsparse.sparse.positions import pack_positions, packed_bytes, unpack_positions
from fedsparse.sparse.pruning import (
    LAYER_DENSITIES,
    at_random,
    coarse_pool,
    exchange_count,
    exchange_share,
    largest,
    layer_counts,
    layer_groups,
    prune_and_grow,
    weight_budget,
)

RESNET = {"a": (64, 64, 3, 3), "b": (128, 64, 3, 3), "c": (128, 64, 1, 1), "d": (512, 512, 3, 3), "e": (256, 512)}
shapes = st.dictionaries(
    st.sampled_from("abcdef"),
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
)


def sizes_of(found: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in found.items()}


@given(shapes, st.sampled_from(LAYER_DENSITIES), st.floats(0, 1))
def test_layer_counts_add_up_and_respect_the_layers(
    found: dict[str, tuple[int, ...]], family: str, part: float
) -> None:
    sizes = sizes_of(found)
    budget = len(sizes) + round(part * (sum(sizes.values()) - len(sizes)))
    counts = layer_counts(found, family, budget)
    assert sum(counts.values()) == budget
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)


@pytest.mark.parametrize("family", LAYER_DENSITIES)
def test_layer_densities_are_in_the_ratios_of_their_formulas(family: str) -> None:
    def formula(shape: tuple[int, ...]) -> float:
        if family == "uniform":
            return 1.0
        if family == "er":
            return (shape[0] + shape[1]) / (shape[0] * shape[1])
        return sum(shape) / math.prod(shape)

    sizes = sizes_of(RESNET)
    counts = layer_counts(RESNET, family, round(0.02 * sum(sizes.values())))
    factors = [counts[n] / sizes[n] / formula(s) for n, s in RESNET.items()]
    assert max(factors) / min(factors) < 1.01  # counts are whole


def test_a_full_layer_gives_the_rest_to_the_others() -> None:
    counts = layer_counts(RESNET, "erk", round(0.5 * sum(sizes_of(RESNET).values())))
    full = [n for n, size in sizes_of(RESNET).items() if counts[n] == size]
    assert full == ["a", "b", "c", "e"]
    assert counts["d"] < 512 * 512 * 9


def test_budgets_in_both_conventions() -> None:
    sizes = {"a": 60, "b": 40}
    assert weight_budget(0.1, sizes, kind="nominal", dense=20, total=120) == 10
    assert weight_budget(0.5, sizes, kind="true", dense=20, total=120) == 40
    assert weight_budget(1.0, sizes, kind="nominal", dense=20, total=120) == 100
    assert weight_budget(1.0, sizes, kind="true", dense=20, total=120) == 100
    assert weight_budget(0.02, sizes, kind="nominal", dense=20, total=120) == 2
    with pytest.raises(UserError, match=r"nominal density 0.015 is below the smallest possible one, 0.02 "):
        weight_budget(0.015, sizes, kind="nominal", dense=20, total=120)
    with pytest.raises(UserError, match=r"true density 0.1 is below .* 0.183334 \(20 scalars that stay dense"):
        weight_budget(0.1, sizes, kind="true", dense=20, total=120)
    assert weight_budget(0.183334, sizes, kind="true", dense=20, total=120) == 2


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_densities_outside_the_range_are_refused(density: float) -> None:
    with pytest.raises(UserError, match=r"density must be in \(0, 1\], got"):
        weight_budget(density, {"a": 9}, kind="nominal", dense=0, total=9)


@given(st.lists(st.integers(-3, 3), max_size=12), st.integers(0, 13))
def test_the_largest_are_those_of_a_stable_sort(values: list[int], k: int) -> None:
    ordered = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    assert largest(torch.tensor(values, dtype=torch.float32), k).tolist() == sorted(ordered[:k])


def test_random_positions_are_distinct_and_fixed_by_their_path() -> None:
    first, again = (at_random(50, 20, torch_rng(1, "mask")) for _ in range(2))
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == 20 and first.tolist() == sorted(first.tolist())
    assert at_random(5, 5, torch_rng(1)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", LAYER_DENSITIES)
@pytest.mark.parametrize("hard", [False, True])
def test_candidates_are_within_two_percent(family: str, hard: bool) -> None:
    sizes = sizes_of(RESNET)
    counts = layer_counts(RESNET, family, round(0.01 * sum(sizes.values())))
    target = sum(counts.values())
    pool = coarse_pool(counts, sizes, family, 10, numpy_rng(0), target=target, hard=hard)  # (10, 5)
    off = pool.sum(1) / target - 1
    assert pool.shape == (10, 5) and (np.abs(off) < 0.02).all() and (not hard or (off <= 0).all())
    assert (pool >= 1).all() and (pool <= np.array(list(sizes.values()))).all()
    assert len({tuple(c) for c in pool.tolist()}) == 10
    half = 0.5 if family == "uniform" else 1.0
    ratio = pool / np.array(list(counts.values()))
    assert (ratio >= 1 - half - 0.01).all() and (ratio <= 1 + half).all()


def test_candidates_of_a_dense_model_are_dense() -> None:
    assert coarse_pool({"a": 9, "b": 4}, {"a": 9, "b": 4}, "erk", 2, numpy_rng(0), target=13).tolist() == [
        [9, 4],
        [9, 4],
    ]


def test_bad_pools_are_refused() -> None:
    with pytest.raises(UserError, match="pool must be at least 1, got 0"):
        coarse_pool({"a": 9}, {"a": 90}, "uniform", 0, numpy_rng(0), target=9)
    counts = dict.fromkeys((f"layer{i}" for i in range(80)), 99)
    with pytest.raises(UserError, match=r"no 3 candidates within 2 % of 7920 .*; lower pool"):
        coarse_pool(counts, dict.fromkeys(counts, 100), "erk", 3, numpy_rng(0), target=7920)


def resnet_names() -> list[str]:
    layers = trace(build_model("resnet18", (3, 32, 32), 10, width=0.0625), (3, 32, 32))
    exempt = exempt_layers(layers)
    return [layer.weight_name for layer in layers if layer.weights and layer.name not in exempt]


def test_the_groups_of_resnet18_are_its_stages() -> None:
    names = resnet_names()
    groups = layer_groups(names, "block", "backward")
    assert [{n.split(".")[0] for n in g} for g in groups] == [{"layer4"}, {"layer3"}, {"layer2"}, {"layer1"}]
    assert [len(g) for g in groups] == [5, 5, 5, 4]
    assert layer_groups(names, "block", "forward") == groups[::-1]
    assert layer_groups(names, "layer", "forward") == [(n,) for n in names]
    assert layer_groups(names, "entire", "backward") == [tuple(names)]


def test_the_groups_of_a_chain_are_pairs() -> None:
    names = [f"conv{i}.weight" for i in range(2, 9)] + ["fc1.weight", "fc2.weight"]
    groups = layer_groups(names, "block", "backward")
    assert [len(g) for g in groups] == [1, 2, 2, 2, 2]
    assert sorted(n for g in groups for n in g) == sorted(names)
    assert layer_groups([], "block", "backward") == layer_groups([], "entire", "forward") == []


def test_shares_of_the_schedule() -> None:
    """The list of the specification, section 1.6.2: percent of the kept weights at rounds 10, 20, ..., 100."""
    shares = [100 * exchange_share(0.3, turn, 100) for turn in range(10, 101, 10)]
    assert [round(s, 1) for s in shares] == [29.3, 27.1, 23.8, 19.6, 15.0, 10.4, 6.2, 2.9, 0.7, 0.0]


def test_counts_are_rounded_up_and_capped() -> None:
    assert exchange_count(0.3, 83_886, 8_388_608) == 25_166
    assert exchange_count(0.5, 1, 10) == 0  # one stays
    assert exchange_count(0.5, 8, 10) == 2  # no more than are pruned
    assert exchange_count(0.0, 8, 10) == 0


@given(st.data())
def test_prune_and_grow_against_a_loop(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12))
    kept = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1)))
    values = [float(data.draw(st.integers(-3, 3))) for _ in kept]
    free = [i for i in range(size) if i not in kept]
    shown = sorted(data.draw(st.sets(st.sampled_from(free))))
    gradients = [float(data.draw(st.integers(-3, 3))) for _ in shown]
    count = data.draw(st.integers(0, len(kept)))

    grow = sorted(
        (i for i, g in zip(shown, gradients, strict=True) if g), key=lambda i: -abs(gradients[shown.index(i)])
    )
    grow = grow[:count]
    stay = sorted(kept, key=lambda i: -abs(values[kept.index(i)]))[: len(kept) - len(grow)]
    model = {i: values[kept.index(i)] for i in stay} | dict.fromkeys(grow, 0.0)

    new, at = prune_and_grow(
        torch.tensor(values), torch.tensor(kept, dtype=torch.int32), torch.tensor(shown, dtype=torch.int32),
        torch.tensor(gradients), count,
    )  # fmt: skip
    assert at.dtype == torch.int32 and at.tolist() == sorted(model)
    assert new.tolist() == [model[i] for i in sorted(model)]
    assert len(at) == len(kept)


# --- packed positions ------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(1, 70), st.data())
def test_packed_positions_survive(size: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    packed = pack_positions(torch.tensor(kept, dtype=torch.int32), size)
    assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(size, len(kept))
    assert 8 * len(packed) < min(size, len(kept) * (size - 1).bit_length()) + 8
    back = unpack_positions(packed, size, len(kept))
    assert back.dtype == torch.int32 and back.tolist() == kept


@pytest.mark.parametrize("bits", [1, 8, 21, 22])
def test_indices_take_ceil_log2_bits(bits: int) -> None:
    size = 2**bits
    last = torch.tensor([size - 2, size - 1], dtype=torch.int32)
    packed = pack_positions(last, size)
    assert len(packed) == min(-(-2 * bits // 8), -(-size // 8))
    assert unpack_positions(packed, size, 2).tolist() == last.tolist()


@pytest.mark.parametrize("kept", [106_000, 1_000_000], ids=["indices", "bitmap"])
def test_packing_takes_little_memory(kept: int) -> None:
    size = 2_359_296  # the largest layer of ResNet18
    at = torch.from_numpy(np.sort(np.random.default_rng(0).choice(size, kept, replace=False)).astype(np.int32))
    tracemalloc.start()
    packed = pack_positions(at, size)
    assert tracemalloc.get_traced_memory()[1] < len(packed) + 400_000
    tracemalloc.stop()
    bits = np.unpackbits(packed.numpy())
    if kept > 106_000:
        assert np.array_equal(np.flatnonzero(bits), at.numpy())
    else:
        words = bits[: 22 * kept].reshape(kept, 22) @ (1 << np.arange(21, -1, -1))
        assert np.array_equal(words, at.numpy())
    assert torch.equal(unpack_positions(packed, size, kept), at)


def test_the_smaller_form_is_taken() -> None:
    assert packed_bytes(1 << 20, 1000) == 2500  # 20 bits each
    assert packed_bytes(1 << 20, 1 << 19) == 1 << 17  # a bit a weight
    assert packed_bytes(9, 0) == 0


@pytest.mark.parametrize(
    ("positions", "size", "kept"),
    [([3, 3], 1000, 2), ([5, 3], 1000, 2), ([3, 1001], 1000, 2), ([0, 1], 1000, 3), (list(range(9)), 16, 8)],
    ids=["repeat", "descend", "outside", "short", "bitmap"],
)
def test_positions_that_are_wrong_are_refused(positions: list[int], size: int, kept: int) -> None:
    packed = pack_positions(torch.tensor(positions), size)
    with pytest.raises(UserError, match="packed positions"):
        unpack_positions(packed, size, kept)


def test_packed_positions_of_another_type_are_refused() -> None:
    with pytest.raises(UserError, match="have 3 bytes, got"):
        unpack_positions(torch.zeros(3, dtype=torch.int32), 1000, 2)
