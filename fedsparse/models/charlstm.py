"""The next-character model of McMahan et al. (2017, arXiv 1602.05629) and LEAF: embedding 8, two LSTM layers of 256."""

from __future__ import annotations

from torch import Tensor, nn

from fedsparse.models.layers import Recipe


class CharLSTM(nn.Module):
    """Tokens (n, T) int64 -> logits (n, classes) for what follows the last token."""

    def __init__(self, recipe: Recipe, embedding: int = 8, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        features, units = recipe.scaled(embedding), recipe.scaled(hidden)
        self.embedding = nn.Embedding(recipe.vocabulary, features)
        self.lstm = nn.LSTM(features, units, layers, batch_first=True)
        self.output = nn.Linear(units, recipe.classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(x))  # (n, T, units)
        logits: Tensor = self.output(states[:, -1])
        return logits


def charlstm(recipe: Recipe) -> nn.Module:
    """The network for a recipe with a vocabulary."""
    return CharLSTM(recipe)
