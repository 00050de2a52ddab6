"""Masks as positions, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsparse.errors import UserError
from fedsparse.seeding import torch_rng
from fedsparse.sparse.masks import carry, check_mask, compact, spread, whole

SHAPES = {"conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "fc.weight": (4, 5), "output.weight": (2, 4)}
MASK = {
    "conv.weight": torch.tensor([0, 3, 8, 23], dtype=torch.int32),
    "fc.weight": torch.empty(0, dtype=torch.int32),
    "output.weight": torch.arange(8, dtype=torch.int32),
}


def make_params() -> dict[str, Tensor]:
    rng = torch_rng("masks")
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def positions(some: set[int] | list[int]) -> Tensor:
    return torch.tensor(sorted(some), dtype=torch.int32)


def test_compact_and_whole_against_a_loop() -> None:
    """Some positions, none and all; tensors without a mask are handed through, not copied."""
    params = make_params()
    small = compact(params, MASK)
    back = whole(small, MASK, SHAPES)
    assert list(small) == list(back) == list(params)
    assert small["conv.bias"] is back["conv.bias"] is params["conv.bias"]
    for name, kept in MASK.items():
        flat = params[name].flatten().tolist()
        assert small[name].tolist() == [flat[i] for i in kept.tolist()]
        assert small[name].data_ptr() != params[name].data_ptr()
        assert back[name].shape == SHAPES[name]
        marked = set(kept.tolist())
        assert back[name].flatten().tolist() == [v if i in marked else 0.0 for i, v in enumerate(flat)]


def test_an_empty_mask_changes_nothing() -> None:
    params = make_params()
    assert all(compact(params, {})[name] is t for name, t in params.items())
    assert all(whole(params, {}, SHAPES)[name] is t for name, t in params.items())


def test_compact_reads_tensors_in_any_layout() -> None:
    """Positions are those of the shape, not of the memory."""
    weight = torch.arange(24.0).view(3, 2, 2, 2)
    other = weight.contiguous(memory_format=torch.channels_last)
    assert not other.is_contiguous()
    mask = {"w": positions([1, 2, 13])}
    assert compact({"w": other}, mask)["w"].tolist() == [1.0, 2.0, 13.0]


@settings(max_examples=100)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_spread_is_the_inverse_of_compact(shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    kept = positions(data.draw(st.sets(st.integers(0, size - 1))))
    values = torch.arange(1.0, len(kept) + 1)
    full = spread(values, kept, tuple(shape))
    assert full.shape == tuple(shape)
    assert full.count_nonzero() == len(kept)
    assert torch.equal(compact({"w": full}, {"w": kept})["w"], values)


def test_gradients_flow_through_spread_to_the_values() -> None:
    values = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    weight = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    (spread(values, positions([1, 5]), (2, 3)) * weight).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 5.0]


@settings(max_examples=200)
@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)))
def test_carry_against_a_loop(old: set[int], new: set[int]) -> None:
    """A value goes with its position; what was not there is zero; nothing is written into the old values."""
    values = torch.arange(1.0, len(old) + 1)
    by_position = dict(zip(sorted(old), values.tolist(), strict=True))
    got = carry(values, positions(old), positions(new))
    assert got.tolist() == [by_position.get(i, 0.0) for i in sorted(new)]
    assert got.dtype == torch.float32
    assert values.tolist() == list(by_position.values())
    assert got.data_ptr() != values.data_ptr() or not len(new)


def test_carry_to_the_same_positions_keeps_the_bits() -> None:
    values = torch.tensor([float("nan"), -0.0, 1e-42, float("inf")])
    kept = positions([3, 7, 8, 40])
    assert carry(values, kept, kept.clone()).numpy().tobytes() == values.numpy().tobytes()


def test_masks_that_fit() -> None:
    check_mask(MASK, SHAPES)
    check_mask({}, SHAPES)
    check_mask({"fc.weight": positions([0]), "conv.weight": positions([23])}, SHAPES)


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("conv9.weight", positions([0]), "the mask names 'conv9.weight', which the model does not have"),
        (
            "fc.weight",
            torch.tensor([0, 1]),
            r"mask 'fc.weight' must be a flat int32 tensor, got torch.int64 of shape \(2,\)",
        ),
        ("fc.weight", torch.ones(4, 5, dtype=torch.bool), r"flat int32 tensor, got torch.bool of shape \(4, 5\)"),
        ("fc.weight", torch.ones(1, 2, dtype=torch.int32), r"flat int32 tensor, got torch.int32 of shape \(1, 2\)"),
        ("fc.weight", torch.tensor(3, dtype=torch.int32), r"flat int32 tensor, got torch.int32 of shape \(\)"),
        ("fc.weight", torch.tensor([3, 2], dtype=torch.int32), "must ascend without repeats"),
        ("fc.weight", torch.tensor([2, 1, 3], dtype=torch.int32), "must ascend without repeats"),
        ("fc.weight", torch.tensor([2, 2], dtype=torch.int32), "must ascend without repeats"),
        ("fc.weight", torch.tensor([-1, 2], dtype=torch.int32), r"the positions of mask 'fc.weight' .* in \[0, 20\)"),
        ("fc.weight", torch.tensor([5, 20], dtype=torch.int32), r"the positions of mask 'fc.weight' .* in \[0, 20\)"),
        ("fc.weight", torch.tensor([5, 25, 7], dtype=torch.int32), "must ascend without repeats"),
    ],
)
def test_masks_that_do_not_fit_are_named(name: str, kept: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_mask({"conv.weight": positions([1]), name: kept}, SHAPES)
    assert "\n" not in str(caught.value)
