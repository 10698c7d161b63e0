"""What is wrong with a plugin's answer to ``torchhal_backend``, in words: the field, expected, arrived."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from torchhal.problems import BackendInfo, Capabilities

_SETS: Final = (set, frozenset)
_CLAIMS: Final[dict[str, type]] = {
    family: typing.get_args(kind)[0] for family, kind in typing.get_type_hints(Capabilities).items()
}
"""The class that holds the claims of each family."""


def field_fault(info: BackendInfo) -> str:
    """The first field whose value is not of its type, or an empty string."""
    return next(_faults(info), "")


def _faults(info: BackendInfo) -> Iterator[str]:
    for name in ("name", "vendor", "spec", "version"):
        if not isinstance(getattr(info, name), str):
            yield _text(name, "a string", getattr(info, name))
    if not _is_set_of(str, info.device_types):
        yield _text("device_types", 'a set of strings, such as frozenset({"cpu"})', info.device_types)
    preference = info.preference
    if not isinstance(preference, Mapping) or not all(
        isinstance(device, str) and type(claim) is int for device, claim in preference.items()
    ):
        yield _text("preference", 'a mapping of strings to int, such as {"cpu": 100}', preference)
    if not callable(info.probe):
        yield _text("probe", "a function without arguments that returns a mapping", info.probe)
    if isinstance(info.capabilities, Capabilities):
        yield from _claim_faults(info.capabilities)
    else:
        yield _text("capabilities", "a torchhal.Capabilities", info.capabilities)


def _claim_faults(capabilities: Capabilities) -> Iterator[str]:
    for family, kind in _CLAIMS.items():
        claims = getattr(capabilities, family)
        if claims is None:
            continue
        if not isinstance(claims, kind):
            yield _text(f"capabilities.{family}", f"None or its {kind.__name__}", claims)
            continue
        for item in dataclasses.fields(kind):
            value, where = getattr(claims, item.name), f"capabilities.{family}.{item.name}"
            if isinstance(item.default, bool):
                if not isinstance(value, bool):
                    yield _text(where, "True or False", value)
            elif not _is_set_of(torch.dtype if item.name == "dtypes" else str, value):
                yield _text(
                    where, f"a set of {'torch dtypes' if item.name == 'dtypes' else 'strings'}", value
                )


def _is_set_of(kind: type, value: Any) -> bool:
    return isinstance(value, _SETS) and all(isinstance(item, kind) for item in value)


def _text(where: str, expected: str, got: object) -> str:
    return f"its BackendInfo.{where} must be {expected} and is {got!r}"
