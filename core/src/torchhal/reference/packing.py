"""The specification of packed weights: int8 and int4, rounded to nearest in groups of a column, and blocks of GGUF files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import GGUF_BLOCK_ELEMENTS, GGUF_BLOCKS, GGUFWeight, Packed, PackedWeight

GROUPS = (None, 32, 64, 128)
_TINY = torch.finfo(torch.float32).tiny


def pack_weight(
    weight: Tensor,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
    transposed: bool = False,
) -> PackedWeight:
    """See :func:`torchhal.pack_weight`."""
    _validate(weight, bits, group)
    matrix = weight.detach().t() if transposed else weight.detach()
    rows, columns = matrix.shape
    size = max(1, min(group or rows, rows))
    blocks = _blocks(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), size)
    scale, zero = _symmetric(blocks, bits) if symmetric else _asymmetric(blocks, bits)
    _refuse_overflow(scale)
    offset = 0.0 if zero is None else zero.unsqueeze(1)
    low, high = _limits(bits)
    steps = torch.round(blocks / scale.unsqueeze(1) + offset).clamp(-high if zero is None else low, high)
    q = steps.to(torch.int8).flatten(0, 1)[:rows]
    q = q.contiguous()  # along rows, as backends read it: else each of their calls would copy it
    data = q if bits == 8 else _pair(q)
    return PackedWeight(data, scale, zero, bits, size, (rows, columns), weight.dtype)


def gguf_weight(data: Any, kind: str, dtype: torch.dtype) -> GGUFWeight:
    """See :func:`torchhal.gguf_weight`."""
    if isinstance(data, Tensor):
        return GGUFWeight(data, kind, dtype)
    if not (hasattr(data, "__array_interface__") and str(data.dtype) == "uint8"):
        got = f"{type(data).__name__} {getattr(data, 'dtype', '')}".strip()
        raise InvalidProblem(
            f"gguf_weight() expects a uint8 tensor or numpy array (N, bytes of a row); got {got}"
        )
    # torch has no read-only tensors: writing to one over a file that was mapped for reading would end the process.
    return GGUFWeight(torch.from_numpy(data if data.flags.writeable else data.copy()), kind, dtype)


def unpack(packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (K, N) that ``packed`` stands for.

    Args:
        packed: the packed weight.
        dtype: floating type of the result, ``packed.dtype`` if None. The element is computed in float32
            (float64 for float64) and rounded once.
    """
    wanted = dtype or packed.dtype
    compute = torch.float64 if wanted == torch.float64 else torch.float32
    if isinstance(packed, GGUFWeight):
        return _unpack_blocks(packed, compute).to(wanted)
    q = (packed.data if packed.bits == 8 else _unpair(packed)).to(compute)
    if packed.zero is not None:
        q = q - _per_row(packed, packed.zero)
    return (q * _per_row(packed, packed.scale)).to(wanted)


def unpack_columns(packed: Packed, columns: Tensor) -> Tensor:
    """The columns (K, n) of the weight that are named by ``columns``, (n,) whole numbers; nothing else is dequantised.

    Raises:
        RuntimeError: there is no such column.
    """
    if isinstance(packed, GGUFWeight):
        return unpack(replace(packed, data=packed.data.index_select(0, columns)))
    chosen = replace(
        packed,
        data=packed.data.index_select(1, columns),
        scale=packed.scale.index_select(1, columns),
        zero=None if packed.zero is None else packed.zero.index_select(1, columns),
        shape=(packed.shape[0], columns.shape[0]),
    )
    return unpack(chosen)


def _validate(weight: Tensor, bits: int, group: int | None) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise InvalidProblem(
            f"pack_weight() expects a matrix, (K, N) or with transposed=True (N, K); got {got}"
        )
    if not weight.dtype.is_floating_point:
        raise InvalidProblem(f"pack_weight() expects a floating weight; got {weight.dtype}")
    if bits not in (8, 4):
        raise InvalidProblem(f"pack_weight() expects bits=8 or bits=4; got bits={bits!r}")
    if group not in GROUPS:
        raise InvalidProblem(
            f"pack_weight() expects group to be one of {GROUPS}, None for a whole column; got group={group!r}"
        )
    if not bool(torch.isfinite(weight).all()):
        where = tuple(int(i) for i in (~torch.isfinite(weight)).nonzero()[0])
        raise InvalidProblem(
            f"pack_weight() expects finite values; the weight has {weight[where].item()} at {where}"
        )


def _refuse_overflow(scale: Tensor) -> None:
    if not bool(torch.isfinite(scale).all()):
        raise InvalidProblem(
            "pack_weight() keeps scales in float32, which the largest values of this weight exceed; scale it down first"
        )


def _limits(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _blocks(matrix: Tensor, size: int) -> Tensor:
    # The last group is filled with zeros: they never widen a range, because every range contains zero.
    rows, columns = matrix.shape
    groups = -(-rows // size)
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, groups * size - rows))
    return padded.reshape(groups, size, columns)


def _symmetric(blocks: Tensor, bits: int) -> tuple[Tensor, None]:
    _, high = _limits(bits)
    return _step(blocks.abs().amax(1), high), None


def _asymmetric(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    # The range always contains 0 and the zero point is whole: then 0 is exact, |zero| stays small, and the
    # ends of the range lie at most half a step outside the integers.
    low, high = _limits(bits)
    bottom, top = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    scale = _step(top - bottom, high - low)
    zero = torch.round(low - bottom / scale).clamp(low, high)
    return scale, zero.to(torch.float32)


def _step(span: Tensor, steps: int) -> Tensor:
    # A subnormal scale has too few digits for half a step of error; an all-zero group needs any scale but 0.
    scale = (span / steps).to(torch.float32)
    scale = torch.where(
        (scale * steps).isinf() & scale.isfinite(), torch.nextafter(scale, torch.zeros_like(scale)), scale
    )
    return torch.where(span == 0, 1.0, scale.clamp(min=_TINY))


def _pair(q: Tensor) -> Tensor:
    rows, columns = q.shape
    padded = torch.nn.functional.pad(q, (0, 0, 0, rows % 2))
    stored = (padded + 8).to(torch.uint8).reshape((rows + 1) // 2, 2, columns)
    return stored[:, 0] | (stored[:, 1] << 4)


def _unpair(packed: PackedWeight) -> Tensor:
    both = torch.stack((packed.data & 15, packed.data >> 4), dim=1)
    return both.flatten(0, 1)[: packed.shape[0]].to(torch.int8) - 8


def _unpack_blocks(packed: GGUFWeight, compute: torch.dtype) -> Tensor:
    rows, columns = packed.shape
    layout = GGUF_BLOCKS[packed.kind]
    blocks = packed.data.reshape(columns, rows // GGUF_BLOCK_ELEMENTS, layout.size)
    numbers = 2 if layout.minimum else 1
    head = blocks[..., : 2 * numbers].contiguous().view(torch.float16).to(compute)
    stored = blocks[..., 2 * numbers :]
    if layout.bits == 8:
        q = stored.contiguous().view(torch.int8).to(compute)
    else:
        q = torch.cat((stored & 15, stored >> 4), -1).to(compute)
    if layout.minimum:
        elements = head[..., :1] * q + head[..., 1:]
    else:
        elements = head * (q if layout.bits == 8 else q - 8)
    return elements.reshape(columns, rows).t()


def _per_row(packed: PackedWeight, values: Tensor) -> Tensor:
    return values.repeat_interleave(packed.group, dim=0)[: packed.shape[0]]
