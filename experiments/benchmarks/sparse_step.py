"""Time and weigh one training step of a sparse model against PyTorch's dense one.

    python experiments/benchmarks/sparse_step.py --model resnet18 --density 0.01 [--json FILE]
    python experiments/benchmarks/sparse_step.py --table [--json FILE]     # all bounds that the kernels were built for

A step is forward, backward and SGD with momentum on one batch, on one thread. Three models start from the same values
and their first losses must agree:

    sparse          ``fedsparse.masked.network`` on kept weights: random positions, the same density in each layer that
                    papers prune (all weight layers but ``cost.exempt_layers``)
    channels_last   PyTorch's dense network in its faster layout, pruned weights at zero
    default         the same in the default layout

They run in turn, step by step, in one process. A ratio is the median over rounds of the sparse step's time over the
dense step's in the same round, with a 95 % bootstrap interval.

``memory_*``: what training adds to a process, parameters, gradients, momentum and activations: the peak of its resident
set during three steps (VmHWM, set back through /proc/self/clear_refs) minus its resident set before the model was
built, in a fresh process a side, with libraries and compiled kernels loaded by a step of a tiny model of the same kind
and the batch already there. Both sides run with blocks from 64 kB on mapped on their own and unmapped when freed
(MALLOC_MMAP_THRESHOLD_), so that neither is charged for holes in the heap, which under glibc's defaults add a third to
a half to the dense side. The dense template that a task keeps, once a process and for all clients, is left out on the
sparse side: ``template_bytes``. Null where there is no Linux /proc.

``storage_bytes``: parameters, running statistics, gradients and momentum, and all of the pattern that outlives a step:
the mask's positions (int32) and, as an upper bound, positions for the layers without a mask. ``transient_bytes``: what
a convolution makes of the pattern in one pass and drops again, the transposed one included, at the largest layer.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from fedsparse.cost import Layer, exempt_layers, trace
from fedsparse.masked import network
from fedsparse.models import build_model
from fedsparse.seeding import torch_rng
from fedsparse.sparse.masks import Mask, compact, whole
from fedsparse.sparse.pruning import at_random
from fedsparse.sparse.representation import cpu_name, crossovers
from fedsparse.steps import step_
from fedsparse.task import Task

SEED, LR, MOMENTUM = 0, 1e-3, 0.9
SIDES = ("sparse", "channels_last", "default")
SHAPES = {
    "resnet18": (3, 32, 32),
    "vgg11": (3, 32, 32),
    "lenet": (3, 32, 32),
    "leafcnn1": (1, 28, 28),
    "mlp": (1, 28, 28),
}
CLASSES = {"leafcnn1": 62}  # others: 10
SECONDS = 120.0  # that the rounds of a case take, unless their number is given
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
BOUNDS: dict[tuple[str, float], dict[str, float]] = {  # of the issue that asked for the kernels, at batch 64
    ("resnet18", 0.1): {"ratio_to_channels_last": 1.0, "memory_ratio": 1.0},
    ("resnet18", 0.05): {"ratio_to_channels_last": 0.55},
    ("resnet18", 0.01): {"ratio_to_channels_last": 0.2, "memory_ratio": 0.6, "storage_bytes": 3.0e6},
    ("resnet18", 0.001): {"ratio_to_channels_last": 0.15, "memory_ratio": 0.6},
    ("vgg11", 0.01): {"ratio_to_channels_last": 0.2},
    ("leafcnn1", 0.1): {"ratio_to_channels_last": 0.6},
}
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model and how it is trained. sparse: how layers are computed, "auto" (the faster way, measured) or "sparse";
    crossover: what that means here, by layer."""

    model: str
    density: float
    batch: int = 64
    classes: int = 10
    width: float = 1.0
    norm: str = "batch"
    sparse: str = "auto"
    crossover: dict[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.model]


# --- the models ------------------------------------------------------------------------------------------------------


def make_task(case: Case) -> Task:
    """The case's model with fixed initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build_model(case.model, case.shape, case.classes, width=case.width, norm=case.norm)
    return Task(model, case.shape, case.classes, SEED, crossover=case.crossover)


def maskable(task: Task) -> list[Layer]:
    """The layers that papers prune."""
    layers = trace(task.model, task.input_shape)
    exempt = exempt_layers(layers)
    return [layer for layer in layers if layer.weights and layer.name not in exempt]


def make_mask(task: Task, density: float) -> dict[str, Tensor]:
    """Random positions, the same share of each layer and one at least."""
    rng = torch_rng(SEED, "mask")
    return {
        layer.weight_name: at_random(layer.weights, max(1, round(density * layer.weights)), rng)
        for layer in maskable(task)
    }


def make_batch(case: Case, side: str) -> tuple[Tensor, Tensor]:
    """Images in the layout of that side, (batch, *shape), and labels, (batch,)."""
    rng = torch_rng(SEED, "batch")
    x = torch.randn(case.batch, *case.shape, generator=rng)
    y = torch.randint(case.classes, (case.batch,), generator=rng)
    return x.contiguous(memory_format=layout(side)), y


def layout(side: str) -> torch.memory_format:
    return torch.channels_last if side == "channels_last" else torch.contiguous_format


class Training:
    """One model in training, by the same steps whatever computes it.

    state: its parameters and buffers; leaves: those of them that are trained.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], task: Task, state: dict[str, Tensor], batch: tuple[Tensor, Tensor]
    ) -> None:
        self.forward, self.task, self.state, self.batch = forward, task, state, batch
        self.leaves = [state[name].requires_grad_() for name in task.trainable]
        self.velocity: list[Tensor] = []

    def step(self) -> float:
        """One step; the loss before it."""
        loss = self.task.criterion(self.forward(self.batch[0]), self.batch[1])
        grads = torch.autograd.grad(loss, self.leaves)
        with torch.no_grad():
            step_(self.leaves, grads, self.velocity, lr=LR, momentum=MOMENTUM)
        return loss.item()

    def storage(self) -> int:
        """Bytes of parameters, buffers, gradients and momentum, after a step."""
        state, trained = sum(t.nbytes for t in self.state.values()), sum(t.nbytes for t in self.leaves)
        return state + trained + sum(t.nbytes for t in self.velocity)


@contextmanager
def opened(case: Case, side: str, batch: tuple[Tensor, Tensor], *, template: bool = True) -> Iterator[Training]:
    """A side's model, ready to train. template: whether the task keeps the dense model's values."""
    task = make_task(case)
    mask = make_mask(task, case.density)
    state = compact(task.init_params(), mask)
    if side == "sparse":
        if not template:
            task.model.to("meta")
        task.model.train(True)
        with network(task, state, mask) as forward:
            yield Training(forward, task, state, batch)
        return
    task.model.load_state_dict(whole(state, mask, task.shapes), strict=False)  # but for batch counters, which are gone
    task.model.to(memory_format=layout(side)).train(True)  # type: ignore[call-overload]
    yield Training(task.model, task, {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}, batch)


# --- time ------------------------------------------------------------------------------------------------------------


def measure_time(case: Case, steps: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each step, and bytes of storage, by side. steps: rounds, 0 = for about ``SECONDS``."""
    with ExitStack() as stack:
        models = {side: stack.enter_context(opened(case, side, make_batch(case, side))) for side in SIDES}
        losses = {side: model.step() for side, model in models.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-3 * losses["default"], f"first losses differ: {losses}"
        rounds = steps or max(7, min(101, int(SECONDS / sum(timed(model) for model in models.values()))))
        seconds: dict[str, list[float]] = {side: [] for side in models}
        for _ in range(rounds):
            for side, model in models.items():
                seconds[side].append(timed(model))
        return seconds, {side: model.storage() for side, model in models.items()}


def timed(model: Training) -> float:
    start = time.perf_counter()
    model.step()
    return time.perf_counter() - start


def interval(values: list[float]) -> list[float]:
    """95 % bootstrap interval of the median."""
    draws = np.median(np.random.default_rng(SEED).choice(np.array(values), size=(4000, len(values))), axis=1)
    return [float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))]


def ratios(seconds: dict[str, list[float]]) -> Result:
    """Medians of seconds, of the ratios by round, and their intervals."""
    out: Result = {f"seconds_{side}": float(np.median(values)) for side, values in seconds.items()}
    for side in SIDES[1:]:
        ratio = [a / b for a, b in zip(seconds["sparse"], seconds[side], strict=True)]
        out |= {f"ratio_to_{side}": float(np.median(ratio)), f"interval_to_{side}": interval(ratio)}
    return out


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_of(case: Case, side: str, steps: int = 3) -> int | None:
    """Peak bytes that the model and ``steps`` steps add to this process; see the head of this file."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    torch.set_num_threads(1)
    tiny = replace(
        case, width=max(case.width / 4, 0.125), batch=4
    )  # dense ResNets of torch 2.13 crash below 8 channels
    with opened(tiny, side, make_batch(tiny, side), template=False) as model:
        model.step()
    del model
    batch = make_batch(case, side)
    gc.collect()
    before = resident("VmRSS")
    with opened(case, side, batch, template=False) as model:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to what is resident now
        for _ in range(steps):
            model.step()
        return resident("VmHWM") - before


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure_memory(case: Case) -> Result:
    """Peak bytes of a step, sparse and dense (channels-last), each in a fresh process."""
    return weigh(memory_of, case, "sparse", "channels_last")


def weigh(memory: Callable[[Any, str], int | None], case: Any, sparse: str, dense: str) -> Result:
    """What ``memory(case, side)`` finds for two sides, each in a fresh process, and their ratio."""
    os.environ.update(MALLOC)  # read when a process starts: for the new ones only
    found = []
    for side in (sparse, dense):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(memory, case, side).result())
    ratio = found[0] / found[1] if found[0] is not None and found[1] else None
    return {"memory_sparse": found[0], "memory_dense": found[1], "memory_ratio": ratio}


# --- storage ---------------------------------------------------------------------------------------------------------


def measure_storage(case: Case, tensors: dict[str, int]) -> Result:
    """Bytes that outlive a step, the pattern's included. tensors: those of parameters, gradients and momentum."""
    task = make_task(case)
    mask = make_mask(task, case.density)
    layers = trace(task.model, task.input_shape)
    positions = sum(kept.nbytes for kept in mask.values())
    positions += sum(4 * layer.weights for layer in layers if layer.weights and layer.weight_name not in mask)
    return {
        "storage_bytes": tensors["sparse"] + positions,
        "storage_dense_bytes": tensors["channels_last"],
        "pattern_bytes": positions,
        "transient_bytes": max(transient(layer, mask) for layer in layers if layer.weights),
        "template_bytes": sum(t.nbytes for t in task.init_params().values()),
        "nominal_density": sum(map(len, mask.values())) / sum(layer.weights for layer in maskable(task)),
        "dense_layers": sorted(layer.name for layer in layers if layer.weights and is_dense(layer, mask, case)),
    }


def transient(layer: Layer, mask: Mask) -> int:
    """Offsets of a layer's pattern, channels, offsets and values of the transposed one, and where their rows begin."""
    phases = 4  # of a convolution with stride 2
    rows = layer.units_out + 2 * (phases * layer.units_in + 1) + 1
    return 16 * kept_weights(layer, mask) + 8 * rows


def kept_weights(layer: Layer, mask: Mask) -> int:
    return len(mask[layer.weight_name]) if layer.weight_name in mask else layer.weights


def is_dense(layer: Layer, mask: Mask, case: Case) -> bool:
    """Whether a layer is computed masked dense."""
    return kept_weights(layer, mask) / layer.weights >= case.crossover[layer.name]


# --- cases -----------------------------------------------------------------------------------------------------------


def resolved(case: Case) -> Case:
    """The case with its crossovers, measured on this machine if they are not yet known."""
    return replace(case, crossover=crossovers(make_task(case).model, case.shape, case.sparse, case.batch))


def measure(case: Case, steps: int) -> Result:
    """All figures of a case, and the bounds for them."""
    case = resolved(case)
    seconds, tensors = measure_time(case, steps)
    result = {key: value for key, value in asdict(case).items() if key != "crossover"}
    result |= {"steps": len(seconds["sparse"]), **ratios(seconds), **measure_memory(case)}
    result |= measure_storage(case, tensors)
    bounds = BOUNDS.get((case.model, case.density), {}) if case == standard(case) else {}
    return result | {
        "bounds": bounds,
        "passed": all(meets(result, key, bound) is not False for key, bound in bounds.items()),
    }


def standard(case: Case) -> Case:
    """The case that the bounds are for."""
    classes = CLASSES.get(case.model, 10)
    return Case(case.model, case.density, classes=classes, sparse=case.sparse, crossover=case.crossover)


def meets(result: Result, key: str, bound: float) -> bool | None:
    """Whether a figure is within its bound; None: it could not be measured."""
    value = result[key]
    if value is None:
        return None
    return bool(value + (result["transient_bytes"] if key == "storage_bytes" else 0) <= bound)


def machine() -> Result:
    """What the times depend on."""
    return {"torch": torch.__version__, "cpu": cpu_name(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


# --- output ----------------------------------------------------------------------------------------------------------


def show(result: Result) -> None:
    """Some lines for people."""
    r = result
    print(f"\n{r['model']} at density {r['density']:g}, batch {r['batch']}, median of {r['steps']} rounds")
    print(f"  sparse         {r['seconds_sparse']:.4f} s; dense layers: {', '.join(r['dense_layers']) or 'none'}")
    for side in SIDES[1:]:
        low, high = r[f"interval_to_{side}"]
        ratio = f"ratio {r[f'ratio_to_{side}']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"  {side:14} {r[f'seconds_{side}']:.4f} s  {ratio}")
    if r["memory_ratio"] is not None:
        print(f"  memory         {r['memory_sparse'] / 1e6:.1f} MB, dense {r['memory_dense'] / 1e6:.1f} MB", end="")
        print(f"  ratio {r['memory_ratio']:.3f}")
    print(f"  storage        {r['storage_bytes'] / 1e6:.2f} MB, dense {r['storage_dense_bytes'] / 1e6:.2f} MB", end="")
    print(f"; in a pass also {r['transient_bytes'] / 1e6:.2f} MB")
    for key, bound in r["bounds"].items():
        word = {True: "pass", False: "FAIL", None: "not measured"}[meets(r, key, bound)]
        print(f"  {key} at most {bound:g}: {word}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="resnet18")
    parser.add_argument("--density", type=float, default=0.01, help="nominal, of each layer that papers prune")
    parser.add_argument("--table", action="store_true", help="all cases with bounds")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help=f"rounds; 0 = for about {SECONDS:g} s, 7 to 101")
    parser.add_argument("--classes", type=int, help="default: 62 for leafcnn1, else 10")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--norm", choices=("batch", "group"), default="batch")
    parser.add_argument("--sparse", choices=("auto", "sparse"), default="auto", help="see fedsparse's setting")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[Case]:
    """What the arguments ask for."""
    if args.table:
        return [Case(model, density, classes=CLASSES.get(model, 10), sparse=args.sparse) for model, density in BOUNDS]
    classes = args.classes or CLASSES.get(args.model, 10)
    return [Case(args.model, args.density, args.batch, classes, args.width, args.norm, args.sparse)]


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(1)
    results = []
    for case in cases(args):
        results.append(measure(case, args.steps) | machine())
        show(results[-1])
        gc.collect()
    if args.table:
        print(f"\n{sum(r['passed'] for r in results)} of {len(results)} rows within their bounds")
    if args.json:
        out = {**machine(), "rows": results} if args.table else results[0]
        args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
