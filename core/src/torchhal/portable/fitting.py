"""What every launch of the portable kernels needs: tiles that the device has memory for, and the device itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, Self, TypeVar

import torch
from torch import Tensor


class Shrinking(Protocol):
    """Tiles of any kernel."""

    def smaller(self) -> Self | None:
        """The next tiles to try; None after the smallest."""


Cut = TypeVar("Cut", bound=Shrinking)


def fitting(launcher: Callable[..., None], tiles: Cut, *arguments: Any) -> Cut:
    """Launch with these tiles or, where the device has too little memory for them, with the largest that fit.

    How much a kernel needs is known once its user's functions are compiled into it; so the tiles are tried.
    """
    while True:
        try:
            launcher(tiles, *arguments)
        except Exception as error:
            found = tiles.smaller() if is_out_of_resources(error) else None
            if found is None:
                raise
            tiles = found
        else:
            return tiles


def is_out_of_resources(error: Exception) -> bool:
    """Whether a kernel was refused for the memory or the registers that it asks for."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cpu":
        return _NOWHERE
    module = _module_of(tensor.device.type)
    if module.current_device() == tensor.device.index:
        return _NOWHERE
    return module.device(tensor.device)  # type: ignore[no-any-return]


_NOWHERE: Final = nullcontext()
_module_of = functools.cache(torch.get_device_module)
