"""ResNet18 in its CIFAR form (He et al. 2016, arXiv 1512.03385; FedTiny, arXiv 2212.01977).

3x3 stem with stride 1 and no max-pool; four stages of two basic blocks; 1x1 convolutions with norms on the three
shortcuts that change shape; average pool; linear output. 11,173,962 parameters, 555,422,720 multiply-adds on 3x32x32
with 10 classes. The last norm of a block starts at 1, for every method (FedTiny's code starts it at 0 for itself only).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsparse.models.layers import Recipe

_STAGES = (64, 128, 256, 512)  # channels before the width factor


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (n, inputs, h, w) -> (n, outputs, ceil(h/stride), ceil(w/stride))."""

    def __init__(self, recipe: Recipe, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = recipe.norm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = recipe.norm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:  # by stride, not by shape, so that narrow models keep the same layers
            self.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.add_module("bn", recipe.norm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def resnet18(recipe: Recipe) -> nn.Module:
    """The network: conv1, bn1, layer1 to layer4 (two blocks each), output."""
    channels = recipe.scaled(_STAGES[0])
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(recipe.input_shape[0], channels, 3, padding=1, bias=False))
    model.add_module("bn1", recipe.norm2d(channels))
    model.add_module("relu1", nn.ReLU())
    for number, units in enumerate(_STAGES, 1):
        outputs = recipe.scaled(units)
        first = BasicBlock(recipe, channels, outputs, stride=1 if number == 1 else 2)
        model.add_module(f"layer{number}", nn.Sequential(first, BasicBlock(recipe, outputs, outputs, stride=1)))
        channels = outputs
    model.add_module("pool1", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("output", nn.Linear(channels, recipe.classes))
    return model
