"""Honest memory: a client under a memory budget trains in a process that could not hold the whole model once more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_CLIENT = """
import resource, sys
import torch
from clients.pfedgate import PFedGateClient
from fedsparse.models import build_model
from fedsparse.packet import Packet
from fedsparse.seeding import torch_rng
from fedsparse.task import Budget, Client, Device, Split, Task
from strategies.pfedgate import PFedGate

torch.set_num_threads(1)
download, margin = sys.argv[1], int(sys.argv[2])
model = build_model("mlp", (1, 28, 28), 10, width=160)  # 20,480 hidden units: 16.3 million weights, 65 MB
task = Task(model, (1, 28, 28), 10, seed=0)
dense = sum(p.numel() for p in model.parameters())
device = Device(0, Budget(density=0.1))
rng = torch_rng("data")
data = Split(torch.randn(96, 1, 28, 28, generator=rng), torch.randint(10, (96,), generator=rng))
client = Client(device, data, data, data)
options = {"mask_scope": "round", "download": download, "gate_pool": 7, "momentum": 0.9}
server = PFedGate(client_config=options)
state = server.init(task, [device])
packet = server.broadcast(state, device)
half = PFedGateClient(**options)
small = Packet(packet.kind, {n: t[:1] for n, t in packet.tensors.items()}, packet.scalars)
half._scene(task, client, small, {})  # cut and costs are derived once a process
if download == "kept":  # of the whole model nothing stays but names and shapes
    state = None
    task.model.to("meta")
warm, _ = half.train(task, client, packet, {}, torch_rng("warm"))  # with it come the buffers of libraries
if download == "kept":  # what the cost model says, less the packet, which is there already
    margin += int(warm.scalars["memory"]) - packet.nbytes
else:
    margin += int(sys.argv[3])

def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

resource.setrlimit(resource.RLIMIT_AS, (size() + margin, size() + margin))
reply, memory = half.train(task, client, packet, {}, torch_rng("train"))
half.evaluate(task, client, half.local(packet, reply), memory)
assert reply.scalars["density_true"] <= 0.1
print("trained", dense, reply.nbytes, packet.nbytes, margin)
"""


def client(download: str, margin: int, more: int = 0) -> subprocess.CompletedProcess[str]:
    """The margin is for tensors: each gets pages of its own, else holes in the heap count by chance."""
    return subprocess.run(
        [sys.executable, "-c", _CLIENT, download, str(margin), str(more)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's address-space limit")
def test_a_client_with_its_kept_set_alone_trains_where_the_whole_model_does_not_fit() -> None:
    """At a tenth of the model of 65 MB, with what the cost model says and 8 MB for the allocator's steps."""
    slack = 8 * 2**20
    done = client("kept", slack)
    assert done.returncode == 0, done.stderr[-2000:]
    dense, up, down, margin = map(int, done.stdout.split()[1:])
    assert margin < 2 * dense  # half of the model's bytes
    assert max(up, down) <= 0.1 * 4 * dense + 4096
    refused = client("all", 0, margin)  # the limit is a real one: the paper's way does not fit
    assert refused.returncode != 0
    assert "memory" in refused.stderr.lower()
