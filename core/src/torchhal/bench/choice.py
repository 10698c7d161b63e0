"""What a benchmark of any family measures: the cases that were asked for, on the backends that can serve them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from torchhal.errors import InvalidProblem
from torchhal.registry import REFERENCE, Backend


class Named(Protocol):
    """A case of a benchmark."""

    @property
    def name(self) -> str:
        """What ``--cases`` calls it."""


C = TypeVar("C", bound=Named)


def named(family: str, cases: Sequence[C], patterns: str | None) -> list[C]:
    """The cases whose names match one of some patterns, separated by commas; all without patterns.

    Args:
        family: for the message, ``attention``.
        cases: those there are.
        patterns: names, beginnings of names, or patterns with ``*``.

    Raises:
        InvalidProblem: a pattern matches nothing.
    """
    if patterns is None:
        return list(cases)
    found: dict[str, C] = {}
    for pattern in (p.strip() for p in patterns.split(",")):
        matching = {
            c.name: c for c in cases if fnmatch.fnmatchcase(c.name, pattern) or c.name.startswith(pattern)
        }
        if not matching or not pattern:
            known = ", ".join(c.name for c in cases)
            raise InvalidProblem(
                f"no {family} case is called {pattern!r}; cases are {known}, and * stands for any letters"
            )
        found.update(matching)
    return list(found.values())


def usable_device(text: str) -> torch.device:
    """The device of that name, which torch can compute on here.

    Raises:
        InvalidProblem: it is no name of a device, or torch can not use it.
    """
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA fails an assertion
        why = " ".join(str(error).split())[:200]
        advice = "`torchhal doctor` says what this machine has and what it lacks"
        raise InvalidProblem(
            f"torch can not compute on the device {text!r} here ({why}); {advice}"
        ) from error
    return device


def backends(
    family: str, found: Mapping[str, Backend], device: torch.device, only: str | None
) -> list[Backend]:
    """The backends to time: the one asked for, or all that claim ``family`` on the device but the reference, if there is any."""
    if only is not None:
        return [found[only]]
    fitting = [
        b
        for b in found.values()
        if getattr(b.info.capabilities, family) is not None
        and (not b.info.device_types or device.type in b.info.device_types)
    ]
    return [b for b in fitting if b.name != REFERENCE] or fitting
