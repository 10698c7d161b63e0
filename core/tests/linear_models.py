"""Small models with linear layers, for the tests of what is swapped in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from torch import nn

import torchhal

few = settings(max_examples=20, deadline=None)
REF: dict[str, Any] = {"backend": "reference"}


class MLP(nn.Module):
    """Down of activated gate times up, with names of its own."""

    def __init__(self, activation: Callable[..., Any] | None = None, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(32, 64, bias), nn.Linear(64, 32, bias), nn.Linear(32, 64, bias)
        self.activation = activation or nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Model(nn.Module):
    """A small language model whose output layer is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.attend = nn.Linear(32, 32)
        self.mlp = MLP()
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.attend(x)
        return self.head(x + self.mlp(x))


IDS = torch.tensor([[3, 1, 49], [0, 7, 7]])


def model() -> Model:
    torch.manual_seed(3)
    return Model().eval()


def blocks(table: torch.Tensor) -> Any:
    """q8_0 blocks of a table (N, K), made here by the definition of the format."""
    groups = table.reshape(table.shape[0], -1, 32)
    d = (groups.abs().amax(-1, keepdim=True) / 127).half()
    q = torch.round(groups / d.float()).to(torch.int8)
    data = torch.cat((d.view(torch.uint8), q.view(torch.uint8)), -1).flatten(1)
    return torchhal.gguf_weight(data, "q8_0")
