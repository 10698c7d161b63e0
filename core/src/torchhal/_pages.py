"""What a PagedKVCache keeps of its pages and sequences, and how it reads the tensors it is given."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchhal._checks import storage_fault
from torchhal.errors import InvalidProblem

HOST: Final = torch.device("cpu")
"""Where page numbers are kept, whatever the default device: they decide what is written, before it is."""


@dataclass(frozen=True, eq=False)
class SequenceState:
    """One sequence as it is between two calls; appending makes another, so that a failure leaves this one."""

    number: int
    length: int
    pages: Tensor
    """(number of pages,) int32 on the host, in order; never written to, as forks share it."""


class Growth(NamedTuple):
    """What an append does to one sequence."""

    before: SequenceState
    tokens: int
    fresh: int
    """Pages it takes from the free ones, the copy of a shared page among them."""
    copied: int | None
    """The partly filled last page, if another sequence goes on holding it."""


class Tokens(NamedTuple):
    """Keys and values of an append, packed: the tokens of one sequence after those of the other."""

    keys: Tensor
    """(T, Hkv, E)."""
    values: Tensor
    """(T, Hkv, Ev)."""
    counts: list[int]
    """Tokens of each sequence."""


class Pool:
    """Which pages are free, and how many sequences hold each of the others."""

    def __init__(self, pages: int) -> None:
        self.free = list(reversed(range(pages)))
        self.holders = [0] * pages

    def next(self, count: int) -> list[int]:
        """The free pages that are taken next; :meth:`hold` takes them."""
        return self.free[len(self.free) - count :][::-1]

    def hold(self, pages: list[int]) -> None:
        """Count one more holder of each page; free ones must be those of :meth:`next`."""
        for page in pages:
            if not self.holders[page]:
                self.free.pop()
            self.holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """Count one holder less of each page."""
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)


# ---------------------------------------------------------------------------- where tokens go


def grown(growths: list[Growth], fresh: list[int]) -> list[SequenceState]:
    """The sequences after an append, with the pages of ``fresh`` shared out in order."""
    taken = torch.tensor(fresh, dtype=torch.int32, device=HOST)
    parts = torch.split(taken, [g.fresh for g in growths])
    after = []
    for (before, tokens, _, copied), part in zip(growths, parts, strict=True):
        kept = before.pages if copied is None else before.pages[:-1]
        pages = torch.cat((kept, part)) if len(part) else kept
        after.append(SequenceState(before.number, before.length + tokens, pages))
    return after


def places(growths: list[Growth], after: list[SequenceState], page_size: int) -> Tensor:
    """(2, T) int64 on the host: the page of each new token, and its slot there."""
    # Page tables of what is written alone: a step of decoding writes one page of a sequence of many.
    rows = [s.pages[g.before.length // page_size :] for g, s in zip(growths, after, strict=True)]
    counts = torch.tensor([g.tokens for g in growths], dtype=torch.int64, device=HOST)
    starts = torch.tensor([g.before.length % page_size for g in growths], dtype=torch.int64, device=HOST)
    owner = torch.repeat_interleave(counts)
    shift = starts - (counts.cumsum(0) - counts)
    position = torch.arange(len(owner), device=HOST) + shift[owner]
    page = pad_rows(rows, 1)[owner, position // page_size]
    return torch.stack((page.to(torch.int64), position % page_size))


def pad_rows(rows: list[Tensor], width: int) -> Tensor:
    """(B, at least ``width``) int32 with the page numbers of each row first, then zeros."""
    # A row of zeros more gives the width, also of a table without rows.
    zeros = torch.zeros(width, dtype=torch.int32, device=HOST)
    return pad_sequence([*rows, zeros], batch_first=True)[:-1]


# ---------------------------------------------------------------------------- what arrives


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(sizes: dict[str, Any]) -> None:
    """Raise InvalidProblem for the first that is no positive integer."""
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise InvalidProblem(f"{name} expects a positive integer and got {size!r}")


def checked_tokens(
    batch: int,
    keys: Tensor,
    values: Tensor,
    pools: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tokens:
    """The tokens of an append to ``batch`` sequences, packed; of type ``dtype``, which a quantised pool's is not.

    Raises:
        InvalidProblem: tensors that do not fit the pools or each other, or lengths that do not fit them.
    """
    packed = cu_seqlens is not None
    for name, tensor, pool in (("keys", keys, pools[0]), ("values", values, pools[1])):
        fault = _tensor_fault(name, tensor, pool, dtype, batch, packed)
        if fault:
            raise InvalidProblem(fault)
    dim = 0 if packed else 2
    if keys.shape[dim] != values.shape[dim]:
        raise InvalidProblem(
            f"keys and values belong to the same tokens, and keys has {keys.shape[dim]} and values "
            f"{values.shape[dim]}; pass one of each for each token"
        )
    if cu_seqlens is not None:
        return Tokens(keys, values, _counts(cu_seqlens, batch, keys.shape[0]))
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (keys, values)]
    return Tokens(rows[0], rows[1], [keys.shape[2]] * batch)


def _tensor_fault(
    name: str, tensor: Tensor, pool: Tensor, dtype: torch.dtype, batch: int, packed: bool
) -> str:
    """The first thing wrong with keys or values, or an empty string."""
    if not isinstance(tensor, Tensor):
        return f"{name} expects a tensor and got {type(tensor).__name__}"
    fault = storage_fault(name, tensor)
    if fault:
        return fault
    heads, size = pool.shape[1], pool.shape[3]
    shape = f"(T, {heads}, {size})" if packed else f"({batch}, {heads}, L, {size})"
    fits = tensor.shape[1:] == (heads, size) if packed else _without_length(tensor) == (batch, heads, size)
    if not fits:
        what = (
            "tokens, heads, head size, with cu_seqlens" if packed else "sequences, heads, tokens, head size"
        )
        return f"{name} expects {shape}: {what}; and is {tuple(tensor.shape)}"
    if tensor.dtype is not dtype:
        return f"{name} is {tensor.dtype} and the cache {dtype}; convert it with .to({dtype})"
    if tensor.device != pool.device:
        return f"{name} is on {tensor.device} and the cache on {pool.device}; move it to {pool.device}"
    if tensor.requires_grad and torch.is_grad_enabled():
        return f"{name} requires grad and a cache keeps no gradients; append under torch.no_grad(), or pass {name}.detach()"
    return ""


def _without_length(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.dim() != 4 else (*tensor.shape[:2], tensor.shape[3])


def _counts(cu_seqlens: Tensor, batch: int, tokens: int) -> list[int]:
    if not isinstance(cu_seqlens, Tensor):
        raise InvalidProblem(
            f"cu_seqlens expects an integer tensor (B + 1,) and got {type(cu_seqlens).__name__}"
        )
    if tuple(cu_seqlens.shape) != (batch + 1,) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InvalidProblem(
            f"cu_seqlens expects int32 or int64 ({batch + 1},), a running sum over {batch} sequences, and is "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    starts: list[int] = cu_seqlens.tolist()
    counts = [end - start for start, end in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or any(count < 0 for count in counts):
        raise InvalidProblem(
            f"cu_seqlens has to begin at 0, never decrease and end at the number of tokens, {tokens}, and is {starts}"
        )
    return counts
