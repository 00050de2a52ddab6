"""Which layers are computed sparse: crossovers, their file, the choice in a run, and what happens without numba."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tomllib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedsparse
from fedsparse.errors import UserError
from fedsparse.experiment import from_dict
from fedsparse.masked import network, score_masked, top_gradients
from fedsparse.seeding import torch_rng
from fedsparse.sparse.masks import Mask, compact, whole
from fedsparse.sparse.program import UnsupportedError
from fedsparse.sparse.representation import crossovers, executor_for, prepare, program_of, why_dense
from fedsparse.task import Params, Split, Task
from tests.helpers import CLASSES, small_split, small_task

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 9, 9)


def conv_task() -> Task:
    """Strided and plain convolutions, both norms, a pool and two linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = {
            "conv1": nn.Conv2d(2, 8, 3, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(8),
            "relu1": nn.ReLU(),
            "conv2": nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
            "gn2": nn.GroupNorm(3, 12),
            "relu2": nn.ReLU(),
            "pool": nn.MaxPool2d(2),
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(48, 40),
            "relu3": nn.ReLU(),
            "output": nn.Linear(40, CLASSES),
        }
        model = nn.Sequential()
        for name, layer in layers.items():
            model.add_module(name, layer)
        return Task(model, SHAPE, CLASSES, 0)


def half_mask(task: Task, names: tuple[str, ...] = ("conv2", "fc1"), share: float = 0.5) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    mask = {}
    for name in names:
        n = int(torch.tensor(task.shapes[f"{name}.weight"]).prod())
        mask[f"{name}.weight"] = torch.randperm(n, generator=rng)[: max(1, int(share * n))].sort().values.int()
    return mask


def gradients(task: Task, params: Params, mask: Mask, data: Split) -> list[Tensor]:
    own = {name: t.detach().clone() for name, t in params.items()}
    leaves = [own[name].requires_grad_() for name in task.trainable]
    task.model.train(True)
    with network(task, own, mask) as forward:
        return list(torch.autograd.grad(task.criterion(forward(data.x), data.y), leaves))


# --- the choice ------------------------------------------------------------------------------------------------------


def test_layers_go_dense_from_their_crossover_on() -> None:
    task = conv_task()
    mask = half_mask(task)

    def dense(crossover: dict[str, float]) -> Any:
        executor = executor_for(task.model, task.input_shape, mask, crossover)
        return None if executor is None else set(executor.dense)

    low = dict.fromkeys(("conv1", "conv2", "fc1", "output"), 0.4)
    assert dense(low) is None  # all masked layers: plain torch
    assert dense({**low, "fc1": 0.6}) == {"conv1", "conv2", "output"}
    assert dense(dict.fromkeys(low, 2.0)) == set()
    assert dense({**dict.fromkeys(low, 2.0), "conv2": 0.5}) == {"conv2"}  # at the crossover dense wins


@pytest.mark.parametrize(
    "crossover",
    [{}, {"conv1": 2.0, "conv2": 2.0, "fc1": 2.0, "output": 2.0}, {"conv2": 0.1, "fc1": 2.0}],
    ids=["default", "sparse", "mixed"],
)
def test_gradients_and_scores_do_not_depend_on_the_representation(crossover: dict[str, float]) -> None:
    task, data = conv_task(), small_split(7, "x", shape=SHAPE)
    mask = half_mask(task, share=0.15)
    params = compact(task.init_params(), mask)
    task.crossover = {"conv1": 0.0, "conv2": 0.0, "fc1": 0.0, "output": 0.0}
    expected, score = gradients(task, params, mask, data), score_masked(task, params, mask, data)
    task.crossover = crossover
    assert executor_for(task.model, task.input_shape, mask, crossover) is not None
    for got, want in zip(gradients(task, params, mask, data), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    again = score_masked(task, params, mask, data)
    assert (again.n, again.correct, again.loss) == (score.n, score.correct, pytest.approx(score.loss, rel=1e-5))


def test_float64_and_models_without_a_sparse_form_are_computed_masked_dense() -> None:
    task, data = conv_task(), small_split(5, "x", shape=SHAPE)
    mask = half_mask(task)
    params = {name: t.double() for name, t in compact(task.init_params(), mask).items()}
    double = gradients(task, params, mask, Split(data.x.double(), data.y))
    assert all(g.dtype == torch.float64 for g in double)
    series = small_task("cnn1d", shape=(2, 32))
    assert why_dense(series.model, series.input_shape).startswith("its input has 2 axes")
    some = {"conv2.weight": torch.tensor([0, 3], dtype=torch.int32)}
    assert executor_for(series.model, series.input_shape, some, {}) is None
    with pytest.raises(UnsupportedError):
        crossovers(series.model, series.input_shape, "sparse", 8)
    assert len(gradients(series, compact(series.init_params(), some), some, small_split(4, "s", shape=(2, 32)))) > 0


@pytest.mark.parametrize("a", [1, 7, 10_000])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_largest_gradients_of_pruned_weights(sparse: bool, a: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsparse.sparse.executor.SEARCH_PIECE", 150)  # several pieces
    monkeypatch.setattr("fedsparse.masked.SEARCH_PIECE", 150)
    task, data = conv_task(), small_split(9, "x", shape=SHAPE)
    mask = half_mask(task)
    task.crossover = dict.fromkeys(("conv1", "conv2", "fc1", "output"), 2.0 if sparse else 0.0)
    params = compact(task.init_params(), mask)
    before = {name: t.clone() for name, t in params.items()}
    found = top_gradients(task, params, mask, data, dict.fromkeys(mask, a))
    assert all(torch.equal(before[name], params[name]) for name in before)  # running statistics too
    full = whole(params, mask, task.shapes)
    leaves = {name: full[name].clone().requires_grad_() for name in mask}
    loss = task.loss({**{n: t.clone() for n, t in full.items()}, **leaves}, data.x, data.y, train=True)
    for name, dense in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        at, values = found[name]
        pruned = torch.ones(dense.numel(), dtype=torch.bool)
        pruned[mask[name].long()] = False
        size = dense.flatten().abs()
        assert len(at) == min(a, int(pruned.sum()))
        assert at.dtype == torch.int32
        assert bool((at[1:] > at[:-1]).all())
        assert bool(pruned[at.long()].all())
        assert torch.allclose(values, dense.flatten()[at.long()], rtol=1e-4, atol=1e-5 * float(size.max()))
        left = pruned.clone()
        left[at.long()] = False
        if bool(left.any()):
            assert float(size[left].max()) <= float(size[at.long()].min()) * (1 + 1e-4) + 1e-6


def test_what_a_trace_cannot_see_is_computed_masked_dense() -> None:
    class Moody(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if self.training else x + x)

    hooked, tied, moody = conv_task().model, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), Moody(nn.Linear(3, 3))
    hooked.get_submodule("conv2").register_forward_hook(lambda *_: None)
    tied[1].weight = tied[0].weight
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert why_dense(hooked, SHAPE) == "layer conv2 has hooks or parametrizations"
    assert why_dense(tied, (3,)) == "layers share a parameter"
    assert why_dense(moody, (3,)) == "it computes something else in training than in evaluation"
    assert "hooks or parametrizations" in why_dense(nn.Sequential(normed), (3,))


def test_a_refused_model_is_not_kept_alive() -> None:
    """Nor the frames of those who asked."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1))
    alive = weakref.ref(model)
    for _ in range(3):
        assert why_dense(model, (1, 4))
    del model
    gc.collect()
    assert alive() is None


def test_a_program_belongs_to_a_shape_of_the_input() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    shapes = [(1, 8, 8), (1, 12, 12)]
    assert [program_of(model, shape).values[1].height for shape in shapes] == [6, 10]


@pytest.mark.parametrize("damage", ["layout", "float64", "gradient", "kept", "bias"])
def test_inputs_and_parameters_that_do_not_fit_are_one_clear_line(damage: str) -> None:
    task, data = conv_task(), small_split(4, "x", shape=SHAPE)
    mask = half_mask(task)
    task.crossover = dict.fromkeys(("conv1", "conv2", "fc1", "output"), 2.0)
    params, x = compact(task.init_params(), mask), data.x
    if damage == "layout":
        x = x.permute(0, 2, 3, 1)
    elif damage == "float64":
        x = x.double()
    elif damage == "gradient":
        x = x.clone().requires_grad_()
    elif damage == "kept":
        params["fc1.weight"] = params["fc1.weight"][:-1]
    else:
        params["fc1.bias"] = params["fc1.bias"][:-1]
    wanted = {"layout": r"of shape \(9, 9, 2\)", "float64": "float64", "gradient": "gradient of the input"}
    wanted |= {"kept": "fc1.weight has 959", "bias": "fc1.bias has 39"}
    with network(task, params, mask) as forward, pytest.raises(UserError, match=wanted[damage]):
        forward(x)


def test_no_examples_and_no_second_backward_pass() -> None:
    task, data = conv_task(), small_split(4, "x", shape=SHAPE)
    mask = half_mask(task)
    task.crossover = dict.fromkeys(("conv1", "conv2", "fc1", "output"), 2.0)
    params = {name: t.requires_grad_(name in task.trainable) for name, t in compact(task.init_params(), mask).items()}
    task.model.train(True)
    with network(task, params, mask) as forward:
        assert forward(data.x[:0]).shape == (0, CLASSES)
        loss = forward(data.x).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward pass"):
            loss.backward()


def test_gradients_that_are_not_finite_are_named() -> None:
    task, data = conv_task(), small_split(4, "x", shape=SHAPE)
    mask = half_mask(task)
    for choice in (0.0, 2.0):
        task.crossover = dict.fromkeys(("conv1", "conv2", "fc1", "output"), choice)
        params = compact(task.init_params(), mask)
        params["conv1.weight"] = params["conv1.weight"] * float("nan")
        with pytest.raises(UserError, match="not finite"):
            top_gradients(task, params, mask, data, {"conv2.weight": 3})


def sequence_task() -> Task:
    """A linear layer on each position of a sequence."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), Transposed(), nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4))
    return Task(model, (3, 5), 4, seed=0)


class Transposed(nn.Module):
    """(n, channels, positions) -> (n, positions, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_the_largest_gradients_of_a_layer_on_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsparse.masked.SEARCH_PIECE", 10)  # several pieces
    task, data = sequence_task(), small_split(9, "x", shape=(3, 5))
    mask = {"2.weight": torch.tensor([3, 11], dtype=torch.int32)}
    params = compact(task.init_params(), mask)
    ((at, values),) = top_gradients(task, params, mask, data, {"2.weight": 22}).values()
    full = whole(params, mask, task.shapes)
    leaf = full["2.weight"].clone().requires_grad_()
    (dense,) = torch.autograd.grad(task.loss({**full, "2.weight": leaf}, data.x, data.y, train=True), leaf)
    assert len(at) == 22
    assert torch.allclose(values, dense.flatten()[at.long()], rtol=1e-4, atol=1e-7)


class Branches(nn.Module):
    """Two layers beside each other on embedded tokens, a ReLU in place, and a layer on both."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 5)
        self.output = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x).mean(1)
        return self.output(nn.functional.relu(self.left(x), inplace=True) + self.right(x))


def test_the_largest_gradients_of_a_model_of_tokens() -> None:
    task = Task(Branches(), (7,), 4, seed=0, vocabulary=20)
    rng = torch_rng(0, "tokens")
    data = Split(torch.randint(20, (9, 7), generator=rng), torch.randint(4, (9,), generator=rng))
    mask = {f"{name}.weight": torch.tensor([1, 4], dtype=torch.int32) for name in ("left", "right", "output")}
    params = compact(task.init_params(), mask)
    found = top_gradients(task, params, mask, data, dict.fromkeys(mask, 5))
    full = whole(params, mask, task.shapes)
    leaves = {name: full[name].clone().requires_grad_() for name in mask}
    loss = task.loss({**full, **leaves}, data.x, data.y, train=True)
    for name, dense in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        free = dense.flatten().abs()
        free[mask[name].long()] = -1
        at, values = found[name]
        assert at.tolist() == sorted(free.argsort(descending=True, stable=True)[:5].tolist())  # of equals the lowest
        assert torch.allclose(values, dense.flatten()[at.long()], rtol=1e-4, atol=1e-7)


class Standardised(nn.Linear):
    """A layer that computes with another weight than it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


class Odd(nn.Module):
    """A layer that is used twice, or not called."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.uses = uses
        self.fc = nn.Linear(6, 6)
        self.output = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.uses:
            return self.output(nn.functional.linear(x, self.fc.weight, self.fc.bias))
        for _ in range(self.uses):
            x = self.fc(x)
        return self.output(x)


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (Odd(2), "fc.weight", "'fc.weight' cannot be searched: it is used twice"),
        (Odd(0), "fc.weight", "'fc.weight' cannot be searched: the layer is not called"),
        (
            nn.Sequential(nn.Unflatten(1, (2, 3)), nn.ConvTranspose1d(2, 4, 1), nn.Flatten(), nn.Linear(12, 4)),
            "1.weight",
            "of a ConvTranspose1d, which computes in its own way, cannot be searched",
        ),
        (
            nn.Sequential(Standardised(6, 6), nn.Linear(6, 4)),
            "0.weight",
            "of a Standardised, which computes in its own way, cannot be searched",
        ),
    ],
)
def test_layers_whose_gradients_cannot_be_searched_are_refused(model: nn.Module, name: str, message: str) -> None:
    task, data = Task(model, (6,), 4, seed=0), small_split(4, "x", shape=(6,))
    mask = {name: torch.tensor([0, 5], dtype=torch.int32)}
    with pytest.raises(UserError, match=message):
        top_gradients(task, compact(task.init_params(), mask), mask, data, {name: 3})


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("piece", [1, 20, 61, 10_000])
@pytest.mark.parametrize(
    "how",
    [
        {"out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2},
        {"out_channels": 8, "kernel_size": 3, "padding": (0, 1), "stride": 2, "groups": 4, "bias": False},
        {"out_channels": 6, "kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
        {"out_channels": 6, "kernel_size": 2, "padding": "valid", "groups": 2},
        {"out_channels": 6, "kernel_size": 3, "padding": (2, 1), "stride": 2, "padding_mode": "circular"},
        {"out_channels": 6, "kernel_size": (2, 3), "padding": "same", "groups": 2, "padding_mode": "replicate"},
    ],
    ids=["groups", "depthwise", "same", "valid", "circular", "replicate"],
)
def test_the_largest_gradients_of_any_convolution(
    how: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsparse.masked.SEARCH_PIECE", piece)
    layer = nn.Conv2d(4, **how)
    features = layer(torch.zeros(1, 4, 5, 6)).numel()
    task = Task(nn.Sequential(layer, nn.Flatten(), nn.Linear(features, 4)), (4, 5, 6), 4, seed=0)
    data, mask = small_split(9, "x", shape=(4, 5, 6)), {"0.weight": torch.tensor([3, 11], dtype=torch.int32)}
    params, pruned = compact(task.init_params(), mask), layer.weight.numel() - 2
    ((at, values),) = top_gradients(task, params, mask, data, {"0.weight": pruned}).values()
    full = whole(params, mask, task.shapes)
    leaf = full["0.weight"].clone().requires_grad_()
    (dense,) = torch.autograd.grad(task.loss({**full, "0.weight": leaf}, data.x, data.y, train=True), leaf)
    assert len(at) == pruned
    assert torch.allclose(values, dense.flatten()[at.long()], rtol=1e-4, atol=1e-7)


# --- measuring -------------------------------------------------------------------------------------------------------


def test_crossovers_are_measured_once_and_kept(tmp_path: Path) -> None:
    task = conv_task()
    first = crossovers(task.model, SHAPE, "auto", 8, tmp_path)
    assert set(first) == {"conv1", "conv2", "fc1", "output"}
    assert all(0 <= value <= 2 for value in first.values())
    assert crossovers(task.model, SHAPE, "auto", 8, tmp_path) == first
    (file,) = tmp_path.iterdir()
    data = json.loads(file.read_text(encoding="utf-8"))
    (machine,) = data
    data[machine] = dict.fromkeys(data[machine], 0.123)
    file.write_text(json.dumps(data), encoding="utf-8")
    assert set(crossovers(task.model, SHAPE, "auto", 8, tmp_path).values()) == {0.123}
    file.write_text("damaged", encoding="utf-8")
    assert 0.123 not in crossovers(task.model, SHAPE, "auto", 8, tmp_path).values()


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    task = conv_task()
    assert len(crossovers(task.model, SHAPE, "auto", 8, tmp_path / "file" / "folder")) == 4


def test_what_is_given_is_not_measured(tmp_path: Path) -> None:
    task = conv_task()
    given = {"conv1": 0.5, "conv2": 0.25, "fc1": 0.125, "output": 1.0}
    assert crossovers(task.model, SHAPE, "auto", 8, tmp_path, given) == given
    assert not list(tmp_path.iterdir())
    assert set(prepare(task.model, SHAPE, "dense", 8).values()) == {0.0}
    assert set(prepare(task.model, SHAPE, "sparse", 8).values()) == {2.0}


@pytest.mark.parametrize("pixel", [True, False])
def test_a_driver_prepares_norms_on_single_values(pixel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSPARSE_CACHE", str(tmp_path))
    norm = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    image = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model, shape = (image, (1, 1, 1)) if pixel else (norm, (5,))
    assert all(0 <= value <= 2 for value in prepare(model, shape, "auto", 4).values())


# --- runs ------------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    base = {"dataset": "digits", "model": "mlp", "rounds": 2, "method": {"name": "fixed_mask", "density": 0.1}}
    return base | {"partition": {"clients": 3}, "evaluate": {"every": 2}} | changes


def test_a_run_writes_its_crossovers_and_its_config_repeats_it(tmp_path: Path) -> None:
    done = fedsparse.run(from_dict(settings()), out=tmp_path / "a")
    config = tomllib.loads((tmp_path / "a" / "config.toml").read_text(encoding="utf-8"))
    assert set(config["crossover"]) == {"fc1", "output"}
    changed = (tmp_path / "a" / "config.toml").read_text(encoding="utf-8")
    again = fedsparse.run(fedsparse.load_experiment(tmp_path / "a" / "config.toml"), out=tmp_path / "b")
    assert again.summary["digest"] == done.summary["digest"]
    assert (
        tomllib.loads((tmp_path / "b" / "config.toml").read_text(encoding="utf-8"))["crossover"] == config["crossover"]
    )
    assert "[crossover]" in changed


@pytest.mark.parametrize("method", ["fixed_mask", "fedtiny"])
@pytest.mark.parametrize("side", ["sparse", "dense"])
def test_one_digest_on_any_number_of_workers(method: str, side: str, tmp_path: Path) -> None:
    """And the two sides are really computed differently."""
    digests = {}
    for workers in (1, 4):
        engine = {"workers": workers}
        experiment = from_dict(
            settings(sparse=side, engine=engine, model="lenet", width=0.5, method={"name": method, "density": 0.1})
            | {"dataset": str(_images(tmp_path))}
        )
        digests[workers] = fedsparse.run(experiment, out=tmp_path / f"{workers}").summary["digest"]
    assert digests[1] == digests[4]


def _images(folder: Path) -> Path:
    """150 small pictures of three kinds in an .npz file."""
    import numpy as np

    file = folder / "images.npz"
    if not file.exists():
        rng = np.random.default_rng(0)
        y = rng.integers(0, 3, 150)
        x = rng.integers(0, 128, (150, 16, 16, 1)) + 40 * y[:, None, None, None]
        np.savez(file, x=x.astype(np.uint8), y=y)
    return file


def test_what_does_not_fit_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"crossover.fc1 must be at least 0, got -1"):
        from_dict(settings(crossover={"fc1": -1.0}))
    with pytest.raises(UserError, match=r"crossover.fc1 must be a number, got 'x'"):
        from_dict(settings(crossover={"fc1": "x"}))
    with pytest.raises(UserError, match=r"sparse"):
        from_dict(settings(sparse="fast"))
    with pytest.raises(UserError, match=r"unknown layer in \[crossover\] 'fc9'"):
        fedsparse.run(from_dict(settings(crossover={"fc9": 0.5})), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- without numba, and numba's cache --------------------------------------------------------------------------------


def python(code: str, root: Path = ROOT, **environment: str) -> str:
    """What a fresh Python prints that imports fedsparse from ``root``."""
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_numba_everything_is_computed_masked_dense_and_says_so(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
import fedsparse
from fedsparse.experiment import from_dict
for method in ("fixed_mask", "fedtiny"):
    experiment = from_dict({{"dataset": "digits", "rounds": 1, "method": {{"name": method, "density": 0.1}}}})
    print(fedsparse.run(experiment, out="{tmp_path}/" + method).summary["notes"])
"""
    lines = python(code).splitlines()
    assert lines == ["('all layers are computed masked dense: numba is not installed',)"] * 2


def test_a_numba_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 2.2 or less")', encoding="utf-8")
    code = """
from torch import nn
from fedsparse.sparse.representation import why_dense
print(why_dense(nn.Sequential(nn.Linear(2, 2)), (2,)))
"""
    line = python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}").strip()
    assert line == "numba cannot be imported (Numba needs NumPy 2.2 or less)"


_ADD = """
import numpy as np
from fedsparse.sparse import kernels
a, f = np.ones((1, 1, 2, 2), np.float32), np.ones((1, 1), np.float32)
out = np.empty_like(a)
kernels.add(a, f, f, False, a, f, f, True, out)
assert (out == 4).all()
print(sum(kernels.add.stats.cache_hits.values()))
"""


def test_a_later_process_starts_from_the_cache(tmp_path: Path) -> None:
    assert [python(_ADD, NUMBA_CACHE_DIR=str(tmp_path)).strip() for _ in range(2)] == ["0", "1"]


_PASSES = """
import hashlib, torch
from fedsparse.sparse import kernels
from fedsparse.sparse.executor import Executor
from fedsparse.sparse.masks import compact
from fedsparse.sparse.program import read_program
from tests.test_sparse_executor import MODELS, draw_batch, draw_mask, named_task, sparse_pass

torch.set_num_threads(1)
bits = hashlib.sha256()
for name in MODELS:
    task = named_task(name)
    mask, (x, y) = draw_mask(task, 0.2), draw_batch(task, 5)
    executor = Executor(read_program(task.model, task.input_shape), mask, frozenset())
    done = sparse_pass(executor, task, compact(task.init_params(), mask), x, y, train=True)
    for tensor in done.tensors().values():
        bits.update(tensor.numpy().tobytes())
print(sum(kernels._backward.stats.cache_hits.values()), bits.hexdigest())
"""


def test_compiled_kernels_and_those_of_the_cache_give_the_same_bits(tmp_path: Path) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    (compiled, bits), (read, again) = (python(_PASSES, **environment).split() for _ in range(2))
    assert (compiled, read, bits == again) == ("0", "1", True)


def test_a_cache_folder_of_numba_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """A file in the place of each folder: root, too, cannot write there."""
    import shutil

    shutil.copytree(ROOT / "fedsparse", tmp_path / "fedsparse", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fedsparse" / "sparse" / "__pycache__").write_text("a file", encoding="utf-8")
    (tmp_path / "home").write_text("a file", encoding="utf-8")
    nowhere = str(tmp_path / "home" / "x")
    environment = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import fedsparse; print(fedsparse.__file__)" + _ADD
    place, hits = python(code, tmp_path, **environment).split()
    assert (place, hits) == (str(tmp_path / "fedsparse" / "__init__.py"), "0")
