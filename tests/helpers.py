"""Small federations for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedsparse.client import FederatedClient
from fedsparse.models import build_model
from fedsparse.seeding import torch_rng
from fedsparse.strategy import FederatedStrategy, Reply
from fedsparse.task import Budget, Client, Device, Split, Task

SHAPE, CLASSES = (1, 8, 8), 4


def small_task(model: str = "mlp", seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Task:
    """A seeded model for images of ``shape`` with four classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Task(build_model(model, shape, CLASSES, width=4), shape, CLASSES, seed)


def chain_task(layers: dict[str, nn.Module]) -> Task:
    """A task whose model has these layers one after the other."""
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return Task(model, SHAPE, CLASSES, 0)


def norm_task() -> Task:
    """A chain with batch norm, small enough for every test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return chain_task(
            {
                "conv1": nn.Conv2d(1, 16, 3, padding=1),
                "bn1": nn.BatchNorm2d(16),
                "relu1": nn.ReLU(),
                "pool1": nn.MaxPool2d(2),
                "flatten": nn.Flatten(),
                "fc1": nn.Linear(256, 128),
                "relu2": nn.ReLU(),
                "output": nn.Linear(128, CLASSES),
            }
        )


def dropout_task() -> Task:
    """The model of ``norm_task`` with dropout before its classifier."""
    task = norm_task()
    layers = dict(task.model.named_children())
    model = nn.Sequential()
    for name, layer in layers.items():
        if name == "output":
            model.add_module("dropout", nn.Dropout(0.5))
        model.add_module(name, layer)
    return Task(model, SHAPE, CLASSES, 0)


def small_split(n: int, *path: int | str, shape: tuple[int, ...] = SHAPE) -> Split:
    """Noise with a weak signal, so that training changes something."""
    rng = torch_rng(*path)
    y = torch.randint(0, CLASSES, (n,), generator=rng)
    x = torch.randn(n, *shape, generator=rng) + y.view(-1, *([1] * len(shape))) * 0.3
    return Split(x, y)


def small_clients(count: int, density: float | None = None, shape: tuple[int, ...] = SHAPE) -> tuple[Client, ...]:
    """Clients of unequal size."""
    return tuple(
        Client(
            Device(i, Budget(density=density)),
            small_split(11 + 5 * i, "train", i, shape=shape),
            small_split(6, "validation", i, shape=shape),
            small_split(8, "test", i, shape=shape),
        )
        for i in range(count)
    )


def started(strategy: FederatedStrategy, task: Task, clients: Sequence[Client], rounds: int = 9) -> Any:
    """The state before the first exchange of a run."""
    return strategy.scheduled(task, strategy.init(task, [c.device for c in clients]), rounds)


def exchanged_by_hand(
    strategy: FederatedStrategy, half: FederatedClient, task: Task, state: Any, clients: Sequence[Client], memories: Any
) -> tuple[list[Reply], Any]:
    """The replies of one exchange, without an engine, and the next state; ``memories`` is brought up to date."""
    replies, by_id = [], {client.id: client for client in clients}
    for device in strategy.invited(state, [c.device for c in clients]):
        packet = strategy.broadcast(state, device)
        rng = torch_rng(0, state.round, device.id)
        reply, memories[device.id] = half.train(task, by_id[device.id], packet, memories.get(device.id, {}), rng)
        assert strategy.complaint(task, state, Reply(device, reply)) == ""
        replies.append(Reply(device, reply))
    after = strategy.reduce(task, state, replies)
    assert type(after) is type(state)
    return replies, after
