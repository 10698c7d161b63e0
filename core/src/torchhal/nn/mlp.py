"""The gated MLP of today's language models, ``down(act(gate(x)) * up(x))``, in three products and no other pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from torchhal.chains import Chain, Link
from torchhal.matmul import capture_functions
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
        self._chain = Chain(links) if all(layer.packed for layer in layers.values()) else None

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """(..., K) to (..., N), row by row.

        Raises:
            TypeError: it is given anything but one input, in its place or by its name.
        """
        if len(given) + len(named) != 1 or (named and self._argument not in named):
            raise TypeError(f"the gated MLP expects one argument, {self._argument}")
        x = given[0] if given else named[self._argument]
        gate, up, down = self._layer(self._roles[0]), self._layer(self._roles[1]), self._layer(self._roles[2])
        activation = self.activation
        if self._chain is not None and not torch.compiler.is_compiling() and not _watched(gate, up, down, activation):
            results = self._chain.run(x, (gate.layer(), up.layer(), down.layer()))
            if results is not None:
                return results[0]
        rows = x.reshape(-1, x.shape[-1]) if x.dim() == 1 else x.flatten(0, -2)
        if _watched(gate, up, activation):  # whoever watches a layer sees what it gives by itself
            return down(activation(gate(x)) * up(x))  # type: ignore[no-any-return]
        gated = gate.product(rows, activation, self._captured)
        hidden = up.product(rows, lambda value, batch, row, col: value * gated[row, col])
        out: Tensor = down(hidden)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _layer(self, name: str) -> FusedLinear:
        layer = self._modules[name]
        assert isinstance(layer, FusedLinear)
        return layer


def _watched(*called: Any) -> bool:
    """Whether anybody hung something on one of these, or on all modules, or replaced a ``forward``."""
    if hooks._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    for module in called:
        if isinstance(module, nn.Module) and (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False
