"""Faults in cache stores, in deployment, across ranks, and in what torch is told of an operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.cache import StoreStats
from torchhal_conformance.mutants import Mutant, Run


class CarelessStore:
    """Files that are written in place, without a digest, wherever a key leads, and listed in small letters."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.root = Path(url.removeprefix("file://"))
        self.root.mkdir(exist_ok=True, parents=True)

    def _path(self, key: str) -> Path:
        return self.root / (key if ".." in key else key.replace("/", "="))

    def get(self, key: str) -> bytes | None:
        """What the file holds, whatever that is."""
        path = self._path(key)
        return path.read_bytes() if path.is_file() else None

    def put(self, key: str, value: bytes) -> None:
        """A thousand bytes at a time, for all to see."""
        with self._path(key).open("wb", buffering=0) as file:
            for at in range(0, len(value), 1000):
                file.write(value[at : at + 1000])

    def exists(self, key: str) -> bool:
        """Whether there is a file."""
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> list[str]:
        """Keys, none of them as it was given."""
        found = (path.name.replace("=", "/").lower() for path in self.root.iterdir())
        return sorted(key for key in found if key.startswith(prefix))

    def delete(self, key: str) -> bool:
        """Remove the file."""
        found = self.exists(key)
        self._path(key).unlink(missing_ok=True)
        return found

    def stats(self) -> StoreStats:
        """What lies in the folder; uses are not counted."""
        sizes = [path.stat().st_size for path in self.root.iterdir()]
        return StoreStats(len(sizes), sum(sizes), None, 0, 0)


def _careless(run: Run, problem: Any) -> Run:
    return CarelessStore if problem.scheme == "file" else run


def _no_such_option(run: Run, problem: Any) -> Run:
    return (lambda: {"no_such_option": True}) if problem.task == "compile_options" else run


def _rows_from_zero(run: Run, problem: Any) -> Run:
    def faulty(call: Any, *rest: Any) -> Any:
        before = (0,) * call.rank + call.query_lengths[call.rank :]
        return run(dataclasses.replace(call, query_lengths=before), *rest)

    return faulty


def _last_bit(run: Run, problem: Any) -> Run:
    def change(t: Tensor) -> Tensor:
        return t * (1.0 + torch.finfo(t.dtype).eps) if t.is_floating_point() else t

    def faulty(*given: Any) -> Any:
        return tuple([change(t) for t in column] for column in run(*given))

    return faulty


# ---------------------------------------------------------------------------- an operator that lies when it is fake

_library: Final = torch.library.Library("torchhal_conformance_mutant", "DEF")  # type: ignore[no-untyped-call]
_SCHEMA: Final = "attention(Tensor query, Tensor key, Tensor value, float scale) -> Tensor"
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]


def _real(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    weights = torch.softmax((query.double() @ key.double().mT) * scale, -1)
    return (weights @ value.double()).to(query.dtype).contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty((batch, rows, heads, value.shape[-1])).transpose(1, 2)


_library.impl("attention", _real, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("torchhal_conformance_mutant::attention", _fake, lib=_library)


def _other_strides(run: Run, problem: Any) -> Run:
    if problem.features or problem.layout != "dense":
        return run
    operator: Callable[..., Tensor] = torch.ops.torchhal_conformance_mutant.attention.default

    def faulty(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, operands: Any) -> Tensor:
        return operator(query, key, value, scale)

    return faulty


STORES: Final = tuple(
    f"cache_store.{name}" for name in ("roundtrip", "corruption", "concurrency", "crash", "paths")
)
RANKS: Final = ("context_parallel.numbers",)

MUTANTS: Final = (
    Mutant("careless_store", "files are written in place and without a digest", STORES, _careless, "cache_store"),
    Mutant("no_such_option", "the compile options name one that torch has not", ("deploy.tasks",), _no_such_option, "deploy"),
    Mutant("rows_from_zero", "every rank counts its rows from the start", RANKS, _rows_from_zero, "context_parallel"),
    Mutant("last_bit", "foreach results are one unit in the last place too large", ("foreach.bitwise",), _last_bit, "foreach"),
    Mutant(
        "other_strides", "the fake formula promises strides that the kernel does not deliver", ("attention.opcheck",),
        _other_strides, promises={"traceable": True},
    ),
)  # fmt: skip
