"""The gated MLP of today's language models, ``down(act(gate(x)) * up(x))``, in three products and no other pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchhal.chains import Link
from torchhal.matmul import capture_functions
from torchhal.nn.chain import Chain, is_watched
from torchhal.nn.linear import FusedLinear


class FusedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``: the activation is the epilogue of the first product, the product with it
    that of the second.

    The activation is captured once, when the module is made. The three layers are children under the names they had, so
    that the keys of a ``state_dict`` stay.

    Args:
        layers: the three layers by name, in the order that parameters are to have.
        gate: the name of the one (K to I) that the activation follows.
        up: the name of the other one (K to I).
        down: the name of the last one (I to any).
        activation: pointwise; see :mod:`torchhal.pointwise`.
        argument: what the input is called where it is given by name.

    Raises:
        CaptureError: the activation is not pointwise.
    """

    def __init__(
        self,
        layers: Mapping[str, FusedLinear],
        *,
        gate: str,
        up: str,
        down: str,
        activation: Callable[..., Any],
        argument: str = "x",
    ) -> None:
        super().__init__()
        self._argument = argument
        self._roles = (gate, up, down)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.activation = activation
        self._captured = capture_functions(torch.float32, None, None, activation).epilogue
        links = (Link(self._captured), Link(factor=0), Link(source=1))
        self._chain = Chain(*links) if all(layer.packed for layer in layers.values()) else None

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """(..., K) to (..., N), row by row.

        Raises:
            TypeError: it is given anything but one input, in its place or by its name.
        """
        if len(given) + len(named) != 1 or (named and self._argument not in named):
            raise TypeError(f"the gated MLP expects one argument, {self._argument}")
        x = given[0] if given else named[self._argument]
        if self._chain is not None:
            result = self._chain.run(x, self)
            if result is not None:
                return result
        gate, up, down = self.linked()
        activation = self.activation
        rows = x.reshape(-1, x.shape[-1]) if x.dim() == 1 else x.flatten(0, -2)
        if is_watched(gate, up, activation):  # whoever watches a layer sees what it gives by itself
            return down(activation(gate(x)) * up(x))  # type: ignore[no-any-return]
        gated = gate.product(rows, activation, self._captured)
        hidden = up.product(rows, lambda value, batch, row, col: value * gated[row, col])
        out: Tensor = down(hidden)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def linked(self) -> tuple[FusedLinear, FusedLinear, FusedLinear]:
        """Gate, up and down."""
        gate, up, down = (self._modules[name] for name in self._roles)
        assert isinstance(gate, FusedLinear) and isinstance(up, FusedLinear) and isinstance(down, FusedLinear)
        return gate, up, down

    def passed_over(self) -> dict[str, nn.Module]:
        """All children: a chain computes what they would."""
        return {name: module for name, module in self._modules.items() if module is not None}
