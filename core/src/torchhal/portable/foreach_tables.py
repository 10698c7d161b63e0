"""What the kernels of foreach read of a call: a row of addresses, sizes and strides for each position, and a list of chunks.

Both are uploaded from pinned memory without waiting, on the stream that reads them, and kept by what they say: a call on the
tensors of an earlier one uploads nothing. While a graph of the device is being captured, nothing that was kept is used
and nothing is kept: the upload itself becomes a part of the graph, from pinned memory that nobody writes to again, into
memory of the graph's own. So a graph depends on no table that an eager call may drop, and no eager call on one that only a
replay fills.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchhal.streams import is_capturing

MOST: Final = 64
"""Tables and chunk lists kept for one problem: of new results, addresses are new at every call. The stream that reads what is
dropped frees its memory in its turn."""
_ROOM: Final = 1 << 17
"""Words (int64) of pinned memory that are set aside for captures: 1 MiB."""


def upload(words: Tensor, device: torch.device) -> Tensor:
    """A copy of int64 ``words`` on a device, written by its current stream."""
    if device.type == "cpu":
        return words.clone()
    if is_capturing(device):
        pinned = _taken(words.numel())
    else:
        _reserve(words.numel())
        pinned = torch.empty(words.numel(), dtype=torch.int64, pin_memory=True)
    pinned.copy_(words.flatten())
    return torch.empty(words.shape, dtype=torch.int64, device=device).copy_(
        pinned.view(words.shape), non_blocking=True
    )


def chunks_of(sizes: Tensor, block: int) -> Tensor:
    """(chunks,) int64: two int32 for each program, its row and its block of ``block`` elements; of ``sizes`` (rows,) int64."""
    counts = (sizes + (block - 1)) // block
    rows = torch.repeat_interleave(counts)
    blocks = torch.arange(rows.numel()) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([rows, blocks], 1).to(torch.int32).view(torch.int64).flatten()


# ---------------------------------------------------------------------------- memory for captures


_arena: list[Tensor] = []
"""Pinned memory not yet given to a graph, in one piece."""
_given: list[Tensor] = []
"""What graphs read at every replay: theirs for good, for a graph does not say when it ends."""
_lock: Final = threading.Lock()


def _reserve(words: int) -> None:
    """See to it that a capture finds pinned memory: before torch 2.11 none can be allocated while it lasts."""
    with _lock:
        if not _arena or _arena[0].numel() < 4 * words:
            _arena[:] = [torch.empty(max(_ROOM, 16 * words), dtype=torch.int64, pin_memory=True)]


def _taken(words: int) -> Tensor:
    with _lock:
        if _arena and _arena[0].numel() >= words:
            found, _arena[0] = _arena[0][:words], _arena[0][words:]
        else:
            found = torch.empty(words, dtype=torch.int64, pin_memory=True)
        _given.append(found)
    return found


# ---------------------------------------------------------------------------- layouts

Layout = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Sizes, and each tensor's strides along them; no dimensions where all lie in memory alike, without gaps."""


@functools.lru_cache(maxsize=4096)
def layout(shape: torch.Size, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]]) -> Layout:
    """How the elements of a position are walked through, in as few dimensions as can be.

    Args:
        shape: of the result.
        shapes: of each tensor; those of operands may broadcast.
        strides: of each tensor.
    """
    steps = [_expanded(shape, own, stride) for own, stride in zip(shapes, strides, strict=True)]
    # The last tensor is written; its elements come in the order of its memory.
    order = sorted(
        (dim for dim, size in enumerate(shape) if size != 1), key=lambda dim: steps[-1][dim], reverse=True
    )
    sizes: list[int] = []
    walked: list[list[int]] = [[] for _ in steps]
    for dim in order:
        own = [step[dim] for step in steps]
        if sizes and all(w[-1] == step * shape[dim] for w, step in zip(walked, own, strict=True)):
            sizes[-1] *= shape[dim]
            for w, step in zip(walked, own, strict=True):
                w[-1] = step
        else:
            sizes.append(shape[dim])
            for w, step in zip(walked, own, strict=True):
                w.append(step)
    if not sizes or all(w == [1] for w in walked):
        return (), tuple(() for _ in steps)
    return tuple(sizes), tuple(map(tuple, walked))


def _expanded(shape: torch.Size, own: torch.Size, stride: tuple[int, ...]) -> list[int]:
    missing = len(shape) - len(own)
    return [0] * missing + [
        0 if size == 1 and wanted != 1 else step
        for size, step, wanted in zip(own, stride, shape[missing:], strict=True)
    ]
