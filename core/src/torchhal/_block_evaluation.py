"""Blocks of a mask that bounds leave open, evaluated: at their corners, then everywhere, a few MiB at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from torchhal.errors import InvalidProblem
from torchhal.pointwise import Captured, evaluate

BUDGET: Final = 16 * 2**20
"""Bytes that the values of a mask_mod may take at a time."""

Ends = tuple[Tensor, Tensor]


class Boxes(NamedTuple):
    """Blocks as the first and the last value of each argument in each of them: int64, (blocks,)."""

    b: Ends
    h: Ends
    q: Ends
    kv: Ends

    def at(self, which: Tensor | slice) -> Boxes:
        return Boxes(*((low[which], high[which]) for low, high in self))


class Lengths(Protocol):
    """What :func:`everywhere` reads of a problem."""

    @property
    def B(self) -> int: ...
    @property
    def H(self) -> int: ...
    @property
    def q_len(self) -> int: ...
    @property
    def kv_len(self) -> int: ...
    @property
    def block(self) -> tuple[int, int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


def decided(captured: Captured, boxes: Boxes, faulty: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Whether any, and whether every position of each block is visible: bool, (blocks,).

    Args:
        captured: the mask_mod.
        boxes: the blocks.
        faulty: blocks in which evaluation may raise, so that all of their positions have to be tried.
        whole: blocks of which it matters whether every position is visible.

    Raises:
        InvalidProblem: the mask_mod reads outside a captured tensor, or divides an integer by zero.
    """
    any_seen, all_seen = _at_corners(captured, boxes, faulty)
    left = (faulty | ~any_seen | (all_seen & whole)).nonzero()[:, 0]
    if left.numel():
        any_seen[left], all_seen[left] = _at_positions(captured, boxes.at(left))
    return any_seen, all_seen


def _at_corners(captured: Captured, boxes: Boxes, faulty: Tensor) -> Ends:
    any_seen, all_seen = torch.zeros_like(faulty), torch.ones_like(faulty)
    safe = (~faulty).nonzero()[:, 0]
    for part in torch.split(safe, max(1, _elements(captured) // 4)):
        some = boxes.at(part)
        q, kv = (
            torch.stack([ends[i] for i in order])
            for ends, order in ((some.q, (0, 0, 1, 1)), (some.kv, (0, 1, 0, 1)))
        )
        seen = _evaluated(captured, some.b[0], some.h[0], q, kv)
        any_seen[part], all_seen[part] = seen.any(0), seen.all(0)
    return any_seen, all_seen


def _at_positions(captured: Captured, boxes: Boxes) -> Ends:
    any_seen = torch.zeros_like(boxes.b[0], dtype=torch.bool)
    all_seen = torch.ones_like(any_seen)
    most = _elements(captured)
    rows, columns = (int((ends[1] - ends[0]).max()) + 1 for ends in (boxes.q, boxes.kv))
    width = min(columns, most)
    height = min(rows, max(1, most // width))
    every = torch.arange(len(any_seen), device=any_seen.device)
    for part in torch.split(every, max(1, most // (width * height))):
        for y, x in itertools.product(range(0, rows, height), range(0, columns, width)):
            some, whole = _of_tile(
                captured, boxes.at(part), (y, min(height, rows - y)), (x, min(width, columns - x))
            )
            any_seen[part] |= some
            all_seen[part] &= whole
    return any_seen, all_seen


def _of_tile(captured: Captured, boxes: Boxes, rows: tuple[int, int], columns: tuple[int, int]) -> Ends:
    """The same of the part of each block that begins at, and is as long as, ``rows`` and ``columns`` say."""
    # A block that ends earlier has its last position again.
    q, kv = (
        torch.minimum(
            ends[0].unsqueeze(1) + torch.arange(start, start + size, device=ends[0].device),
            ends[1].unsqueeze(1),
        )
        for ends, (start, size) in ((boxes.q, rows), (boxes.kv, columns))
    )
    b, h = boxes.b[0][:, None, None], boxes.h[0][:, None, None]
    seen = _evaluated(captured, b, h, q.unsqueeze(2), kv.unsqueeze(1))
    return seen.flatten(1).any(1), seen.flatten(1).all(1)


def _elements(captured: Captured) -> int:
    """How many positions have all the values of the graph within the budget."""
    return max(1, BUDGET // (8 * (len(captured.graph.nodes) + 1)))


def _evaluated(captured: Captured, *inputs: Tensor) -> Tensor:
    try:
        (seen,) = evaluate(captured.graph, inputs, [tensor.detach() for tensor in captured.tensors])
    except RuntimeError as error:
        if "ZeroDivisionError" not in str(error):
            raise
        raise InvalidProblem(
            "mask_mod divides an integer by zero at some position; divide by what is never zero there, for example "
            "divisor.clamp(min=1)"
        ) from error
    return seen.expand((inputs[2] + inputs[3] + inputs[0]).shape)


# --- functions that can not be captured


def everywhere(problem: Lengths, mask_mod: Callable[..., Any], reason: Exception) -> Ends:
    """Evaluate ``mask_mod`` at every position, with ``torch.vmap`` as torch's create_block_mask does.

    Args:
        problem: the lengths.
        mask_mod: the function.
        reason: why it could not be captured.

    Returns:
        Whether any, and whether every position within the lengths is visible: bool, (B, H, rows, columns).

    Raises:
        InvalidProblem: torch can not evaluate it either; says both reasons.
    """
    shape = (problem.B, problem.H, problem.rows, problem.columns)
    any_seen = torch.zeros(shape, dtype=torch.bool, device=problem.device)
    all_seen = torch.ones_like(any_seen)
    for b, h, q, kv in _tiles(problem):
        mask = _vmapped(mask_mod, (b, h, q, kv), problem.device, reason)
        some, every = _by_block(mask, problem.block)
        place = (
            slice(b.start, b.stop),
            slice(h.start, h.stop),
            slice(q.start // problem.block[0], -(-q.stop // problem.block[0])),
            slice(kv.start // problem.block[1], -(-kv.stop // problem.block[1])),
        )
        any_seen[place] |= some
        all_seen[place] &= every
    return any_seen, all_seen


def _tiles(problem: Lengths) -> Iterator[tuple[range, ...]]:
    """Boxes of b, h, q_idx and kv_idx, of at most the budget in int64; none holds more of a block than whole ones."""
    room = BUDGET // 8
    ranges: list[list[range]] = []
    for size, block in (
        (problem.kv_len, problem.block[1]),
        (problem.q_len, problem.block[0]),
        (problem.H, 1),
        (problem.B, 1),
    ):
        ranges.insert(0, _pieces(size, block, room))
        room = max(1, room // max(map(len, ranges[0]), default=1))
    yield from itertools.product(*ranges)


def _pieces(size: int, block: int, room: int) -> list[range]:
    """Consecutive pieces of at most ``room``: of as many blocks as fit, or each of a part of one block."""
    if room >= block:
        step = room // block * block
        return [range(start, min(start + step, size)) for start in range(0, size, step)]
    return [
        range(start, min(start + room, first + block, size))
        for first in range(0, size, block)
        for start in range(first, min(first + block, size), room)
    ]


def _vmapped(
    mask_mod: Callable[..., Any], box: tuple[range, ...], device: torch.device, reason: Exception
) -> Tensor:
    b0, h0, q0, kv0 = (part.start for part in box)

    def moved(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Any:
        return mask_mod(b + b0, h + h0, q_idx + q0, kv_idx + kv0)

    B, H, q_len, kv_len = (len(part) for part in box)
    try:
        mask: Any = create_mask(moved, B, H, q_len, kv_len, device)
    except (RuntimeError, IndexError, ValueError) as error:
        raise InvalidProblem(
            f"mask_mod can be evaluated neither by torchhal nor by torch. {reason}\ntorch.vmap: {error}"
        ) from error
    if not isinstance(mask, Tensor):
        raise InvalidProblem(f"mask_mod has to return one scalar bool and returns a {type(mask).__name__}")
    if mask.dim() != 4 or mask.dtype is not torch.bool:
        raise InvalidProblem(
            f"mask_mod has to return a scalar bool and returns {mask.dtype} of shape {tuple(mask.shape[4:])}; "
            "compare, or convert with .bool()"
        )
    return mask


def _by_block(mask: Tensor, block: tuple[int, int]) -> Ends:
    """Any and all over blocks, the first of which begins at the mask's corner; what is beyond the mask is False."""
    rows, columns = (min(size, length) for size, length in zip(block, mask.shape[2:], strict=True))
    q, kv = -(-mask.shape[2] // rows), -(-mask.shape[3] // columns)
    padded = mask.new_zeros(*mask.shape[:2], q * rows, kv * columns)
    padded[:, :, : mask.shape[2], : mask.shape[3]] = mask
    tiles = padded.view(*mask.shape[:2], q, rows, kv, columns).transpose(3, 4).flatten(4)
    return tiles.any(-1), tiles.all(-1)
