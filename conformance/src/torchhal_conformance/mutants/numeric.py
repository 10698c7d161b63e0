"""Wrong numbers where other checks than those of numbers look: compiled, after an error, for new data, in a package.

A bound counts only while faults exceed it, in each check that judges by it (``torchhal-conformance calibrate``).
"""

from __future__ import annotations

from typing import Any, Final

import torch

from torchhal_conformance.mutants import Mutant, Run
from torchhal_conformance.mutants.others import _each


def _off(value: torch.Tensor) -> torch.Tensor:
    return value * 1.25 if value.is_floating_point() else value


def _compiled_off(run: Run, problem: Any) -> Run:
    def faulty(*given: Any) -> Any:
        found = run(*given)
        return _each(_off, found) if torch.compiler.is_compiling() else found

    return faulty


def _first_answer(run: Run, problem: Any) -> Run:
    """What the first call of a problem gave, whatever is asked: alike everywhere, and wrong."""
    kept: list[Any] = []

    def faulty(*given: Any) -> Any:
        if not kept:
            kept.append(run(*given))
        return _each(torch.clone, kept[0])

    return faulty


def _off_later(run: Run, problem: Any) -> Run:
    called: list[bool] = []

    def faulty(*given: Any) -> Any:
        found = run(*given)
        if called:
            return _each(_off, found)
        called.append(True)
        return found

    return faulty


def _narrow_package(run: Run, problem: Any) -> Run:
    if problem.task != "package":
        return run

    def faulty(program: Any, *given: Any, **options: Any) -> Any:
        for weight in program.state_dict.values():
            weight.data.copy_(weight.to(torch.bfloat16))
        return run(program, *given, **options)

    return faulty


def _of(family: str) -> tuple[Mutant, ...]:
    def fault(name: str, text: str, check: str, change: Any, **promises: Any) -> Mutant:
        return Mutant(f"{family}_{name}", text, (f"{family}.{check}",), change, family, promises)

    return (
        fault("off_when_compiled", "results are a quarter too large when compiled", "compiled", _compiled_off, traceable=True),
        fault("first_answer", "every call gives what the first one gave", "fresh_data", _first_answer),
    )  # fmt: skip


MUTANTS: Final = (
    *(mutant for family in ("attention", "matmul", "foreach") for mutant in _of(family)),
    *(
        Mutant(f"{family}_off_later", "from the second call on results are a quarter too large", (f"{family}.errors",), _off_later, family)
        for family in ("matmul", "foreach")
    ),
    Mutant("narrow_package", "weights are rounded to bfloat16 before they are packaged", ("deploy.tasks",), _narrow_package, "deploy"),
)  # fmt: skip
