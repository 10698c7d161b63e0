"""How checks make a sample's data and call a backend: the one place that separates its faults from the suite's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchhal.errors import FallbackWarning, Unsupported
from torchhal.registry import registry
from torchhal_conformance.model import CheckFailed, HarnessError, Inputs, Outputs, Sample


def device_of(backend: str) -> torch.device:
    """The device on which a backend is examined: the first of the first type it names; the CPU if it names none."""
    kinds = registry().get(backend).info.device_types
    if not kinds or "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(min(kinds), 0)


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


def call(sample: Sample, backend: str, inputs: Inputs) -> Outputs:
    """The call, with its fallbacks made errors: what is examined is the backend that was named."""
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
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)
