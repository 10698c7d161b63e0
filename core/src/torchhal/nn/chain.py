"""Runs the products of a module by one call of a backend, as long as everything is as it was when they were prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from torchhal import scope
from torchhal._caches import forgotten_on_reset
from torchhal.chains import Bound, Layer, Link, prepare
from torchhal.registry import blame

# Every name that is looked up in a call counts: 120 of them make a token of a model of 30 layers.
_is_grad_enabled: Final = torch.is_grad_enabled
_any_autocast: Final = torch._C._is_any_autocast_enabled
_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
_any_transform: Final = torch._C._are_functorch_transforms_active
_is_compiling: Final = torch.compiler.is_compiling
_scope: Final = scope.current
_epoch: list[object] = forgotten_on_reset([])
"""Holds one object, until a reset: what was prepared before that is not used any more."""

Watched = tuple[dict[str, Any], str, object]
"""A dictionary, a key, and what it has to hold there, None for nothing."""


class Linked(Protocol):
    """A layer on a packed weight."""

    def layer(self) -> Layer:
        """What it multiplies by."""
        ...

    def watched(self) -> list[Watched]:
        """Where it would be seen that it multiplies by something else."""
        ...


class Owner(Protocol):
    """The module that a chain belongs to."""

    def linked(self) -> Sequence[Linked]:
        """A layer for each link."""
        ...

    def passed_over(self) -> dict[str, nn.Module]:
        """Children, by name, that are not called where the chain is run."""
        ...


class Chain:
    """The products of a module.

    A chain holds nothing that has to be saved: copies and pickles of it begin anew.

    Args:
        links: the products.
    """

    def __init__(self, *links: Link) -> None:
        self._links = links
        self._ready: _Ready | None = None

    def __reduce__(self) -> tuple[type[Chain], tuple[Link, ...]]:
        return Chain, self._links

    def run(self, x: Tensor, owner: Owner) -> Tensor | None:
        """The result of the last link, for x (..., K).

        None where the links have to be asked for one by one: where gradients may be wanted, under a compiler, autocast, ``use()``
        and transforms, where somebody watches what is left out, and for what no backend makes a chain of.

        Args:
            x: what the first link multiplies.
            owner: the module.
        """
        if (
            _is_compiling()
            or type(x) is not Tensor
            or _is_grad_enabled()
            or _any_autocast()
            or _scope.state is not _scope
            or _dispatch_modes()
            or _any_transform()
            or forward_ad._current_level >= 0
        ):
            return None
        ready = self._ready
        if ready is None or not ready.fits(x):
            ready = self._ready = _ready(self._links, owner, x)
        if ready.bound is None or any(ready.hooks):
            return None
        try:
            results = ready.bound(x, ready.parts)
        except Exception as error:
            blame(error, ready.backend)
            raise
        if not results:
            return None
        for record in ready.records:
            record()
        return results[-1]


@dataclass(frozen=True, slots=True)
class _Ready:
    epoch: object
    dtype: torch.dtype
    device: torch.device
    watched: tuple[Watched, ...]
    hooks: tuple[dict[Any, Any], ...]
    """Where those hang themselves who watch modules that are not called."""
    bound: Bound | None
    parts: list[Tensor]
    dtypes: tuple[torch.dtype, ...]
    """Of the parts: a module converts its parameters in place."""
    records: tuple[Callable[[], object], ...]
    backend: str | None

    def fits(self, x: Tensor) -> bool:
        """Whether everything is as it was."""
        if x.dtype is not self.dtype or not _epoch or _epoch[0] is not self.epoch or x.device != self.device:
            return False
        for where, name, what in self.watched:
            if where.get(name) is not what:
                return False
        return all([part.dtype is dtype for part, dtype in zip(self.parts, self.dtypes, strict=True)])  # noqa: C419 (quicker)


def _ready(links: tuple[Link, ...], owner: Owner, x: Tensor) -> _Ready:
    if not _epoch:
        _epoch.append(object())
    layers, inner = owner.linked(), owner.passed_over()
    prepared = prepare(links, [layer.layer() for layer in layers], x.dtype, x.device)
    watched = [item for layer in layers for item in layer.watched()]
    for name, module in inner.items():
        watched += [(owner._modules, name, module), (vars(module), "forward", vars(module).get("forward"))]  # type: ignore[attr-defined]
    return _Ready(
        epoch=_epoch[0],
        dtype=x.dtype,
        device=x.device,
        watched=tuple(watched),
        hooks=_hooks(*inner.values()) if inner else (),
        bound=None if any("forward" in vars(module) for module in inner.values()) else prepared.bound,
        parts=prepared.parts,
        dtypes=tuple([part.dtype for part in prepared.parts]),
        records=tuple([selected.record for selected in prepared.selected]),
        backend=prepared.selected[0].route.chosen if prepared.selected else None,
    )


_KINDS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ON_ALL: Final = tuple(getattr(hooks, f"_global{kind}") for kind in _KINDS)


def _hooks(*modules: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The dictionaries that hooks of these modules, and of all modules, are registered in."""
    return (*_ON_ALL, *(getattr(module, kind) for module in modules for kind in _KINDS))


def is_watched(*called: Any) -> bool:
    """Whether anybody hung something on one of these, or on all modules, or replaced a ``forward``."""
    modules = [module for module in called if isinstance(module, nn.Module)]
    return any(_hooks(*modules)) or any("forward" in vars(module) for module in modules)
