"""Networks: parameter counts of the specifications, names, widths, inputs that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsparse.errors import UserError
from fedsparse.models import build_model, model_names
from fedsparse.models.layers import group_count

CHAINS = {
    "logistic": (1, 8, 8),
    "mlp": (43,),
    "leafcnn1": (1, 28, 28),
    "lenet": (3, 32, 32),
    "leafcnn3": (3, 32, 32),
    "cnn": (1, 8, 8),
    "cnn1d": (6, 125),
    "vgg11": (3, 32, 32),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, shape: tuple[int, ...], classes: int, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, shape, classes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "classes", "width", "parameters"),
    [
        ("leafcnn1", (1, 28, 28), 62, 1, 2_278_334),
        ("leafcnn1", (1, 28, 28), 10, 1, 2_171_786),  # the count that pFedGate's paper states
        ("lenet", (3, 32, 32), 10, 1, 256_830),
        ("leafcnn3", (3, 32, 32), 100, 1, 3_537_444),
        ("cnn", (1, 28, 28), 10, 1, 1_663_370),
        ("resnet18", (3, 32, 32), 10, 1, 11_173_962),
        ("resnet18", (3, 32, 32), 10, 0.25, 701_466),
        ("vgg11", (3, 32, 32), 10, 1, 9_425_674),
        ("mlp", (1, 28, 28), 10, 1, 784 * 128 + 128 + 128 * 10 + 10),
        ("logistic", (43,), 6, 1, 43 * 6 + 6),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], classes: int, width: float, parameters: int) -> None:
    assert count(on_meta(name, shape, classes, width=width)) == parameters


def test_group_norm_has_the_parameters_of_batch_norm_and_no_buffers() -> None:
    model = on_meta("resnet18", (3, 32, 32), 10, width=0.25, norm="group")
    assert count(model) == 701_466
    assert not list(model.buffers())
    assert "gn1" in dict(on_meta("vgg11", (3, 32, 32), 10, norm="group").named_children())


@pytest.mark.parametrize("width", [1e-4, 0.3, 1.0])
@pytest.mark.parametrize("name", model_names())
def test_every_model_runs_and_takes_gradients(name: str, width: float) -> None:
    shape = {**CHAINS, "resnet18": (1, 8, 8), "charlstm": (7,)}[name]
    tokens = name == "charlstm"
    model = build_model(name, shape, 5, width=width, vocabulary=11 if tokens else 0)
    x = torch.zeros(2, *shape, dtype=torch.int64) if tokens else torch.randn(2, *shape)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_flat_sequences_that_end_in_output(name: str) -> None:
    model = on_meta(name, CHAINS[name], 10)
    names = [child for child, _ in model.named_children()]
    assert isinstance(model, nn.Sequential)
    assert names[-1] == "output"
    assert names.count("flatten") == 1
    assert all(not list(module.children()) for module in model)
    assert {child.rstrip("0123456789") for child in names} <= {"conv", "bn", "relu", "pool", "flatten", "fc", "output"}


def test_names_of_a_chain() -> None:
    names = "conv1 relu1 pool1 conv2 relu2 pool2 flatten fc1 relu3 fc2 relu4 output"
    assert [n for n, _ in on_meta("lenet", (3, 32, 32), 10).named_children()] == names.split()


@pytest.mark.parametrize("name", sorted(set(model_names()) - {"logistic"}))
def test_parameters_grow_with_width(name: str) -> None:
    shape = {**CHAINS, "resnet18": (3, 32, 32), "charlstm": (7,)}[name]
    vocabulary = 11 if name == "charlstm" else 0
    counts = [count(on_meta(name, shape, 5, width=w / 16, vocabulary=vocabulary)) for w in range(1, 17)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@given(st.integers(1, 2048))
def test_groups_divide_the_channels(channels: int) -> None:
    groups = group_count(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert groups == 1 or channels // groups >= 4


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("leafcnn1", (1, 8, 8), {}, "^model leafcnn1 needs inputs of at least 16x16, got 8x8$"),
        ("leafcnn1", (1, 28, 15), {}, "at least 16x16, got 28x15"),
        ("vgg11", (1, 28, 28), {}, "vgg11 needs inputs of at least 32x32, got 28x28"),
        ("cnn1d", (6, 15), {}, "cnn1d needs inputs of at least 16, got 15"),
        ("lenet", (43,), {}, r"lenet needs images \(channels, height, width\), got inputs of shape \(43,\)"),
        ("cnn1d", (1, 8, 8), {}, r"cnn1d needs series"),
        ("mlp", (), {}, "mlp needs inputs with at least one element"),
        (
            "mlp",
            (80,),
            {"vocabulary": 79},
            r"mlp needs numbers, but the data are tokens \(models for tokens: charlstm\)",
        ),
        ("charlstm", (43,), {}, "charlstm needs tokens, but the data are numbers"),
        ("resnet", (3, 32, 32), {}, "unknown model 'resnet'; did you mean 'resnet18'"),
        ("resnet18", (3, 32, 32), {"norm": "layer"}, "unknown norm 'layer'"),
        ("mlp", (43,), {"width": 0.0}, "width must be above 0, got 0"),
        ("mlp", (43,), {"width": float("nan")}, "width must be above 0, got nan"),
    ],
)
def test_what_does_not_fit(name: str, shape: tuple[int, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(name, shape, 10, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["leafcnn1", "cnn", "cnn1d", "vgg11"])
def test_the_smallest_input_runs(name: str) -> None:
    shape = {"leafcnn1": (1, 16, 16), "cnn": (1, 4, 4), "cnn1d": (1, 16), "vgg11": (1, 32, 32)}[name]
    assert build_model(name, shape, 3, width=0.1).eval()(torch.zeros(1, *shape)).shape == (1, 3)
