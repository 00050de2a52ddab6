"""Networks without branches: ``nn.Sequential`` with named children, so that a channel cutter can walk them.

Names: conv*, bn* (gn* for group norm), relu*, pool*, flatten, fc*, output.
The LEAF-style CNNs follow pFedGate (Chen et al., ICML 2023, arXiv 2305.02776), appendix H and its official code
(yxdyc/pFedGate, b8cfa15): 5x5 convolutions, no padding, 2x2 max-pools.
Differs from the official code: no ReLU on the logits; LeNet's output layer is registered last, not before fc2.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fedsparse.models.layers import Recipe

_VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)  # 0 = max-pool


class _Chain:
    """Collects named layers and follows the shape of one example through them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.channels = recipe.input_shape[0]
        self.size = recipe.input_shape[1:]
        self.layers: OrderedDict[str, nn.Module] = OrderedDict()
        self.counts: dict[str, int] = {}

    def add(self, kind: str, layer: nn.Module) -> None:
        number = self.counts[kind] = self.counts.get(kind, 0) + 1
        self.layers[f"{kind}{number}"] = layer

    def conv(self, units: int, kernel: int, padding: int, *, norm: bool = False) -> None:
        """Convolution, norm if wanted, ReLU. ``units``: output channels before the width factor."""
        recipe, out = self.recipe, self.recipe.scaled(units)
        conv = nn.Conv1d if len(self.size) == 1 else nn.Conv2d
        self.add("conv", conv(self.channels, out, kernel, padding=padding))
        if norm:
            self.add("gn" if recipe.norm == "group" else "bn", recipe.norm2d(out))
        self.add("relu", nn.ReLU())
        self.channels = out
        self.size = tuple(s + 2 * padding - kernel + 1 for s in self.size)

    def pool(self, kernel: int) -> None:
        self.add("pool", nn.MaxPool1d(kernel) if len(self.size) == 1 else nn.MaxPool2d(kernel))
        self.size = tuple(s // kernel for s in self.size)

    def flatten(self) -> None:
        self.layers["flatten"] = nn.Flatten()
        for s in self.size:
            self.channels *= s
        self.size = ()

    def linear(self, units: int) -> None:
        """Linear layer and ReLU. ``units``: output features before the width factor."""
        out = self.recipe.scaled(units)
        self.add("fc", nn.Linear(self.channels, out))
        self.add("relu", nn.ReLU())
        self.channels = out

    def output(self) -> nn.Sequential:
        self.layers["output"] = nn.Linear(self.channels, self.recipe.classes)
        return nn.Sequential(self.layers)


def mlp(recipe: Recipe, hidden: tuple[int, ...] = (128,)) -> nn.Sequential:
    """Fully connected network on the flattened input; 784-128-10 on MNIST. ``hidden``: features of each layer."""
    chain = _Chain(recipe)
    chain.flatten()
    for units in hidden:
        chain.linear(units)
    return chain.output()


def logistic(recipe: Recipe) -> nn.Sequential:
    """Multinomial logistic regression on the flattened input. It has no hidden layer, so width changes nothing."""
    return mlp(recipe, hidden=())


def _cnn(recipe: Recipe, hidden: tuple[int, ...], padding: int = 0) -> nn.Sequential:
    """Two 5x5 convolutions (32 and 64 channels), each with a 2x2 max-pool, then fully connected layers."""
    chain = _Chain(recipe)
    for units in (32, 64):
        chain.conv(units, kernel=5, padding=padding)
        chain.pool(2)
    chain.flatten()
    for units in hidden:
        chain.linear(units)
    return chain.output()


def leafcnn1(recipe: Recipe) -> nn.Sequential:
    """pFedGate's CNN for EMNIST and FEMNIST: 2,278,334 parameters on 1x28x28 with 62 classes."""
    return _cnn(recipe, hidden=(2048,))


def lenet(recipe: Recipe) -> nn.Sequential:
    """pFedGate's CNN for CIFAR-10: 256,830 parameters on 3x32x32 with 10 classes."""
    return _cnn(recipe, hidden=(120, 84))


def leafcnn3(recipe: Recipe) -> nn.Sequential:
    """pFedGate's CNN for CIFAR-100: 3,537,444 parameters on 3x32x32 with 100 classes. LeafCNN1 on another input."""
    return _cnn(recipe, hidden=(2048,))


def cnn(recipe: Recipe) -> nn.Sequential:
    """The padded CNN of McMahan et al. (2017, arXiv 1602.05629): 1,663,370 parameters on 1x28x28, 10 classes."""
    return _cnn(recipe, hidden=(512,), padding=2)


def cnn1d(recipe: Recipe) -> nn.Sequential:
    """Two convolutions over time (32 and 64 channels, kernel 5), max-pools of 4, 128 features; for sensor windows."""
    chain = _Chain(recipe)
    for units in (32, 64):
        chain.conv(units, kernel=5, padding=2)
        chain.pool(4)
    chain.flatten()
    chain.linear(128)
    return chain.output()


def vgg11(recipe: Recipe) -> nn.Sequential:
    """VGG11 with norms and the small head 512-256-256-classes, no dropout: 9,425,674 parameters, 10 classes."""
    chain = _Chain(recipe)
    for units in _VGG11:
        if units:
            chain.conv(units, kernel=3, padding=1, norm=True)
        else:
            chain.pool(2)
    chain.flatten()
    chain.linear(256)
    chain.linear(256)
    return chain.output()
