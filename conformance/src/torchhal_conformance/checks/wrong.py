"""A wrong call, and the parts that those of all families are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchhal.errors import BackendNotFound, InvalidProblem
from torchhal_conformance.model import Inputs, Sample

Call = Callable[[str, Inputs], object]
Ask = Callable[[str, dict[str, Any]], object]
"""A public function with ``backend=`` the first argument, and its arguments by name."""


@dataclass(frozen=True)
class Wrong:
    """A call that has to raise."""

    name: str
    good: Sample
    """A call of the same family that is right, with the inputs that the wrong one is made of."""
    call: Call
    error: type[Exception]
    """The documented class."""
    says: tuple[str, ...]
    """Words of the message: what was expected, and what arrived."""
    of_data: bool = False
    """Whether the fault is in the content of tensors, which only a device that the host can read shows at once."""


def named_backends(function: str, good: Sample, ask: Ask) -> Iterator[Wrong]:
    """Backends that do not exist, and something that names none."""
    nobody = "no_such_backend"

    def wrong(choice: Any) -> Call:
        return lambda backend, inputs: ask(choice, inputs)

    yield Wrong(f"{function}-backend_unknown", good, wrong(nobody), BackendNotFound, (nobody, "Installed"))
    yield Wrong(f"{function}-backend_no_name", good, wrong(7), InvalidProblem, ("name of a backend", "7"))


def bad_tensors(
    function: str, good: Sample, ask: Ask, names: dict[str, str], kinds: dict[str, Any]
) -> Iterator[Wrong]:
    """Every argument with everything that no tensor may be there.

    Args:
        function: name of the public function, for the names of the cases.
        good: the right call.
        ask: the call with other arguments.
        names: the function's arguments that hold tensors, with what messages call them.
        kinds: kind of fault to ``(change of the tensor, words that say what arrived)``.
    """
    for name, called in names.items():
        for kind, (change, words) in kinds.items():
            yield Wrong(
                f"{function}-{name}_{kind}",
                good,
                _replacing(ask, name, change),
                InvalidProblem,
                (called, *words),
            )


def _replacing(ask: Ask, name: str, change: Callable[[Tensor], Any]) -> Call:
    return lambda backend, inputs: ask(backend, {**inputs, name: change(inputs[name])})


KINDS: dict[str, Any] = {
    "list": (lambda t: t.tolist(), ("list",)),
    "none": (lambda t: None, ("NoneType",)),
    "integer": (lambda t: t.long(), ("floating", "torch.int64")),
    "sparse": (lambda t: t.to_sparse(), ("dense", "torch.sparse_coo")),
    "elsewhere": (lambda t: t.to("meta"), ("meta", "one device")),
    "complex": (lambda t: t.to(torch.complex64), ("floating", "torch.complex64")),
}
"""Faults of one tensor among floating ones, and what the message says has arrived."""
