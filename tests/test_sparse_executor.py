"""Whole networks over kept weights only, against torch's masked dense ones in float64."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from fedsparse.errors import UserError
from fedsparse.models import build_model
from fedsparse.seeding import torch_rng
from fedsparse.sparse.executor import Executor
from fedsparse.sparse.masks import Mask, compact, spread, whole
from fedsparse.sparse.program import UnsupportedError, read_program
from fedsparse.steps import step_
from fedsparse.task import Params, Task

TOLERANCE = 1e-4
CLASSES = 5
MODELS = {
    "mlp": ((1, 8, 8), "batch", 0.2),
    "lenet": ((3, 17, 18), "batch", 0.15),
    "leafcnn1": ((1, 16, 20), "batch", 0.1),
    "vgg11": ((3, 32, 32), "batch", 0.08),
    "vgg11-group": ((3, 32, 33), "group", 0.13),
    "resnet18": ((3, 9, 11), "batch", 0.1),
    "resnet18-group": ((2, 8, 8), "group", 0.13),
}


def task_of(model: nn.Module, shape: tuple[int, ...]) -> Task:
    """A task with values of its own; norms, biases and running statistics are not those of a new model."""
    task = Task(model, shape, CLASSES, 0)
    rng = torch_rng("values", *shape)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                t.copy_(0.5 + torch.rand(t.shape, generator=rng))
            elif t.ndim == 1:
                t.copy_(0.3 * torch.randn(t.shape, generator=rng) + ("norm" in name or "bn" in name or "gn" in name))
            else:
                t.copy_(torch.randn(t.shape, generator=rng) * (2 / t[0].numel()) ** 0.5)
    return task


def named_task(name: str) -> Task:
    shape, norm, width = MODELS[name]
    return task_of(build_model(name.partition("-")[0], shape, CLASSES, width=width, norm=norm), shape)


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def weights_of(task: Task) -> list[str]:
    return [name for name in task.trainable if len(task.shapes[name]) in (2, 4)]


def draw_mask(task: Task, density: float, seed: int = 0) -> dict[str, Tensor]:
    """A part of every layer's weights but the last one's, which stays whole."""
    rng, mask = torch_rng("mask", seed), {}
    for name in weights_of(task)[:-1]:
        size = int(np.prod(task.shapes[name]))
        mask[name] = (torch.rand(size, generator=rng) < density).nonzero().flatten().int()
    return mask


def draw_batch(task: Task, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch_rng("batch", n, seed)
    return torch.randn(n, *task.input_shape, generator=rng), torch.randint(CLASSES, (n,), generator=rng)


@dataclass
class Pass:
    """Logits, gradients of the compact trainable tensors, and the running statistics afterwards."""

    logits: Tensor
    grads: dict[str, Tensor]
    statistics: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"logits": self.logits, **self.grads, **self.statistics}


def one_pass(task: Task, params: Params, logits: Callable[[Params], Tensor], y: Tensor) -> Pass:
    own = {name: t.detach().clone() for name, t in params.items()}
    leaves = [own[name].requires_grad_() for name in task.trainable]
    out = logits(own)
    grads = torch.autograd.grad(functional.cross_entropy(out, y), leaves)
    return Pass(out.detach(), dict(zip(task.trainable, grads, strict=True)), {n: own[n] for n in task.buffers})


def torch_pass(
    task: Task, params: Params, mask: Mask, x: Tensor, y: Tensor, *, train: bool, dtype: torch.dtype = torch.float64
) -> Pass:
    """torch's own layers on the spread weights."""

    def logits(own: Params) -> Tensor:
        tensors = {n: spread(t, mask[n], task.shapes[n]) if n in mask else t for n, t in own.items()}
        out: Tensor = functional_call(task.model, tensors, (x.to(dtype),))
        return out

    task.model.train(train)
    return one_pass(task, {n: t.to(dtype) for n, t in params.items()}, logits, y)


def sparse_pass(executor: Executor, task: Task, params: Params, x: Tensor, y: Tensor, *, train: bool) -> Pass:
    return one_pass(task, params, lambda own: executor.logits(own, x, train=train), y)


@dataclass
class Wanted:
    """What a pass should give, by name of the tensor, in float64, and how far from it each may be.

    That is the tolerance of its largest magnitude, or ten times what torch's float32 is off, if that is more: norms of
    channels that hardly vary multiply rounding. What is 0, as the gradient of a bias before a batch norm, has to be
    small beside the largest gradient.
    """

    tensors: dict[str, Tensor]
    bounds: dict[str, float]


def wanted(task: Task, params: Params, mask: Mask, x: Tensor, y: Tensor, *, train: bool) -> Wanted:
    want = torch_pass(task, params, mask, x, y, train=train).tensors()
    rounded = torch_pass(task, params, mask, x, y, train=train, dtype=torch.float32).tensors()
    largest = max(float(want[name].abs().max()) for name in task.trainable if want[name].numel())
    bounds = {}
    for name, t in want.items():
        if t.numel():
            size, off = float(t.abs().max()), float((rounded[name] - t).abs().max())
            bounds[name] = max(TOLERANCE * size if size > 1e-9 * largest else 1e-3 * largest, 10 * off)
    return Wanted(want, bounds)


def close(got: Mapping[str, Tensor], want: Wanted) -> None:
    for name, t in got.items():
        assert t.shape == want.tensors[name].shape, name
        assert t.dtype == torch.float32, name
        if t.numel():
            assert float((t - want.tensors[name]).abs().max()) <= want.bounds[name], name


def bits(got: Pass) -> list[bytes]:
    return [t.numpy().tobytes() for t in got.tensors().values()]


def check(
    task: Task, mask: Mask, n: int, *, train: bool, dense: frozenset[str] = frozenset(), x: Tensor | None = None
) -> None:
    """One pass with gradients and one without; all buffers come back after each."""
    params = compact(task.init_params(), mask)
    images, y = draw_batch(task, n)
    x = images if x is None else x
    executor = Executor(read_program(task.model, task.input_shape), mask, dense)
    want = wanted(task, params, mask, x, y, train=train)
    got = sparse_pass(executor, task, params, x, y, train=train)
    assert got.tensors().keys() == want.tensors.keys()
    close(got.tensors(), want)
    assert not executor.buffers._holders
    own = {name: t.clone() for name, t in params.items()}
    close({"logits": executor.logits(own, x, train=train)}, want)
    close({name: own[name] for name in task.buffers}, want)
    assert not executor.buffers._holders


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, train: bool) -> None:
    """A batch of an odd size; gradients in evaluation mode too."""
    task = named_task(name)
    check(task, draw_mask(task, 0.3), 7, train=train)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("name", ["lenet", "resnet18"])
def test_densities(name: str, density: float) -> None:
    """Layers of which nothing is left, and of which all is."""
    task = named_task(name)
    check(task, draw_mask(task, density), 4, train=True)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_one_example(name: str, train: bool) -> None:
    task = named_task(name)
    check(task, draw_mask(task, 0.3), 1, train=train)


def test_batch_norms_do_not_train_on_a_single_value() -> None:
    """As torch's."""
    task = task_of(chain(fc1=nn.Linear(7, 20), bn1=nn.BatchNorm1d(20), relu1=nn.ReLU(), output=nn.Linear(20, 5)), (7,))
    check(task, {}, 1, train=False)
    with pytest.raises(UserError, match="batch norm bn1 needs more than one value"):
        Executor(read_program(task.model, (7,)), {}).logits(task.init_params(), torch.ones(1, 7), train=True)


@pytest.mark.parametrize("name", ["mlp", "leafcnn1", "vgg11-group", "resnet18"])
def test_without_a_mask(name: str) -> None:
    task = named_task(name)
    check(task, {}, 5, train=True)


@pytest.mark.parametrize("name", ["lenet", "vgg11", "resnet18", "resnet18-group"])
@pytest.mark.parametrize("which", ["all", "first", "second", "last"])
def test_layers_that_are_computed_dense(name: str, which: str) -> None:
    """All of them, or every third one from the first, second or third on, masked or not."""
    task = named_task(name)
    layers = [weight.removesuffix(".weight") for weight in weights_of(task)]
    chosen = {"all": layers, "first": layers[::3], "second": layers[1::3], "last": layers[2::3]}[which]
    check(task, draw_mask(task, 0.3), 6, train=True, dense=frozenset(chosen))


@pytest.mark.parametrize(
    "dense", [frozenset(), frozenset(["layer2.0.conv1", "layer3.1.conv2"])], ids=["sparse", "both"]
)
def test_buffers_are_used_again(dense: frozenset[str]) -> None:
    """Whatever they hold; for other sizes of a batch between, and after a pass that was given up half way."""
    task = named_task("resnet18")
    mask = draw_mask(task, 0.3)
    params = compact(task.init_params(), mask)
    executor = Executor(read_program(task.model, task.input_shape), mask, dense)
    held = []
    for step, n in enumerate([4, 4, 3, 4, 1, 4]):
        x, y = draw_batch(task, n, step)
        got = sparse_pass(executor, task, params, x, y, train=True)
        close(got.tensors(), wanted(task, params, mask, x, y, train=True))
        assert not executor.buffers._holders
        free = [array for arrays in executor.buffers._free.values() for array in arrays]
        held.append((n, sorted(array.size for array in free)))
        for array in free:
            array.fill(np.nan)
    assert held[0] == held[1] == held[3] == held[5]
    assert all(sum(sizes) * 4 == sum(held[0][1]) * n for n, sizes in held)  # none is kept for another size
    own = {name: t.clone().requires_grad_(name in task.trainable) for name, t in params.items()}
    executor.logits(own, x, train=True)  # no backward pass follows
    got = sparse_pass(executor, task, params, x, y, train=True)
    close(got.tensors(), wanted(task, params, mask, x, y, train=True))


@pytest.mark.parametrize("name", ["leafcnn1", "vgg11", "resnet18-group"])
def test_the_same_bits_twice(name: str) -> None:
    """With the same executor, with a new one, and for an input in another memory layout."""
    task = named_task(name)
    mask = draw_mask(task, 0.3)
    params = compact(task.init_params(), mask)
    program = read_program(task.model, task.input_shape)
    x, y = draw_batch(task, 9)
    executor = Executor(program, mask)
    first = bits(sparse_pass(executor, task, params, x, y, train=True))
    assert bits(sparse_pass(executor, task, params, x, y, train=True)) == first
    other = x.to(memory_format=torch.channels_last)
    assert bits(sparse_pass(Executor(program, mask), task, params, other, y, train=True)) == first


def test_only_what_needs_a_gradient_gets_one() -> None:
    """Frozen parameters stay without; in evaluation statistics keep their bits; without gradients none are kept."""
    task = named_task("vgg11")
    mask = draw_mask(task, 0.3)
    executor = Executor(read_program(task.model, task.input_shape), mask)
    params = compact(task.init_params(), mask)
    x, y = draw_batch(task, 3)
    want = wanted(task, params, mask, x, y, train=False)
    own = {name: t.clone() for name, t in params.items()}
    own["conv3.weight"].requires_grad_()
    functional.cross_entropy(executor.logits(own, x, train=False), y).backward()
    assert [name for name, t in own.items() if t.grad is not None] == ["conv3.weight"]
    close({"conv3.weight": own["conv3.weight"].grad}, want)
    assert all(torch.equal(own[name], params[name]) for name in task.buffers)
    with torch.no_grad():
        assert not executor.logits(own, x, train=True).requires_grad
    assert not executor.buffers._holders


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg11-group", "resnet18"])
def test_search_shows_the_gradients_of_all_weights(name: str) -> None:
    """Piece by piece in ascending order, of layers that are computed sparse and dense, in training mode."""
    task = named_task(name)
    mask = draw_mask(task, 0.3)
    params = compact(task.init_params(), mask)
    x, y = draw_batch(task, 5)
    layers = [weight.removesuffix(".weight") for weight in mask]
    executor = Executor(read_program(task.model, task.input_shape), mask, frozenset(layers[1::2]))
    shown: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def show(layer: str, start: int, values: Tensor) -> None:
        assert start == sum(len(part) for part in shown[layer])
        shown[layer].append(values.clone())
        values.fill_(np.nan)

    def d_logits(logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(functional.cross_entropy(leaf, y), [leaf])[0]

    own = {n: t.clone() for n, t in params.items()}
    executor.search(own, x, d_logits, {layer: partial(show, layer) for layer in layers})
    assert not executor.buffers._holders
    whole_model = whole(params, mask, task.shapes)
    want = wanted(task, whole_model, {}, x, y, train=True)
    got = {f"{layer}.weight": torch.cat(parts).view(task.shapes[f"{layer}.weight"]) for layer, parts in shown.items()}
    close(got, want)
    close({n: own[n] for n in task.buffers}, want)


def test_what_does_not_fit_is_refused() -> None:
    """Inputs, parameters and masks; what the executor cannot give, it does not leave out in silence."""
    task = named_task("lenet")
    mask = draw_mask(task, 0.3)
    params = compact(task.init_params(), mask)
    program = read_program(task.model, task.input_shape)
    executor = Executor(program, mask)
    x, _ = draw_batch(task, 3)
    for wrong, message in (
        (x[:, :, 1:], "of shape"),
        (x.double(), "torch.float64"),
        (x.clone().requires_grad_(), "no gradient of"),
    ):
        with pytest.raises(UserError, match=message):
            executor.logits(params, wrong, train=True)
    for name, value in {
        "conv1.weight": params["conv1.weight"][1:],
        "fc1.weight": params["fc1.weight"].double(),
        "fc1.bias": params["fc1.bias"][1:],
        "output.weight": torch.zeros(3),
    }.items():
        with pytest.raises(UserError, match=name):
            executor.logits({**params, name: value}, x, train=True)
    with pytest.raises(UserError, match="fc1.weight"):
        Executor(program, {**mask, "fc1.weight": mask["fc1.weight"].flip(0)})
    close(
        {"logits": executor.logits(params, x, train=False)},
        wanted(task, params, mask, x, torch.zeros(3).long(), train=False),
    )


def test_a_batch_of_nothing_has_no_logits() -> None:
    task = named_task("resnet18")
    params = task.init_params()
    executor = Executor(read_program(task.model, task.input_shape), {})
    assert executor.logits(params, torch.zeros(0, *task.input_shape), train=False).shape == (0, CLASSES)


def test_a_second_backward_pass_is_refused() -> None:
    task = named_task("mlp")
    params = {n: t.requires_grad_() for n, t in task.init_params().items()}
    x, _ = draw_batch(task, 3)
    loss = Executor(read_program(task.model, task.input_shape), {}).logits(params, x, train=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


# ----------------------------------------------------------------------------------------------- odd networks


class Sums(nn.Module):
    """Values that several operations read, sums of sums, sums with a norm, a value that is added to itself."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, padding=1), norm(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), norm(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 6, 1), norm(6)
        self.conv4 = nn.Conv2d(6, 6, (3, 1), padding=(1, 0))
        self.pool = nn.MaxPool2d(2)
        self.output = nn.Linear(6 * 2 * 3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm1(self.conv1(x)))
        b = self.norm2(self.conv2(a))  # read twice, with a norm and no ReLU
        c = functional.relu(a + b)
        d = c + c
        e = (self.norm3((d + b).add(a))).relu()
        f = self.conv3(e) + e
        g = torch.add(self.conv4(f), f) + c
        out: Tensor = self.output(torch.flatten(self.pool(g), 1))
        return out


class InputTwice(nn.Module):
    """The input, normalised, is read twice and added to itself."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.output = nn.Linear(4 * 4 * 7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = self.output((self.conv1(x) + (x + x)).flatten(1))
        return out


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(channels // 2, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels, eps=1e-3),
    "plain": lambda channels: nn.BatchNorm2d(channels, affine=False, momentum=0.3, eps=1e-3),
    "none": lambda channels: nn.Identity(),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dense", [(), ("conv2", "conv4"), ("conv1", "conv2", "conv3", "conv4", "output")], ids=len)
@pytest.mark.parametrize("norm", NORMS)
def test_sums(norm: str, dense: tuple[str, ...], train: bool) -> None:
    task = task_of(Sums(NORMS[norm]), (2, 5, 7))
    check(task, draw_mask(task, 0.4), 5, train=train, dense=frozenset(dense))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_an_input_that_is_read_twice(norm: str, train: bool) -> None:
    task = task_of(InputTwice(NORMS[norm]), (4, 4, 7))
    check(task, draw_mask(task, 0.4), 5, train=train)
    check(task, draw_mask(task, 0.4), 5, train=train, dense=frozenset(["conv1", "output"]))


CHAINS = {
    "normalised input": lambda: chain(
        bn0=nn.BatchNorm2d(3), conv1=nn.Conv2d(3, 4, 3), relu1=nn.ReLU(), flatten=nn.Flatten(), output=nn.Linear(80, 5)
    ),
    "input with ReLU": lambda: chain(
        gn0=nn.GroupNorm(3, 3), relu0=nn.ReLU(), conv1=nn.Conv2d(3, 4, 3), flatten=nn.Flatten(), output=nn.Linear(80, 5)
    ),
    "pooled input": lambda: chain(
        pool0=nn.MaxPool2d(2, 1), conv1=nn.Conv2d(3, 4, 2), flatten=nn.Flatten(), output=nn.Linear(80, 5)
    ),
    "norms after pools": lambda: chain(
        conv1=nn.Conv2d(3, 4, 3, padding=1), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2), bn1=nn.BatchNorm2d(4),
        relu2=nn.ReLU(), pool2=nn.AvgPool2d((3, 1)), gn2=nn.GroupNorm(2, 4), relu3=nn.ReLU(), flatten=nn.Flatten(),
        output=nn.Linear(12, 5),
    ),
    "all kinds of windows": lambda: chain(
        conv1=nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0), (1, 2)), relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(4, 6, (1, 3), (1, 2), padding=(2, 1), bias=False), pool1=nn.AdaptiveAvgPool2d((1, None)),
        relu2=nn.ReLU(), flatten=nn.Flatten(), output=nn.Linear(18, 5),
    ),
    "a norm and a ReLU last": lambda: chain(
        flatten=nn.Flatten(), fc1=nn.Linear(126, 9), bn1=nn.BatchNorm1d(9), relu1=nn.ReLU(), drop=nn.Dropout(0.0),
        output=nn.Linear(9, 5), bn2=nn.BatchNorm1d(5), relu2=nn.ReLU(),
    ),
    "only the output": lambda: chain(flatten=nn.Flatten(), output=nn.Linear(126, 5)),
}  # fmt: skip


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, train: bool, dense: bool) -> None:
    task = task_of(CHAINS[name](), (3, 6, 7))
    layers = frozenset(weight.removesuffix(".weight") for weight in weights_of(task)) if dense else frozenset()
    check(task, draw_mask(task, 0.5), 5, train=train, dense=layers)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dense", [(), ("conv2", "conv3"), ("conv1", "conv2", "conv3", "output")], ids=len)
def test_images_of_one_pixel(dense: tuple[str, ...], train: bool) -> None:
    """Convolutions whose windows and strides reach beyond it, as in the last layers on small images."""
    layers = {
        "conv1": nn.Conv2d(3, 8, (6, 7)), "bn1": nn.BatchNorm2d(8), "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(8, 6, 3, padding=1), "conv3": nn.Conv2d(6, 9, 1, 2), "relu2": nn.ReLU(),
        "flatten": nn.Flatten(), "relu3": nn.ReLU(), "output": nn.Linear(9, CLASSES),
    }  # fmt: skip
    task = task_of(chain(**layers), (3, 6, 7))
    check(task, draw_mask(task, 0.5), 5, train=train, dense=frozenset(dense))


@pytest.mark.parametrize("n", [6, 33, 53, 60])
@pytest.mark.parametrize("width", [20, 5000])
def test_vectors(width: int, n: int) -> None:
    """Few features and many, at which a batch of 60 is cut in two and one of 53, a prime, into single examples."""
    task = task_of(
        chain(
            fc1=nn.Linear(7, width), bn1=nn.BatchNorm1d(width), relu1=nn.ReLU(),
            fc2=nn.Linear(width, 9), bn2=nn.BatchNorm1d(9), relu2=nn.ReLU(), output=nn.Linear(9, CLASSES),
        ),
        (7,),
    )  # fmt: skip
    check(task, draw_mask(task, 0.1), n, train=True)


def test_norms_of_inputs_far_from_zero() -> None:
    """Pixels in [0, 255], and a channel that is constant."""
    task = task_of(CHAINS["normalised input"](), (3, 6, 7))
    x = torch.rand(9, 3, 6, 7, generator=torch_rng("pixels")) * 255
    x[:, 1] = 77
    check(task, draw_mask(task, 0.5), 9, train=True, x=x)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.booleans(),
)
@example((8, 9), (2, 2), (2, 2), (0, 0), True)
@example((7, 5), (2, 2), (2, 2), (0, 0), False)
@example((9, 9), (3, 3), (2, 2), (1, 1), False)
@example((5, 8), (3, 2), (1, 3), (1, 1), True)
def test_max_pools_with_ties(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], relu: bool
) -> None:
    """Small whole numbers, so that most windows have several largest values; without a ReLU all may be below zero.

    The convolution before only multiplies, but its gradient tells neighbourhoods of equal values apart.
    """
    assume(max(size) > 1)
    assume(all(2 * p <= k <= n + 2 * p for n, k, p in zip(size, kernel, padding, strict=True)))
    after = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]
    task = task_of(
        chain(
            conv1=nn.Conv2d(1, 3, 3, padding=1),
            relu1=nn.ReLU() if relu else nn.Identity(),
            pool1=nn.MaxPool2d(kernel, stride, padding),
            flatten=nn.Flatten(),
            output=nn.Linear(3 * after[0] * after[1], CLASSES),
        ),
        (1, *size),
    )
    with torch.no_grad():
        task.model.conv1.weight[:] = 0
        task.model.conv1.weight[:, 0, 1, 1] = torch.tensor([1.0, -1.0, 2.0])
        task.model.conv1.bias[:] = torch.tensor([0.0, 0.0, -6.0])
    x = torch.randint(-2, 3, (3, 1, *size), generator=torch_rng("ties", *size)).float()
    check(task, {"conv1.weight": torch.arange(27, dtype=torch.int32)}, 3, train=True, x=x)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d((4, 3), (4, 3)),
        nn.AvgPool2d((6, 8)),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveAvgPool2d((None, 4)),
    ],
    ids=str,
)
def test_mean_pools(pool: nn.Module) -> None:
    features = 4 * int(np.prod(pool(torch.zeros(1, 1, 6, 8)).shape))
    layers = {"conv1": nn.Conv2d(2, 4, 3, padding=1), "relu1": nn.ReLU(), "pool1": pool, "flatten": nn.Flatten()}
    task = task_of(chain(**layers, output=nn.Linear(features, CLASSES)), (2, 6, 8))
    check(task, draw_mask(task, 0.5), 5, train=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["lenet", "vgg11", "resnet18-group", "pooled input"])
def test_what_is_not_finite_reaches_the_logits(name: str, bad: float) -> None:
    """Through ReLUs, norms and pools; those of other examples stay as they are."""
    task = named_task(name) if name in MODELS else task_of(CHAINS[name](), (3, 6, 7))
    mask = draw_mask(task, 1.0)
    params = compact(task.init_params(), mask)
    executor = Executor(read_program(task.model, task.input_shape), mask)
    x, _ = draw_batch(task, 4)
    good = executor.logits(params, x, train=False)
    x[2, :, 5, 4] = bad
    got = executor.logits(params, x, train=False)
    task.model.eval()
    with torch.no_grad(), task.bound(task.init_params()) as model:
        assert torch.equal(got.isfinite().all(1), model(x).isfinite().all(1))
    assert not got[2].isfinite().all()
    assert torch.equal(got[[0, 1, 3]], good[[0, 1, 3]])


# ----------------------------------------------------------------------------------------------- memory


@contextmanager
def spare_memory(nbytes: int) -> Iterator[None]:
    """At most ``nbytes`` more than this process has, whoever asks for them: NumPy, compiled code or torch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def take_all(size: int) -> list[np.ndarray]:
    """All places for arrays of so many floats: memory that was freed before asks the system for none."""
    taken: list[np.ndarray] = []
    with suppress(MemoryError):
        while len(taken) < 64:
            taken.append(np.empty(size, np.float32))
    return taken


BIG = {
    "linear": (lambda: chain(fc1=nn.Linear(4096, 4096), relu1=nn.ReLU(), output=nn.Linear(4096, CLASSES)), (4096,)),
    "conv": (
        lambda: chain(conv1=nn.Conv2d(1024, 1024, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(1024), relu1=nn.ReLU(),
                      pool1=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), output=nn.Linear(1024, CLASSES)),
        (1024, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="sizes are read from /proc")
@pytest.mark.parametrize("name", BIG)
def test_a_step_has_no_room_for_a_dense_weight(name: str) -> None:
    """Not for one (64 and 36 MB), and so for no gradient of one either: it runs in 20 MB, buffers included.

    In a process of its own, whose heap has no holes that other tests have left.
    """
    code = f"from tests.test_sparse_executor import step_without_room; step_without_room({name!r})"
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}  # what is freed goes back to the system
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def step_without_room(name: str) -> None:
    build, shape = BIG[name]
    with torch.device("meta"):
        model = build()
    shapes = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()] if t.ndim}
    first = next(iter(shapes))
    size, rng = int(np.prod(shapes[first])), torch_rng("big", name)
    mask = {first: torch.randint(size, (size // 1000,), generator=rng).unique().int()}
    params = {n: torch.rand(s, generator=rng) for n, s in shapes.items() if n != first}
    params = {first: torch.randn(len(mask[first]), generator=rng), **params}
    names = [n for n, _ in model.named_parameters()]
    program = read_program(model, shape)
    x, y = torch.randn(8, *shape, generator=rng), torch.arange(8) % CLASSES

    def step() -> list[Tensor]:
        leaves = [params[n].requires_grad_() for n in names]
        logits = Executor(program, mask).logits(params, x, train=True)
        grads = list(torch.autograd.grad(functional.cross_entropy(logits, y), leaves))
        with torch.no_grad():
            step_(leaves, grads, [], lr=0.1, momentum=0.9)
        return grads

    step()
    with spare_memory(20 << 20):
        taken = take_all(size)
        grads = step()
    assert 4 * size > 20 << 20 and len(taken) < 64
    assert grads[0].shape == mask[first].shape and grads[0].abs().sum() > 0


# ----------------------------------------------------------------------------------------------- what has no program


class Applied(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Scaled(nn.Module):
    """Uses a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Standardised(nn.Conv2d):
    """A convolution of its own kind."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def tied(first: nn.Linear, second: nn.Linear) -> nn.Module:
    second.weight = first.weight
    return chain(fc1=first, fc2=second)


def images(**layers: nn.Module) -> nn.Module:
    """Two convolutions with something between, for (3, 6, 6)."""
    return chain(conv0=nn.Conv2d(3, 4, 1), **layers, pool9=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())


IMAGE = (3, 6, 6)
UNSUPPORTED = [
    (images(conv1=nn.Conv2d(4, 4, 1, groups=2)), IMAGE, "layer conv1 has groups"),
    (images(conv1=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), IMAGE, "layer conv1 has .* padding"),
    (images(conv1=nn.Conv2d(4, 4, 3, padding="same")), IMAGE, "layer conv1 has .* padding"),
    (images(conv1=nn.Conv2d(4, 4, 7)), IMAGE, "conv1 leaves nothing"),
    (images(conv1=nn.ConvTranspose2d(4, 4, 3)), IMAGE, "layer conv1 .ConvTranspose2d. has no sparse form"),
    (images(conv1=Standardised(4, 4, 3)), IMAGE, "not known"),
    (images(drop1=nn.Dropout(0.5)), IMAGE, "layer drop1 draws random numbers"),
    (images(drop1=nn.Dropout2d(0.5)), IMAGE, "layer drop1"),
    (images(act1=nn.GELU()), IMAGE, "layer act1 .GELU. has no sparse form"),
    (images(norm1=nn.InstanceNorm2d(4)), IMAGE, "layer norm1"),
    (images(norm1=nn.LayerNorm([4, 6, 6])), IMAGE, "layer norm1"),
    (images(bn1=nn.BatchNorm2d(4, momentum=None)), IMAGE, "layer bn1 keeps no exponential"),
    (images(bn1=nn.BatchNorm2d(4, track_running_stats=False)), IMAGE, "layer bn1 keeps no exponential"),
    (images(relu1=nn.ReLU(), bn1=nn.BatchNorm2d(4)), IMAGE, "layer bn1 follows another norm or a ReLU"),
    (images(bn1=nn.BatchNorm2d(4), gn1=nn.GroupNorm(1, 4)), IMAGE, "layer gn1 follows another norm or a ReLU"),
    (images(pool1=nn.MaxPool2d(2, ceil_mode=True)), IMAGE, "layer pool1 uses ceil_mode"),
    (images(pool1=nn.MaxPool2d(2, dilation=2)), IMAGE, "layer pool1 uses .*dilation"),
    (images(pool1=nn.MaxPool2d(2, return_indices=True)), IMAGE, "layer pool1 uses .*indices"),
    (images(pool1=nn.AvgPool2d(2, ceil_mode=True)), IMAGE, "layer pool1 uses ceil_mode"),
    (images(pool1=nn.AvgPool2d(3, padding=1)), IMAGE, "layer pool1 uses .*padding"),
    (images(pool1=nn.AvgPool2d(2, divisor_override=3)), IMAGE, "layer pool1 uses .*divisor"),
    (images(pool1=nn.AvgPool2d(3, 2)), IMAGE, "layer pool1 takes means of windows that overlap"),
    (images(pool1=nn.AvgPool2d(2, 3)), IMAGE, "layer pool1 takes means of windows .* leave gaps"),
    (images(pool1=nn.AdaptiveAvgPool2d(4)), IMAGE, "layer pool1 pools windows of unequal size"),
    (images(pool1=nn.AdaptiveMaxPool2d(2)), IMAGE, "layer pool1"),
    (images(fc1=nn.Linear(6, 6)), IMAGE, "layer fc1 is applied to more than one vector"),
    (chain(conv1=nn.Conv2d(3, 4, 1), flat1=nn.Flatten(2)), IMAGE, "layer flat1 flattens some axes"),
    (chain(conv1=nn.Conv2d(3, 4, 1)), IMAGE, "no vector of logits"),
    (chain(conv1=nn.Conv1d(3, 4, 3), flatten=nn.Flatten(), output=nn.Linear(40, 5)), (3, 12), "input has 2 axes"),
    (chain(embed=nn.Embedding(9, 4), flatten=nn.Flatten(), output=nn.Linear(20, 5)), (5,), "layer embed .Embedding."),
    (build_model("charlstm", (8,), 9, width=0.05, vocabulary=9), (8,), "layer embedding"),
    (Applied(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(7, 5)), (7,), "layer rnn .LSTM. has no sparse form"),
    (Applied(lambda m, x: (m.fc(x), x), fc=nn.Linear(7, 5)), (7,), "more than one tensor"),
    (TwoInputs(), (7,), "more than one input"),
    (Scaled(), (3,), "not known"),
    (Applied(lambda m, x: x + 1), (7,), "operation add .* is not known"),
    (Applied(lambda m, x: x * x), (7,), "operation mul .* is not known"),
    (Applied(lambda m, x: m.fc(x) + x, fc=nn.Linear(7, 1)), (7,), "different shapes"),
    (Applied(lambda m, x: torch.add(x, x, alpha=2)), (7,), "operation add"),
    (Applied(lambda m, x: x.add(x, alpha=2)), (7,), "operation add"),
    (Applied(lambda m, x: x if x.sum() > 0 else m.fc(x), fc=nn.Linear(7, 7)), (7,), "cannot be traced"),
    (Applied(lambda m, x: m.fc(x) if m.training else x, fc=nn.Linear(7, 7)), (7,), "in training than in evaluation"),
    (Applied(lambda m, x: m.fc(x), fc=weight_norm(nn.Linear(7, 5))), (7,), "layer fc has hooks or parametrizations"),
    (tied(nn.Linear(7, 7), nn.Linear(7, 7)), (7,), "share a parameter"),
    (Applied(lambda m, x: m.fc(m.fc(x)), fc=nn.Linear(7, 7)), (7,), "fc is used more than once"),
    (
        Applied(lambda m, x: (y := m.fc(x)) + torch.relu(y), fc=nn.Linear(7, 7)),
        (7,),
        "fc is read both before and after",
    ),
    (Applied(lambda m, x: (y := m.fc(x)) + m.bn(y), fc=nn.Linear(7, 7), bn=nn.BatchNorm1d(7)), (7,), "fc is read both"),
]


@pytest.mark.parametrize(("model", "shape", "reason"), UNSUPPORTED, ids=range(len(UNSUPPORTED)))
def test_what_is_not_supported_is_named(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        read_program(model, shape)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
