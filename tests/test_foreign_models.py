"""Networks that this project did not write, cut flat and trained without a line of code from their authors."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsparse import cost
from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.method import build, load_method
from fedsparse.packet import decode
from fedsparse.runner import digest
from fedsparse.seeding import numpy_rng, torch_rng
from fedsparse.sparse.choose import choose_blocks
from fedsparse.sparse.codec import pack_bits, unpack, unpack_bits
from fedsparse.sparse.cut import COSTS
from fedsparse.sparse.flat import FlatCut, flat_cut
from fedsparse.steps import clip_, step_
from fedsparse.strategy import Plan
from fedsparse.task import Budget, Client, Device, Split, Task

CLASSES = 5
IMAGE = (3, 32, 32)
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "clip": 1.0}


class Foreign(NamedTuple):
    """A network, the shape of one example, the number of tokens (0 for numbers) and the number of classes."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    vocabulary: int
    classes: int

    @property
    def tokens(self) -> bool:
        return self.vocabulary > 0


def _torchvision() -> Any:
    """torchvision, also a wheel whose compiled operators are for another build of torch; no network here uses them.

    Such a wheel fails on import, where it describes two operators that nobody has defined.
    """
    try:
        return pytest.importorskip("torchvision", reason="needs torchvision, which is not installed")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    _KEPT.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []  # what a library defines goes with it


def timm_model(name: str, **options: int) -> nn.Module:
    """A network of timm with random weights."""
    _torchvision()
    timm = pytest.importorskip("timm", reason="needs timm, which is not installed")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return model


def torchvision_mobilenet() -> nn.Module:
    model: nn.Module = _torchvision().models.mobilenet_v2(num_classes=CLASSES, width_mult=0.25)
    return model


class EncoderClassifier(nn.Module):
    """PyTorch's transformer encoder, as its tutorial has it: tokens (n, T) -> logits (n, classes)."""

    def __init__(self, vocabulary: int = 11, length: int = 8, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.output = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.encoder(self.embedding(x) + self.position).mean(1))
        return logits


class SeriesLSTM(nn.Module):
    """PyTorch's two-layer, two-way LSTM: series (n, T, features) -> logits (n, classes)."""

    def __init__(self, features: int = 3, units: int = 12) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, units, num_layers=2, bidirectional=True, batch_first=True)
        self.output = nn.Linear(2 * units, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        logits: Tensor = self.output(states[:, -1])
        return logits


_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "timm_mobilenetv3": (lambda: timm_model("mobilenetv3_small_050"), IMAGE, 0),
    "timm_vit": (lambda: timm_model("test_vit", img_size=32, patch_size=8), IMAGE, 0),
    "torchvision_mobilenetv2": (torchvision_mobilenet, IMAGE, 0),
    "encoder": (EncoderClassifier, (8,), 11),
    "lstm": (SeriesLSTM, (10, 3), 0),
}
FOREIGN = tuple(_MODELS)


def foreign(name: str) -> Foreign:
    """A new network of :data:`FOREIGN`, with the same weights on every call. Skips where its package is absent."""
    build, shape, vocabulary = _MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Foreign(name, build(), shape, vocabulary, CLASSES)


def foreign_data(name: str, n: int = 8) -> Split:
    """Noise of the right kind."""
    _, shape, vocabulary = _MODELS[name]
    rng = torch_rng("foreign", name)
    y = torch.randint(CLASSES, (n,), generator=rng)
    if vocabulary:
        return Split(torch.randint(vocabulary, (n, *shape), generator=rng), y)
    return Split(torch.randn(n, *shape, generator=rng), y)


@lru_cache(maxsize=8)
def foreign_task(name: str) -> Task:
    model = foreign(name)
    return Task(model.module, model.input_shape, model.classes, seed=0, vocabulary=model.vocabulary)


@lru_cache(maxsize=16)
def foreign_cut(name: str, rule: str) -> FlatCut:
    task = foreign_task(name)
    return flat_cut(task.model, task.input_shape, tokens=task.tokens, rule=rule, least=0.05)


@pytest.mark.parametrize("name", FOREIGN)
def test_costs(name: str) -> None:
    """Nothing is lost or counted twice: all parameters, and the multiply-adds that PyTorch's own counter sees."""
    task = foreign_task(name)
    layers = cost.trace(task.model, task.input_shape, tokens=task.tokens)
    assert cost.trainable_count(layers) == sum(p.numel() for p in task.model.parameters())
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with attention, FlopCounterMode(display=False) as counter:
        task.model.train()(foreign_data(name, 2).x)
    fused = sum(layer.macs for layer in layers if layer.kind == "lstm")  # a kernel that the counter does not see
    assert 2 * 2 * (cost.forward_macs(layers) - fused) == counter.get_total_flops()
    cut = foreign_cut(name, "paper")
    assert cut.spent(cut.everything) == cost.trainable_count(layers)
    assert cut.spent(cut.everything, "multiply_adds") == cost.forward_macs(layers)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("rule", ["paper", "official"])
def test_with_all_blocks_open_it_is_the_plain_model(name: str, rule: str) -> None:
    """Two steps of training and the logits in evaluation, bit by bit."""
    task, cut, data = foreign_task(name), foreign_cut(name, rule), foreign_data(name)
    work = cut.working(task, task.init_params())
    work.use(cut.everything)
    params = task.init_params()
    leaves, velocity = [params[key].requires_grad_() for key in task.trainable], list[Tensor]()
    task.model.train()
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of dropout
            loss = task.criterion(work.forward(torch.ones(cut.blocks), data.x), data.y)
            torch.manual_seed(seed)
            want = task.loss(params, data.x, data.y, train=True)
        assert torch.equal(loss, want)
        work.step(torch.autograd.grad(loss, work.leaves), **SGD)
        grads = torch.autograd.grad(want, leaves)
        with torch.no_grad():
            clip_(grads, SGD["clip"])
            step_(leaves, grads, velocity, **{key: value for key, value in SGD.items() if key != "clip"})
    assert all(torch.equal(work.params[key], t) for key, t in params.items())
    task.model.eval()
    with torch.no_grad(), task.bound(params) as model:
        logits = cut.working(task, work.params, train=False).forward(torch.ones(cut.blocks), data.x)
        assert torch.equal(logits, model(data.x))


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("limited", COSTS)
def test_a_step_under_a_random_budget(name: str, rule: str, limited: str) -> None:
    """The chosen part learns, all else keeps its bits, and the upload brings the result over."""
    task, cut, data = foreign_task(name), foreign_cut(name, rule), foreign_data(name)
    rng = numpy_rng("budget", name, rule, limited)
    smallest, whole = (cut.spent(kept, limited) for kept in (cut.forced, cut.everything))
    limit = math.floor(smallest + rng.uniform(0.1, 0.9) * (whole - smallest))
    kept = choose_blocks(cut, rng.random(cut.blocks), {limited: limit}, limited)
    assert cut.spent(kept, limited) <= limit
    assert cut.forced.sum() < kept.sum() < cut.blocks
    received = task.init_params()
    work = cut.working(task, received)
    work.use(kept)
    task.model.train()
    gates = (torch.rand(cut.blocks, generator=torch_rng(name)) * torch.from_numpy(kept)).requires_grad_()
    loss = task.criterion(work.forward(gates, data.x), data.y)
    *grads, d_gates = torch.autograd.grad(loss, [*work.leaves, gates])
    assert torch.isfinite(loss) and torch.isfinite(d_gates).all() and d_gates[kept].any()
    work.step(tuple(grads), **SGD)
    for tensor in cut.tensors:
        idle = np.repeat(~kept[tensor.blocks], tensor.sizes)
        assert torch.equal(work.params[tensor.name].flatten()[idle], received[tensor.name].flatten()[idle])
    values, touched = work.values(), pack_bits(work.touched)
    assert 4 * len(values) + len(touched) == cut.spent(kept, "bytes")
    for region, value in unpack(values, cut, unpack_bits(touched, cut.parts), task.shapes):
        region.put_(received[region.name], value)
    assert all(torch.equal(received[key], t) for key, t in work.params.items())


@pytest.mark.parametrize(("name", "mode"), [*((name, "paper") for name in FOREIGN), (FOREIGN[-1], "official")])
def test_two_rounds_of_pfedgate(name: str, mode: str) -> None:
    """The method as it is, with the engine around it: two workers give the bits of one."""
    task = foreign_task(name)
    data = [foreign_data(name, n) for n in (8, 11)]
    options = {"mode": mode, "batch_size": 4, "gate_pool": 4, "blocks_per_layer": 5, "branches": "shared"}
    digests = set()
    for workers in (1, 2):
        devices = [Device(i, Budget(density=d)) for i, d in enumerate((0.5, 0.9))]
        clients = [Client(device, own, own, own) for device, own in zip(devices, data, strict=True)]
        strategy = build(load_method("pfedgate"), options)
        with LocalGrid(client_app(task, clients.__getitem__), 2, workers=workers, own_replies=False) as grid:
            plan = Plan(on_over_budget="record")
            reports = list(strategy.rounds(grid, 2, task=task, devices=devices, plan=plan))
            memories = {i: dict(decode(s).tensors) for i, s in grid.states().items()}
        digests.add(digest(strategy.state, memories))
        assert all(0 <= r["accuracy"]["personal"] <= 1 for r in reports)
        moved = sum(int((strategy.state.params[n] != t).sum()) for n, t in task.init_params().items())
        assert moved > 0.3 * sum(math.prod(task.shapes[n]) for n in task.trainable)
    assert len(digests) == 1
