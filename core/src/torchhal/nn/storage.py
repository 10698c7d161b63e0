"""A packed weight as a part of a model: its tensors are buffers, so that they move, copy and save with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchhal.errors import InvalidProblem
from torchhal.operands import Packed, packed_from_state


class PackedStorage(nn.Module):
    """Holds one packed weight; modules that are tied hold one storage together.

    A conversion to another floating type changes what the weight stands for and no stored byte: scales stay float32.
    """

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        state = weight.state()
        self._names = tuple(name for name, value in state.items() if isinstance(value, Tensor))
        self._rest = {name: value for name, value in state.items() if name not in self._names}
        self._weight = weight
        for name in self._names:
            self.register_buffer(name, state[name])

    @property
    def weight(self) -> Packed:
        """The weight, made of the buffers as they are now."""
        known, buffers = self._weight, self._buffers
        for name in self._names:
            if getattr(known, name) is not buffers[name]:  # loaded with assign=True, or swapped for one call
                return self._remade()
        return known

    def watched(self) -> list[tuple[dict[str, Any], str, object]]:
        """Where it would be seen that ``weight`` is another: dictionaries, keys, and what they hold there."""
        weight = self.weight
        if weight is not self._weight:  # for one call
            return [(vars(self), "_weight", weight)]
        return [(vars(self), "_weight", weight), *((self._buffers, n, self._buffers[n]) for n in self._names)]

    def _remade(self) -> Packed:
        return packed_from_state({**{name: self._buffers[name] for name in self._names}, **self._rest})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedStorage:
        probe = fn(torch.empty(0, dtype=self._weight.dtype, device=self._weight.device))
        self._rest["dtype"] = str(probe.dtype).removeprefix("torch.")
        for name in self._names:
            self._buffers[name] = _moved(self.get_buffer(name), fn)
        self._weight = self._remade()
        return self

    def get_extra_state(self) -> Tensor:
        """What the tensors do not say, as the bytes of a JSON text: a tensor, because safetensors keeps nothing else."""
        return torch.tensor(list(json.dumps(self._rest).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Check that what is loaded is packed as this weight is; the floating type stays this one's own.

        Raises:
            InvalidProblem: it is packed otherwise.
        """
        given = json.loads(bytes(state.tolist()))
        if {**given, "dtype": None} != {**self._rest, "dtype": None}:
            raise InvalidProblem(
                f"the state holds a weight packed as {_text(given)} and the module one packed as {_text(self._rest)}; "
                "pack the model in the same way before load_state_dict()"
            )
        self._weight = self._remade()

    def extra_repr(self) -> str:
        """Scheme and shape."""
        return f"{self._weight.scheme}, shape={tuple(self._weight.shape)}"


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    # As whole numbers: those a module's conversion to another floating type leaves alone.
    if not tensor.is_floating_point():
        return fn(tensor)
    return fn(tensor.view(torch.int32)).view(tensor.dtype)


def training_text(scheme: str, unpacked: str) -> str:
    """Why a layer whose weight is packed in this scheme can not be trained, and what to do; ``unpacked`` says how to have
    it so.
    """
    return (
        f"this layer's weight is packed ({scheme}) and has no gradient, so it can not be trained: call model.eval() or use "
        f"torch.no_grad() to run it, {unpacked} to train it, or pass frozen=True to train other parts of the "
        "model through it"
    )


def _text(rest: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in rest.items() if name != "dtype")
