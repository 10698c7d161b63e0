"""Does a backend say consistent things of itself, and keep silent where it claims nothing?

Each check is a generator over one backend: it yields None for a statement that holds and a
:class:`~torchhal_conformance.report.Finding` for one that does not.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from packaging.specifiers import SpecifierSet

from torchhal import hookspecs
from torchhal.problems import PROBLEMS, SPEC_VERSION, Decline, Plan, Problem
from torchhal.registry import Backend
from torchhal_conformance.report import Finding

Outcome = Iterator[Finding | None]

UNKNOWN_FEATURE: Final = "feature_of_a_later_specification"
"""What no backend of this specification can have heard of."""

CODE: Final = re.compile(r"[a-z][a-z0-9_]*")

CHOICES: Final = {"layout": "layouts", "scheme": "schemes", "task": "tasks"}
"""Field of a problem that holds one of the words that the claims list, and the claim that lists them."""

ASK: Final[Mapping[str, Mapping[str, Any]]] = {
    "causal": {"is_causal": True},
    "boolean_mask": {"mask_dtype": torch.bool},
    "gqa": {"query_heads": 4, "key_heads": 2},
    "value_head_size": {"value_head_size": 32},
    "lse": {"return_lse": True},
    "max_scores": {"return_lse": True, "return_max_scores": True},
    "dropout": {"dropout": True},
}
"""Fields that a problem with the feature has, for features that need no captured function."""


def _statement(check: str, subject: str, holds: bool, expected: str, got: object) -> Finding | None:
    return None if holds else Finding(check, subject, expected, str(got))


def identity(backend: Backend) -> Outcome:
    """Name, devices, specification range, preferences and probe of ``torchhal_backend``."""
    check, info = "contract.identity", backend.info
    yield _statement(
        check,
        "name",
        info.name.isidentifier(),
        "a Python identifier, so that it can stand in a variable's name",
        info.name,
    )
    yield _statement(check, "vendor", bool(info.vendor), "the vendor's name", repr(info.vendor))
    for kind in sorted(info.device_types):
        yield _statement(check, "device_types", _is_device(kind), "device types torch knows", kind)
    bounded = not SpecifierSet(info.spec).contains("9999")
    yield _statement(
        check, "spec", bounded, f"a range that ends, such as '>={SPEC_VERSION},<2'", repr(info.spec)
    )
    for kind in info.preference:
        known = not info.device_types or kind in info.device_types
        yield _statement(
            check, f"preference for {kind}", known, "one of its own device types", sorted(info.device_types)
        )
    yield _probe(backend)


def _is_device(kind: str) -> bool:
    try:
        torch.device(kind)
    except RuntimeError:
        return False
    return True


def _probe(backend: Backend) -> Finding | None:
    check = "contract.identity"
    try:
        seen = dict(backend.info.probe())
        json.dumps(seen)
    except Exception as error:
        return Finding(
            check, "probe", "values that JSON can hold, on any machine", f"{type(error).__name__}: {error}"
        )
    status = seen.get("status")
    return _statement(
        check,
        "probe",
        isinstance(status, str) and bool(status),
        "the key 'status', 'ready' or why not",
        sorted(seen),
    )


def claims(backend: Backend) -> Outcome:
    """Every claimed family has its hook, every hook its claim, and claims name something."""
    check = "contract.claims"
    for family in hookspecs.FAMILIES:
        claimed = getattr(backend.info.capabilities, family)
        hook = hookspecs.hook_name(family)
        present = hasattr(backend.plugin, hook)
        said = "claimed" if claimed is not None else "not claimed"
        yield _statement(
            check,
            hook,
            present == (claimed is not None),
            "a hook exactly where the family is claimed",
            f"{said}, hook {present}",
        )
        for field in dataclasses.fields(claimed) if claimed is not None else ():
            value = getattr(claimed, field.name)
            if isinstance(value, frozenset):
                yield _statement(
                    check,
                    f"{family}.{field.name}",
                    bool(value),
                    "at least one entry in a claimed family",
                    "none",
                )


def refusals(backend: Backend) -> Outcome:
    """What is not claimed is declined: each feature, a feature nobody has heard of, and each family."""
    check = "contract.refusals"
    for family, kind in PROBLEMS.items():
        claimed = getattr(backend.info.capabilities, family)
        names = (
            []
            if claimed is None
            else [f.name for f in dataclasses.fields(claimed) if getattr(claimed, f.name) is False]
        )
        for name in [*names, UNKNOWN_FEATURE]:
            problem = dataclasses.replace(basic_problem(backend, kind), features=frozenset({name}))
            yield _is_decline(check, f"{family} with {name}, which is not claimed", backend.ask(problem))


def _is_decline(check: str, subject: str, answer: Plan | Decline) -> Finding | None:
    return _statement(
        check,
        subject,
        isinstance(answer, Decline),
        "a Decline",
        f"the plan {getattr(answer, 'description', '')!r}",
    )


def answers(backend: Backend) -> Outcome:
    """Each claim, asked for alone, is answered with a Plan or a well-formed Decline, and never with an exception."""
    check = "contract.answers"
    for family, kind in PROBLEMS.items():
        if getattr(backend.info.capabilities, family) is None:
            continue
        for problem in _claimed_problems(backend, kind):
            answer = backend.ask(problem)
            if isinstance(answer, Plan):
                yield _statement(
                    check,
                    problem.summary(),
                    callable(answer.run),
                    "a plan whose run can be called",
                    repr(answer.run),
                )
                continue
            yield _statement(
                check, problem.summary(), answer.code != "hook_error", "a Plan or a Decline", answer.reason
            )
            formed = CODE.fullmatch(answer.code) is not None
            yield _statement(
                check, problem.summary(), formed, "a code in lower case with underscores", repr(answer.code)
            )


def basic_problem(backend: Backend, kind: type[Problem]) -> Problem:
    """The plainest problem of a family, on a device of the backend, within its claims where it has any."""
    device = _device(backend)
    claimed = getattr(backend.info.capabilities, kind.family)
    values: dict[str, Any] = {}
    for name, choices in CHOICES.items():
        if getattr(claimed, choices, None):
            values[name] = min(getattr(claimed, choices))
    types = sorted(getattr(claimed, "dtypes", ()), key=str)
    for field in dataclasses.fields(kind):
        if types and field.name.endswith("_dtype") and field.name not in ("mask_dtype", "bias_dtype"):
            values[field.name] = types[0]
    if types and kind.family == "matmul":
        values["out_dtypes"] = (types[0],)
    return kind(device, **values)


def _device(backend: Backend) -> torch.device:
    kind = min(filter(_is_device, backend.info.device_types), default="cpu")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, 0)


def _claimed_problems(backend: Backend, kind: type[Problem]) -> Iterator[Problem]:
    if kind.family == "foreach":  # a foreach problem means nothing without a captured function
        return
    basic = basic_problem(backend, kind)
    claimed = getattr(backend.info.capabilities, kind.family)
    yield basic
    for name, choices in CHOICES.items():
        for choice in sorted(getattr(claimed, choices, ())):
            yield dataclasses.replace(basic, **{name: choice})
    for feature, values in ASK.items():
        if getattr(claimed, feature, False) is True and set(values) <= _fields(kind):
            yield dataclasses.replace(basic, features=frozenset({feature}), **values)


def _fields(kind: type[Problem]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


CHECKS: Final = (identity, claims, refusals, answers)
