"""A made-up accelerator on the CPU: its streams do their work when somebody waits, and its graphs record calls of torch.

What is launched on a side stream is written to a tape: only shapes are true until the tape is played. What is launched on
the default stream is done at once. That is the worst case of a device, in which every stream is as late as it can be.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
)


class HostRead(RuntimeError):
    """The host asked for a value that no device has computed yet."""


class Tape(TorchDispatchMode):
    """Records the operators that are called under it, to be played once or many times."""

    def __init__(self, wait: Any = None) -> None:
        super().__init__()
        self.wait = wait
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with (
            torch.utils._python_dispatch._disable_current_modes()
        ):  # a stream around a graph records none of it
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in READS:
            if self.wait is None:
                raise HostRead("operation not permitted while work is captured: a value is read on the host")
            self.wait()
            return func(*args, **kwargs)
        returns = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in returns):
            return func(*args, **kwargs)  # a view has no work
        if func._schema.is_mutable:
            self.steps.append((func, args, kwargs, None))
            written = [
                value
                for argument, value in [
                    *zip(func._schema.arguments, args),
                    *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs),
                ]
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            return written[0] if len(returns) == 1 else tuple(written) if returns else None
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, out))
        for tensor in _tensors(out):
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
        return out

    def play(self) -> None:
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            for func, args, kwargs, out in self.steps:
                found = func(*args, **kwargs)
                for place, value in zip(_tensors(out), _tensors(found)):
                    place.copy_(value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [item for item in tree_flatten(value)[0] if isinstance(item, torch.Tensor)]


class Device:
    """What stands in for ``torch.Stream`` and ``torch.accelerator``."""

    def __init__(self) -> None:
        self.pending: list[Tape] = []
        self.current: list[Any] = [DefaultStream(self)]

    def synchronize(self, device: Any = None) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            for tape in self.pending:
                tape.play()
                tape.steps.clear()

    def stream(self, device: Any = None) -> SideStream:
        return SideStream(self)

    def graph(self) -> Graph:
        return Graph(self)


class SideStream:
    """Work in order, done when somebody waits."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.tape = Tape(device.synchronize)
        device.pending.append(self.tape)

    def __enter__(self) -> SideStream:
        self.device.current.append(self)
        self.tape.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.tape.__exit__(*error)
        self.device.current.pop()


class DefaultStream:
    """Work that is done at once, whatever side streams still have to do."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __enter__(self) -> DefaultStream:
        self.device.current.append(self)
        self.without = torch.utils._python_dispatch._disable_current_modes()
        self.without.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.without.__exit__(*error)
        self.device.current.pop()


class Graph:
    """A tape of its own, played by replay()."""

    def __init__(self, device: Device) -> None:
        self.tape = Tape()

    def __enter__(self) -> None:
        self.tape.__enter__()

    def __exit__(self, *error: object) -> None:
        self.tape.__exit__(*error)

    def replay(self) -> None:
        self.tape.play()


def install(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Put it in the place of torch's own for one test."""
    device = Device()
    monkeypatch.setattr(torch, "Stream", device.stream)
    monkeypatch.setattr(torch.accelerator, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: device.current[-1])
    monkeypatch.setattr(torch.accelerator, "Graph", device.graph)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    return device
