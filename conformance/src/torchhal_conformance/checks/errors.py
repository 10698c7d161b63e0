"""Calls that mean nothing, and problems that nobody claims: each has its documented error, words, and no consequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

from torchhal.errors import Unsupported
from torchhal.problems import PROBLEMS
from torchhal.registry import registry
from torchhal.selection import select
from torchhal_conformance import calls, tolerance
from torchhal_conformance.checks.contract import UNKNOWN_FEATURE, basic_problem
from torchhal_conformance.checks.promises import WIDE
from torchhal_conformance.checks.wrong import Wrong
from torchhal_conformance.model import (
    Check,
    CheckFailed,
    Explanation,
    Inputs,
    Measured,
    Sample,
    tensors_of,
)

MESSAGE: Final = 400
"""Characters of a message that a failure quotes."""


def run(backend: str, wrong: Wrong, seed: int) -> Measured:
    """A good call, the wrong one, and the good one again."""
    sample = wrong.good
    inputs = calls.make(sample, backend, seed)
    if wrong.of_data and calls.device_of(backend).type != "cpu":
        return Measured(note="the fault is in data on a device, where nobody is made to look")
    calls.call(sample, backend, inputs)
    before = {name: t.clone() for name, t in tensors_of(inputs).items()}
    _require_error(backend, wrong, inputs)
    for name, tensor in tensors_of(inputs).items():
        if not calls.same_bits(tensor, before[name]):
            raise CheckFailed(f"input {name} left as it was by a call that raises", "other values")
    return Measured(_right_again(backend, sample, inputs))


def _require_error(backend: str, wrong: Wrong, inputs: Inputs) -> None:
    expected = wrong.error.__name__
    try:
        wrong.call(backend, inputs)
    except wrong.error as error:
        said = " ".join(str(error).split())
    except Exception as error:
        raise CheckFailed(expected, f"{type(error).__name__}: {str(error)[:MESSAGE]}") from error
    else:
        raise CheckFailed(f"{expected} for {wrong.name}", "no error")
    missing = [word for word in wrong.says if word not in said]
    if missing:
        raise CheckFailed(f"a message that says {missing[0]!r}", repr(said[:MESSAGE]))


def _right_again(backend: str, sample: Sample, inputs: Inputs) -> float | None:
    """The call after the error, within a wide bound: exact numbers are another check's business."""
    exact, plain = calls.truth(sample, inputs)
    found = calls.call(sample, backend, inputs)
    names = [f"result {i} of the next good call" for i in range(len(exact))]
    return tolerance.judge(found, exact, plain, WIDE, names) if exact else None


# ---------------------------------------------------------------------------- a later specification


def unknown_feature(family: str) -> Callable[[str, Inputs], object]:
    """Asks for a feature that this specification does not know, as a newer core would of an older backend."""

    def ask(backend: str, inputs: Inputs) -> object:
        basic = basic_problem(registry().get(backend), PROBLEMS[family])
        return select(dataclasses.replace(basic, features=frozenset({UNKNOWN_FEATURE})), backend).plan

    return ask


# ---------------------------------------------------------------------------- checks


def _gathered(family: str) -> tuple[Wrong, ...]:
    from torchhal_conformance.checks import wrong_attention, wrong_others, wrong_services

    listed = {
        "attention": wrong_attention.attention, "matmul": wrong_others.matmul, "foreach": wrong_others.foreach,
        "context_parallel": wrong_services.context_parallel, "cache_store": wrong_services.cache_store,
        "deploy": wrong_services.deploy,
    }  # fmt: skip
    found = tuple(listed[family]())
    later = Wrong("unknown_feature", found[0].good, unknown_feature(family), Unsupported, (UNKNOWN_FEATURE,))
    return (*found, later)


def _check(family: str) -> Check:
    wrongs = {wrong.name: wrong for wrong in _gathered(family)}

    def samples() -> Iterator[Sample]:
        return (dataclasses.replace(wrong.good, name=name) for name, wrong in wrongs.items())

    def run_named(backend: str, sample: Sample, seed: int) -> Measured:
        return run(backend, wrongs[sample.name], seed)

    return Check(
        name=f"{family}.errors",
        explanation=EXPLANATION,
        samples=samples,
        run=run_named,
        profile="distributed" if family == "context_parallel" else "inference",
    )


EXPLANATION: Final = Explanation(
    "Makes calls that mean nothing (wrong kinds, ranks, types, devices, sizes, options and names), each of which raises the "
    "documented class with words that say what was expected and what arrived; asks for a feature of a later specification, "
    "which is Unsupported; then looks whether an input was changed and whether the next good call is right.",
    "What one backend refuses and another answers with numbers is found in production, on the other hardware. A backend that "
    "answers a problem that it does not know drops an argument, which is how a newer framework's mask or scale goes missing.",
    "Where the core raises, the backend is never asked. An error out of run is the plan's own: look at what it does before it "
    "raises (nothing may be written), at its class (torchhal.errors.InvalidProblem), and at what it keeps afterwards.",
)


def checks() -> Iterator[Check]:
    """One for each family."""
    return (_check(family) for family in PROBLEMS)
