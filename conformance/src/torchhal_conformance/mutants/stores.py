"""Stores with one fault each, and ranks that lose or mistake each other's part."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import uuid
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.cache import StoreStats, check_key
from torchhal.errors import CacheIntegrityError
from torchhal_conformance.mutants import Mutant, Run


class OneFile:
    """A small honest store: a file for each key, written beside and moved into place, with a digest of the whole."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.root = Path(url.removeprefix("file://"))
        self.root.mkdir(exist_ok=True, parents=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key).replace("/", "=")

    def _write(self, path: Path, content: bytes) -> None:
        beside = path.with_name(f"{uuid.uuid4().hex}~")
        beside.write_bytes(content)
        os.replace(beside, path)

    def get(self, key: str) -> bytes | None:
        """The value, if it is what was put."""
        path = self._path(key)
        if not path.is_file():
            return None
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise CacheIntegrityError(f"{path} is not what was written")
        return content[32:]

    def put(self, key: str, value: bytes) -> None:
        """Keep a value."""
        self._write(self._path(key), hashlib.sha256(value).digest() + bytes(value))

    def exists(self, key: str) -> bool:
        """Whether there is a file."""
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> list[str]:
        """Keys that begin so."""
        found = (path.name.replace("=", "/") for path in self.root.iterdir() if not path.name.endswith("~"))
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


class Torn(OneFile):
    """Writes into the file that readers read: a writer that dies leaves half of the new value and nothing of the old."""

    def _write(self, path: Path, content: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            for at in range(0, len(content), 4096):
                file.write(content[at : at + 4096])


class Undigested(OneFile):
    """Gives whatever a file holds."""

    def get(self, key: str) -> bytes | None:
        """The bytes behind the digest, unread."""
        path = self._path(key)
        return path.read_bytes()[32:] if path.is_file() else None


class Escaping(OneFile):
    """Takes a key for a path."""

    def _path(self, key: str) -> Path:
        return self.root / (key if ".." in key else check_key(key).replace("/", "="))


class Shortening(OneFile):
    """Cuts names, as for a file system with short ones, and with them what tells fingerprints apart."""

    def _path(self, key: str) -> Path:
        head, slash, rest = check_key(key).partition("/")
        return self.root / f"{head[:24]}{slash}{rest}".replace("/", "=")


def _store(kind: type[OneFile]) -> Any:
    return lambda run, problem: kind if problem.scheme == "file" else run


# ---------------------------------------------------------------------------- ranks


class _OwnAlone(torch.autograd.Function):
    """Lets the gradient of one part through and no other."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, start: int, length: int) -> Tensor:
        ctx.part = (start, length)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept = torch.zeros_like(gradients[0])
        kept.narrow(2, *ctx.part).copy_(gradients[0].narrow(2, *ctx.part))
        return kept, None, None


class _WithoutReturn:
    """Attention of a rank that keeps to itself what it has to send back to others' keys and values."""

    def __init__(self, call: Any, value_too: bool = True) -> None:
        self._call = call
        self._value_too = value_too

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Any:
        call = self._call
        part = (call.key_offsets[call.rank], call.key_lengths[call.rank])
        key = _OwnAlone.apply(key, *part)  # type: ignore[no-untyped-call]
        value = _OwnAlone.apply(value, *part) if self._value_too else value  # type: ignore[no-untyped-call]
        return call(query, key, value, **rest)


def _lost_hop(run: Run, problem: Any) -> Run:
    """The last rank's part of the others' gradients never leaves it."""

    def faulty(call: Any, *rest: Any) -> Any:
        return run(_WithoutReturn(call) if call.rank == len(call.key_lengths) - 1 else call, *rest)

    return faulty


def _no_dk_across_ranks(run: Run, problem: Any) -> Run:
    return lambda call, *rest: run(_WithoutReturn(call, value_too=False), *rest)


def _from_the_end(run: Run, problem: Any) -> Run:
    """Ranks are counted from the other end where rows are placed."""

    def faulty(call: Any, *rest: Any) -> Any:
        lengths, rank = call.query_lengths, call.rank
        behind = sum(lengths[rank + 1 :])
        if rank:
            lengths = (behind, *(0,) * (rank - 1), *lengths[rank:])
        return run(dataclasses.replace(call, query_lengths=lengths), *rest)

    return faulty


RANKS: Final = ("context_parallel.numbers",)
MUTANTS: Final = (
    Mutant("torn_write", "a store writes in place", ("cache_store.crash",), _store(Torn), "cache_store"),
    Mutant("no_digest", "a store does not look at what it reads", ("cache_store.corruption",), _store(Undigested), "cache_store"),
    Mutant("path_escape", "a key with '..' leads out of the store", ("cache_store.paths",), _store(Escaping), "cache_store"),
    Mutant(
        "ignored_fingerprint", "a store cuts keys, so that environments share entries", ("cache_store.fingerprints",),
        _store(Shortening), "cache_store",
    ),
    Mutant("no_dk_across_ranks", "no gradient goes back to other ranks' keys", RANKS, _no_dk_across_ranks, "context_parallel"),
    Mutant("lost_hop", "the last rank sends no gradient back to others' keys and values", RANKS, _lost_hop, "context_parallel"),
    Mutant("reversed_ranks", "ranks are counted from the end where rows are placed", RANKS, _from_the_end, "context_parallel"),
)  # fmt: skip
