"""How checks make a sample's data and call a backend: the one place that separates its faults from the suite's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

import torchhal
from torchhal.errors import FallbackWarning, InvalidProblem, Unsupported
from torchhal.problems import Plan
from torchhal.registry import registry
from torchhal_conformance.model import CheckFailed, HarnessError, Inputs, Outputs, Sample


def device_of(backend: str) -> torch.device:
    """The device on which a backend is examined: the first of the first type it names; the CPU if it names none."""
    kinds = registry().get(backend).info.device_types
    if not kinds or "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(min(kinds), 0)


def facilities(backend: str) -> frozenset[str]:
    """What the backend's device has, out of :data:`~torchhal_conformance.model.FACILITIES`; torch decides it, not the backend."""
    return frozenset() if device_of(backend).type == "cpu" else accelerator_facilities()


def accelerator_facilities() -> frozenset[str]:
    """What the accelerator of this machine has; nothing where there is no accelerator."""
    if not torch.accelerator.is_available():
        return frozenset()
    try:
        new_graph()
    except (RuntimeError, NotImplementedError):  # torch has streams for every accelerator, graphs for some
        return frozenset({"streams"})
    return frozenset({"streams", "graphs"})


def new_graph() -> Any:
    """An empty graph of this machine's accelerator: entered to capture, then replayed.

    ``torch.accelerator.Graph``, or where torch is too old for that what the device's own module has for it.

    Raises:
        RuntimeError, NotImplementedError: the device has no graphs.
    """
    if hasattr(torch.accelerator, "Graph"):  # not in torch 2.11
        return torch.accelerator.Graph()
    return _ModuleGraph(torch.get_device_module(torch.accelerator.current_accelerator()))


class _ModuleGraph:
    """A graph by the words that device modules share: a class whose name ends in Graph, entered by ``graph(...)``."""

    def __init__(self, module: Any) -> None:
        kinds = [
            kind for name, kind in vars(module).items() if name.endswith("Graph") and isinstance(kind, type)
        ]
        if not kinds or not hasattr(module, "graph"):
            raise NotImplementedError(f"{module.__name__} has no graphs")
        self._graph = kinds[0]()
        self._capture = module.graph(self._graph)

    def __enter__(self) -> _ModuleGraph:
        self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._capture.__exit__(*error)

    def replay(self) -> None:
        """Run what was captured."""
        self._graph.replay()


@contextmanager
def harness() -> Iterator[None]:
    """Around what the suite does itself: an error in here is the suite's own."""
    try:
        yield
    except Exception as error:
        raise HarnessError(f"{type(error).__name__}: {error}") from error


def make(sample: Sample, backend: str, seed: int) -> Inputs:
    """The sample's data on the backend's device."""
    with harness():
        return sample.make(torch.Generator().manual_seed(seed), device_of(backend))


class Relay(Protocol):
    """Stands between checks and a backend, and decides whether it is asked."""

    def call(self, sample: Sample, inputs: Inputs, make: Callable[[], Outputs]) -> Outputs:
        """The results of a call, which ``make`` makes."""

    def plan(self, make: Callable[[], Plan | None]) -> Plan | None:
        """What is promised for a call, for which ``make`` asks."""


relay: Relay | None = None
"""Stands between the checks and the backend where it is set: :mod:`~torchhal_conformance.tape` records and plays calls back."""


def call(sample: Sample, backend: str, inputs: Inputs) -> Outputs:
    """The call, with its fallbacks made errors: what is examined is the backend that was named."""
    if relay is not None:
        return relay.call(sample, inputs, lambda: _made(sample, backend, inputs))
    return _made(sample, backend, inputs)


def _made(sample: Sample, backend: str, inputs: Inputs) -> Outputs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", FallbackWarning)
        found: object = sample.call(backend, inputs)
    if not isinstance(found, tuple) or not all(isinstance(result, Tensor) for result in found):
        raise CheckFailed("tensors as results", _kinds(found))
    return found


def _kinds(found: object) -> str:
    return (
        ", ".join(type(result).__name__ for result in found)
        if isinstance(found, tuple)
        else type(found).__name__
    )


def plan_of(sample: Sample, backend: str, inputs: Inputs) -> Plan | None:
    """What the backend promises for a call, without making it; None where a call needs no backend, or gets no plan."""
    if relay is not None:
        return relay.plan(lambda: _promised(sample, backend, inputs))
    return _promised(sample, backend, inputs)


def _promised(sample: Sample, backend: str, inputs: Inputs) -> Plan | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            route = torchhal.explain(sample.call, backend, inputs)
        except InvalidProblem:
            return None
    answer = registry().get(backend).ask(route.problem)
    return answer if isinstance(answer, Plan) else None


def truth(sample: Sample, inputs: Inputs) -> tuple[Outputs, Outputs]:
    """The exact outputs and the plain ones."""
    with harness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            return sample.exact(inputs), sample.plain(inputs)


def is_refused(sample: Sample, backend: str, inputs: Inputs) -> bool:
    """Whether a call outside the claims is refused as it must be; what else is raised comes out."""
    try:
        call(sample, backend, inputs)
    except Unsupported:
        return True
    return False


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in every bit, NaN payloads and signs of zeros included."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    # A copy, for what contiguous() takes for contiguous may have strides that no view as bytes accepts.
    copies = (t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in (one, other))
    a, b = (t.reshape(-1).view(torch.uint8) for t in copies)
    return torch.equal(a, b)
