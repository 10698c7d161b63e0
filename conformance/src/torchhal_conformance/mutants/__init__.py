"""Planted faults: the reference backend with one thing wrong, and the checks that have to notice.

A bound, or a check, is worth what it kills: a fault that nobody notices is a missing check, and a check that notices
none of them does not stay. Load one with ``--plugin torchhal_conformance.mutants:plugins.NAME``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final

import torch

from torchhal import BackendInfo, Capabilities, Decline, Plan, hookimpl
from torchhal.hookspecs import FAMILIES, hook_name
from torchhal.problems import SPEC_VERSION
from torchhal.reference import plugin as reference

NAME: Final = "mutant"
FILES: Final = (
    "attention", "hidden", "contract", "others", "services", "promises", "far", "dropped", "stores", "numeric",
    "quantized", "packed",
)  # fmt: skip

Run = Callable[..., Any]
Change = Callable[[Run, Any], Run]
"""``(run of the reference's plan, problem)`` to the faulty run."""


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    fault: str
    """What is wrong, in a sentence."""
    killers: tuple[str, ...]
    """Checks, each of which has to find it."""
    change: Change
    family: str = "attention"
    promises: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the plan that are changed too."""
    capabilities: Capabilities = reference.CAPABILITIES
    needs: frozenset[str] = frozenset()
    """Facilities without which the fault can not be seen, out of :data:`torchhal_conformance.model.FACILITIES`: it computes on
    the machine's accelerator, and where none has them it is reported as not tried."""

    @property
    def plugin(self) -> SimpleNamespace:
        """The faulty backend."""
        found: dict[str, Any] = {"torchhal_backend": self._identity()}
        for family in FAMILIES:
            if getattr(self.capabilities, family) is not None:
                found[hook_name(family)] = self._hook(family)
        return SimpleNamespace(**found)

    def _identity(self) -> Any:
        @hookimpl
        def torchhal_backend() -> BackendInfo:
            kind = _accelerator() if self.needs else "cpu"
            return BackendInfo(
                NAME,
                "torchhal",
                frozenset({kind}),
                f">={SPEC_VERSION},<2",
                self.capabilities,
                {kind: -1},
                lambda: {"status": "ready"},
            )

        return torchhal_backend

    def _hook(self, family: str) -> Any:
        honest = getattr(reference, hook_name(family))

        def answer(problem: Any) -> Plan | Decline | None:
            plan = honest(problem)
            if family != self.family or not isinstance(plan, Plan):
                return plan  # type: ignore[no-any-return]
            return dataclasses.replace(plan, run=self.change(plan.run, problem), **self.promises)

        answer.__name__ = hook_name(family)
        return hookimpl(answer)


def _accelerator() -> str:
    """Type of this machine's accelerator; the CPU's where there is none, on which such a mutant is not tried."""
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


@functools.cache
def all_mutants() -> tuple[Mutant, ...]:
    """Every planted fault."""
    found = [mutant for file in FILES for mutant in import_module(f"{__name__}.{file}").MUTANTS]
    names = [mutant.name for mutant in found]
    assert len(names) == len(set(names)), sorted(names)
    return tuple(found)


class _Plugins:
    """``plugins.NAME`` is the plugin of a mutant."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        for mutant in all_mutants():
            if mutant.name == name:
                return mutant.plugin
        raise AttributeError(
            f"there is no mutant {name!r}; there are {', '.join(m.name for m in all_mutants())}"
        )


plugins: Final = _Plugins()
