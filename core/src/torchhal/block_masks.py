"""``create_block_mask``: a BlockMask in time and memory that grow with its blocks, not with the mask."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchhal import _block_evaluation as exact
from torchhal.errors import CaptureError, InvalidProblem
from torchhal.pointwise import Captured, capture
from torchhal.pointwise.interval_arithmetic import Range
from torchhal.pointwise.intervals import RangeTable, bound

INPUTS: Final = tuple((name, torch.int64) for name in ("b", "h", "q_idx", "kv_idx"))
"""The arguments of a ``mask_mod``, in the dtype in which torch's own create_block_mask gives them."""

_CHUNK: Final = 2**18
"""Blocks whose bounds are held at a time."""
_LIST_CHUNK: Final = 2**16
"""Blocks that are listed at a time: what is made on the way stays in the L2 cache, and in memory that the process has. With
``2**18`` a mask of 512 x 512 blocks takes 1.05 to 1.8 times as long, with ``2**15`` 1.25 times (Zen 4, 2 cores)."""


def create_block_mask(
    mask_mod: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = "cpu",
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:
    """The BlockMask that ``torch.nn.attention.flex_attention.create_block_mask`` gives, without the dense mask.

    Most blocks are classified from bounds on what ``mask_mod`` can give inside them, so that a causal, window,
    prefix or document mask takes time in proportion to its blocks. Only where bounds and corners leave a block open
    is ``mask_mod`` evaluated at each of its positions, a few MiB at a time. A ``mask_mod`` that can not be captured
    (see :func:`torchhal.pointwise.capture`) is evaluated everywhere, by ``torch.vmap``, a few MiB at a time, too.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, of scalar int64 tensors, gives a scalar bool: whether that query
            sees that key. Positions beyond ``Q_LEN`` and ``KV_LEN`` are never asked for and count as False, so a block
            that reaches beyond them is never full.
        B: batch size, or None for one mask for all.
        H: number of query heads, or None for one mask for all.
        Q_LEN: number of query positions.
        KV_LEN: number of key positions.
        device: where the result is, and where the tensors that ``mask_mod`` captures have to be; None is the current
            accelerator if there is one, else the CPU.
        BLOCK_SIZE: side of a block, or (query side, key side).

    Returns:
        A BlockMask with full blocks listed apart: int32 ``kv_num_blocks`` (B, H, query blocks) and ``kv_indices``
        (B, H, query blocks, key blocks), ``full_kv_*`` alike, and the transposed ``q_*`` and ``full_q_*``.

    Raises:
        InvalidProblem: a size is no number or is negative, a block has no positions, ``mask_mod`` takes other
            arguments or gives something other than one bool, reads outside a captured tensor, captures a tensor of
            another device, or can be evaluated neither by torchhal nor by torch.
    """
    problem = _Problem(
        B=1 if B is None else _size("B", B, 0),
        H=1 if H is None else _size("H", H, 0),
        q_len=_size("Q_LEN", Q_LEN, 0),
        kv_len=_size("KV_LEN", KV_LEN, 0),
        block=_block_size(BLOCK_SIZE),
        device=_device(device),
    )
    _check_signature(mask_mod)
    any_seen, all_seen = _classified(problem, mask_mod)
    return _block_mask(problem, mask_mod, any_seen & ~all_seen, all_seen)


@dataclass(frozen=True)
class _Problem:
    B: int
    H: int
    q_len: int
    kv_len: int
    block: tuple[int, int]
    device: torch.device

    @property
    def rows(self) -> int:
        return math.ceil(self.q_len / self.block[0])

    @property
    def columns(self) -> int:
        return math.ceil(self.kv_len / self.block[1])


def _classified(problem: _Problem, mask_mod: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Whether any position of each block is visible, and whether the block is full.

    Two bool tensors, (B, H, rows, columns); B and H are 1 where they make no difference.
    """
    try:
        captured = capture(mask_mod, INPUTS, what="mask_mod", device=problem.device)
    except CaptureError as reason:
        any_seen, all_seen = exact.everywhere(problem, mask_mod, reason)
        return any_seen, all_seen & _complete(problem, *_sides(problem))
    _check_captured(captured, problem.device)
    reads = {node.position for node in captured.graph.nodes if node.primitive == "input"}
    B, H = (size if i in reads else min(size, 1) for i, size in enumerate((problem.B, problem.H)))
    any_seen = torch.empty(B * H * problem.rows, problem.columns, dtype=torch.bool, device=problem.device)
    all_seen = torch.empty_like(any_seen)
    tables = [RangeTable(tensor) for tensor in captured.tensors]
    for rows in _stretches(any_seen.shape[0], max(1, _CHUNK // max(1, problem.columns))):
        any_seen[rows], all_seen[rows] = _classified_rows(problem, captured, tables, H, rows)
    shape = (B, H, problem.rows, problem.columns)
    return any_seen.view(shape), all_seen.view(shape)


def _stretches(size: int, most: int) -> Iterator[slice]:
    for start in range(0, size, most):
        yield slice(start, min(start + most, size))


def _classified_rows(
    problem: _Problem, captured: Captured, tables: list[RangeTable], H: int, rows: slice
) -> tuple[Tensor, Tensor]:
    """The same for some of the rows of blocks, numbered over batches, heads and query blocks: (rows, columns)."""
    inputs = _row_ranges(problem, H, rows)
    (seen,), faulty = bound(captured.graph, inputs, tables)
    shape = (rows.stop - rows.start, problem.columns)
    surely, possibly = seen.low.expand(shape), seen.high.expand(shape)
    whole = _complete(problem, *inputs[2:])
    open_ = (~surely & possibly) | faulty
    any_seen, all_seen = surely | open_, surely & whole
    row, column = open_.nonzero(as_tuple=True)
    if row.numel():
        boxes = exact.Boxes(
            *((r.low.expand(shape)[row, column], r.high.expand(shape)[row, column]) for r in inputs)
        )
        some, every = exact.decided(captured, boxes, faulty.expand(shape)[row, column], whole[row, column])
        any_seen[row, column], all_seen[row, column] = some, every & whole[row, column]
    return any_seen, all_seen


def _row_ranges(problem: _Problem, H: int, rows: slice) -> list[Range]:
    """The ranges of b, h, q_idx (rows, 1) and kv_idx (1, columns) in each row and column of blocks."""
    row = torch.arange(rows.start, rows.stop, device=problem.device).unsqueeze(1)
    pair = row // problem.rows
    b, h = pair // H, pair % H
    q, kv = _sides(problem)
    inside = (row % problem.rows).squeeze(1)
    return [Range(b, b), Range(h, h), Range(q.low[inside], q.high[inside]), kv]


def _sides(problem: _Problem) -> tuple[Range, Range]:
    """The positions in each row (rows, 1) and in each column of blocks (1, columns)."""
    row = torch.arange(problem.rows, device=problem.device).unsqueeze(1)
    column = torch.arange(problem.columns, device=problem.device).unsqueeze(0)
    return _positions(row, problem.block[0], problem.q_len), _positions(
        column, problem.block[1], problem.kv_len
    )


def _positions(block: Tensor, size: int, length: int) -> Range:
    low = block * size
    return Range(low, (low + (size - 1)).clamp(max=length - 1))


def _complete(problem: _Problem, q: Range, kv: Range) -> Tensor:
    """Which blocks lie wholly within the lengths; what is beyond them counts as False, so no other is full."""
    rows, columns = problem.block
    return (q.high - q.low + 1 == rows) & (kv.high - kv.low + 1 == columns)


# --- lists of blocks


def _block_mask(problem: _Problem, mask_mod: Callable[..., Any], partial: Tensor, full: Tensor) -> BlockMask:
    kv, q, full_kv, full_q = (
        _listed(blocks, problem.B, problem.H)
        for kind in (partial, full)
        for blocks in (kind, kind.transpose(-2, -1))
    )
    return BlockMask(
        (problem.q_len, problem.kv_len),
        *kv,
        *full_kv,
        *q,
        *full_q,
        BLOCK_SIZE=problem.block,
        mask_mod=mask_mod,
    )


def _listed(blocks: Tensor, B: int, H: int) -> tuple[Tensor, Tensor]:
    """Count and columns of the blocks of each row, in order, and behind them the columns of the others, in order.

    What a stable descending sort gives, as torch does it, in one pass: int32, (B, H, rows) and (B, H, rows, columns).
    """
    *_, rows, columns = blocks.shape
    flat = blocks.contiguous().flatten(0, 2)  # sums along columns that lie apart take three times as long
    count = torch.empty(flat.shape[0], dtype=torch.int32, device=blocks.device)
    indices = torch.empty(flat.shape, dtype=torch.int32, device=blocks.device)
    # The narrowest type that counts them: int64, which scatter_ alone wants, takes three times as long.
    narrow = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    column = torch.arange(columns, dtype=torch.int32, device=blocks.device)
    numbers = column.to(narrow)
    for part in _stretches(flat.shape[0], max(1, _LIST_CHUNK // max(1, columns))):
        taken = flat[part].cumsum(-1, dtype=narrow)
        total = flat[part].sum(-1, dtype=narrow)
        place = torch.where(flat[part], taken - 1, total.unsqueeze(1) + numbers - taken).long()
        indices[part].scatter_(-1, place, column.expand_as(place))
        count[part] = total
    lead = blocks.shape[:2]
    return (
        count.view(*lead, rows).expand(B, H, -1).contiguous(),
        indices.view(*lead, rows, columns).expand(B, H, -1, -1).contiguous(),
    )


# --- arguments


def _size(name: str, value: Any, least: int) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        either = "an int or None" if name in ("B", "H") else "an int"
        raise InvalidProblem(f"{name} expects {either} and got {type(value).__name__} {value!r}") from None
    if size < least:
        raise InvalidProblem(f"{name} has to be at least {least} and is {size}")
    return size


def _block_size(given: Any) -> tuple[int, int]:
    pair = (given, given) if not isinstance(given, (tuple, list)) else tuple(given)
    if len(pair) != 2:
        raise InvalidProblem(
            f"BLOCK_SIZE expects an int or a pair (query side, key side) and got {given!r}, of {len(pair)} entries"
        )
    return _size("BLOCK_SIZE", pair[0], 1), _size("BLOCK_SIZE", pair[1], 1)


def _device(given: Any) -> torch.device:
    if given is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    # An index that is left out is the current one, which only a tensor tells.
    return torch.empty(0, device=given).device


def _check_signature(mask_mod: Any) -> None:
    expected = "mask_mod expects a function of (b, h, q_idx, kv_idx)"
    if not callable(mask_mod):
        raise InvalidProblem(f"{expected} and got {type(mask_mod).__name__}")
    try:
        signature = inspect.signature(mask_mod)
    except ValueError:  # a builtin that does not tell
        return
    try:
        signature.bind(*INPUTS)
    except TypeError as error:
        raise InvalidProblem(
            f"{expected} and got one of {signature} ({error}); a score_mod, which takes the score before them, "
            "goes to score_mod= of the attention call"
        ) from None


def _check_captured(captured: Captured, device: torch.device) -> None:
    if captured.structure == "tuple":
        raise InvalidProblem(
            f"mask_mod has to return one bool and returns {len(captured.graph.outputs)} values"
        )
    (dtype,) = captured.graph.output_dtypes
    if dtype is not torch.bool:
        raise InvalidProblem(
            f"mask_mod has to return a bool and returns {dtype}; compare, or convert with .bool()"
        )
    for tensor in captured.tensors:
        if tensor.device != device and (tensor.dim() or tensor.device.type != "cpu"):
            raise InvalidProblem(
                f"mask_mod captures a tensor on {tensor.device} and the mask is made on {device}; "
                f"pass device={str(tensor.device)!r}, or move the tensor"
            )
