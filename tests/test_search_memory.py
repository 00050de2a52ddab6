"""FedTiny's search for the largest gradients of pruned weights never holds a layer's dense gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_SEARCH = """
import gc, json, sys, tracemalloc
import torch
from torch.profiler import ProfilerActivity, profile
from fedsparse.sparse import executor
from fedsparse.globalmask import kept_counts, prunable
from fedsparse.masked import top_gradients
from fedsparse.models import build_model
from fedsparse.seeding import torch_rng
from fedsparse.sparse.masks import compact
from fedsparse.sparse.pruning import at_random
from fedsparse.task import Split, Task

torch.set_num_threads(1)
executor.SEARCH_PIECE = int(sys.argv[1]) or executor.SEARCH_PIECE
task = Task(build_model("resnet18", (3, 32, 32), 10), (3, 32, 32), 10, seed=0)
sizes, rng = prunable(task).sizes, torch_rng("mask")
mask = {n: at_random(sizes[n], k, rng) for n, k in kept_counts(task, 0.01, "nominal", "uniform").items()}
params = compact(task.init_params(), mask)
stage = {n: sizes[n] for n in sizes if n.startswith("layer4")}
total, a = sum(stage.values()), 25_166
counts = {n: a * size // total for n, size in stage.items()}
x, y = torch.randn(2, 3, 32, 32, generator=rng), torch.randint(10, (2,), generator=rng)

def search(counts):
    return top_gradients(task, params, mask, Split(x, y), counts)

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def peak_resident(counts):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = resident("VmRSS")
    search(counts)
    return resident("VmHWM") - before

def allocated(counts):  # NumPy's by tracemalloc, PyTorch's by its profiler: the peaks of both, as if they were at once
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        search(counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return peak, most

for wanted in ({}, counts):
    search(wanted), allocated(wanted), peak_resident(wanted)  # kernels are compiled, buffers of libraries are there
numpy, torch_ = (b - a for a, b in zip(allocated({}), allocated(counts)))
rss = min(peak_resident(counts) for _ in range(3)) - min(peak_resident({}) for _ in range(3))
print(json.dumps({"weights": total, "found": sum(counts.values()), "counted": numpy + torch_, "resident": rss}))
"""


def search(piece: int) -> dict[str, int]:
    """What a search adds to the peak, in bytes, by counting allocations and by the process's resident set.

    piece: weights whose gradients exist at a time, 0 = as it is.
    """
    command = [sys.executable, "-c", _SEARCH, str(piece)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}  # what is freed goes back to the system
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout)
    assert 4 * found["weights"] > 33e6
    assert found["found"] > 25_000
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_a_search_in_the_last_stage_of_resnet18_takes_less_than_3_mb() -> None:
    """Of 25,166 gradients among 8.4 million weights, whose dense gradient has 33.6 MB; that of a layer has 9.4."""
    found = search(0)
    assert found["counted"] < 3e6
    assert found["resident"] < 3e6
    whole = search(2**30)  # with a layer's gradient at once: both ways of measuring see it
    assert whole["counted"] > 9e6
    assert whole["resident"] > 6e6
