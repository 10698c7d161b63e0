"""How the values of a Problem are written as JSON and read back, and how they are shown to a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchhal.errors import InvalidProblem
from torchhal.pointwise import Graph


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`.

    Raises:
        InvalidProblem: no torch dtype has that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidProblem(f"expected the name of a torch dtype, such as 'float32', and got {name!r}")
    return dtype


def short(value: object) -> str:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Graph):
        return value.digest[:8]
    if isinstance(value, tuple):
        return "(" + ", ".join(short(v) for v in value) + ")"
    return str(value)


def encode(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, Graph):
        return {"graph": value.to_text()}
    if isinstance(value, frozenset):
        return {"set": sorted(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    return value


def decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    decoders: dict[str, Callable[[Any], Any]] = {
        "dtype": dtype_from_name,
        "device": torch.device,
        "graph": Graph.from_text,
        "set": frozenset,
        "tuple": lambda items: tuple(decode(v) for v in items),
    }
    return decoders[kind](content)
