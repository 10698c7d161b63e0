"""The words of the suite: a Sample is one call with its truth, a Check asks one question of it, a Case is the two together.

Nothing here knows a backend. What a backend claims decides which cases it is judged by; the cases themselves are
the same for everybody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.problems import Capabilities

PROFILES: Final = ("inference", "training", "distributed")
"""``training`` asks for everything that ``inference`` asks for; ``distributed`` stands beside them."""

FACILITIES: Final = ("streams", "graphs")
"""What torch offers on some devices and not on others, and no backend decides: streams of work beside the default one, and
graphs that are captured once and replayed. A case that needs one does not exist where the device has none, for ``run``,
``verify`` and what a profile requires alike; the header of a report says what its device has."""

Inputs = dict[str, Any]
"""Tensors, lists and numbers of one call, by the names that the sample gives them."""
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Needs:
    """What a backend must claim for a sample to be within its claims."""

    family: str
    features: frozenset[str] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    choice: str = ""
    """A layout, scheme or task."""

    def unclaimed(self, capabilities: Capabilities) -> list[str]:
        """What of it is not claimed, in words of the claims; empty when everything is."""
        claims = getattr(capabilities, self.family)
        if claims is None:
            return [self.family]
        missing = [name for name in sorted(self.features) if getattr(claims, name, False) is not True]
        missing += sorted(str(dtype) for dtype in self.dtypes - getattr(claims, "dtypes", self.dtypes))
        if self.choice and not any(self.choice in getattr(claims, name, ()) for name in CHOICES):
            missing.append(self.choice)
        return missing


CHOICES: Final = ("layouts", "schemes", "tasks")
"""Claims that list words."""


@dataclass(frozen=True)
class Sample:
    """One call of a public function: its data from a seed, and its truth by an independent float64 computation."""

    name: str
    """Words and numbers that say what is special about it; unique within a family."""
    needs: Needs
    make: Callable[[torch.Generator, torch.device], Inputs]
    call: Callable[[str, Inputs], Outputs]
    """The public function with ``backend=`` the first argument."""
    exact: Callable[[Inputs], Outputs]
    """Float64, on the inputs as they were rounded; differentiable where the call is."""
    plain: Callable[[Inputs], Outputs]
    """The same in the inputs' own types: how far from the truth plain arithmetic ends up."""
    leaves: tuple[str, ...] = ()
    """Inputs that gradients reach."""
    tags: frozenset[str] = frozenset()
    """What checks select samples by."""
    profile: str = "inference"


@dataclass(frozen=True)
class Measured:
    """What a check that was met found."""

    ratio: float | None = None
    """Largest error over its bound; None where the question is one of yes or no."""
    note: str = ""


class CheckFailed(Exception):
    """A backend contradicts the specification; says what was expected and what was found."""

    def __init__(self, expected: str, got: object, ratio: float | None = None) -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got, self.ratio = expected, str(got), ratio


class HarnessError(Exception):
    """The suite itself failed: counts neither for nor against the backend."""


@dataclass(frozen=True)
class Explanation:
    """What ``torchhal-conformance explain`` prints of a check."""

    tests: str
    why: str
    """With the bug that motivated it."""
    debug: str


@dataclass(frozen=True)
class Check:
    """One question, asked of every sample it applies to."""

    name: str
    explanation: Explanation
    samples: Callable[[], Iterable[Sample]]
    run: Callable[[str, Sample, int], Measured]
    """``run(backend, sample, seed)``; raises CheckFailed."""
    profile: str = "inference"
    refuses: bool = False
    """Whether its cases also serve to see an unclaimed sample refused: one check of each family."""
    facilities: frozenset[str] = frozenset()
    """What the device must have for the question to mean anything, out of :data:`FACILITIES`."""


@dataclass(frozen=True)
class Case:
    """A check of a sample."""

    check: Check
    sample: Sample
    kind: str = "corpus"
    """``corpus`` cases decide; ``explore`` cases are random and only tell."""
    seed: int = field(default=0, compare=False)

    @property
    def id(self) -> str:
        """Name of the case in reports, waivers and on the command line."""
        prefix = "" if self.kind == "corpus" else f"{self.kind}."
        return f"{prefix}{self.check.name}/{self.sample.name}"

    @property
    def profile(self) -> str:
        """The smaller of the profiles that contain both."""
        return max(self.check.profile, self.sample.profile, key=PROFILES.index)

    @property
    def data_seed(self) -> int:
        """Where its random numbers begin: the case's own, so that adding a case changes no other."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{self.id}".encode()).digest()[:6], "big")


def in_profile(case: Case, profile: str) -> bool:
    """Whether a profile contains the case."""
    wanted = {
        "inference": {"inference"},
        "training": {"inference", "training"},
        "distributed": {"distributed"},
    }
    return case.profile in wanted[profile]


def tensors_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor among the inputs, those in lists too, by a name of its own."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found.update({f"{name}[{i}]": item for i, item in enumerate(value) if isinstance(item, Tensor)})
    return found
