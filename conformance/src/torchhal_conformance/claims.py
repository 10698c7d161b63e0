"""Claims as JSON holds them, and back: how a header tells what a backend claimed, and a worker what its backend claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from torchhal import problems
from torchhal.problems import Capabilities


def written(capabilities: Capabilities) -> dict[str, Any]:
    """The claims as values that JSON holds."""

    def value(found: Any) -> Any:
        return (
            sorted(str(item).removeprefix("torch.") for item in found)
            if isinstance(found, frozenset)
            else found
        )

    families = {f.name: getattr(capabilities, f.name) for f in fields(capabilities)}
    return {
        name: {key: value(found) for key, found in vars(claimed).items()}
        for name, claimed in families.items()
        if claimed is not None
    }


def read(claims: Mapping[str, Any]) -> Capabilities:
    """The claims that were written so.

    Raises:
        AttributeError, TypeError: they are none that this core knows.
    """

    def value(name: str, found: Any) -> Any:
        if not isinstance(found, list):
            return found
        return frozenset(getattr(torch, item) for item in found) if name == "dtypes" else frozenset(found)

    made = {
        family: _claims_of(family)(**{name: value(name, found) for name, found in claimed.items()})
        for family, claimed in claims.items()
    }
    return Capabilities(**made)


def _claims_of(family: str) -> Callable[..., Any]:
    return getattr(problems, "".join(part.title() for part in family.split("_")) + "Claims")  # type: ignore[no-any-return]
