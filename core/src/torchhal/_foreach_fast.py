"""The common foreach_map call recognised in one pass: lists of one type and device, shapes equal at each position.

:func:`glance` sees less, in a time that does not grow with the lists: enough for plans that look at tensors themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchhal.operands import PLAIN

_SCALAR = torch.Size(())


def glance(operands: Sequence[Any], out: Any) -> tuple[object, ...] | None:
    """What the first tensors of a call's lists say of it; None where that can not be enough.

    Calls that a plan serves directly and that have equal glances are served by the same plan.
    """
    parts: list[object] = []
    for operand in operands:
        kind = type(operand)
        if kind is float:
            parts.append(float)
        elif kind is Tensor:
            if operand.dim():
                return None
            parts.append(operand.dtype)
        elif (kind is list or kind is tuple) and operand:
            first = operand[0]
            if type(first) is not float and type(first) not in PLAIN:
                return None
            if type(first) is not float and not first.dim():  # promotes in a way of its own
                return None
            parts.append((first.dtype, first.device) if isinstance(first, Tensor) else list)
        else:
            return None
    lists = written_lists(out)
    if lists is None:
        return None
    return len(lists), *parts


def written_lists(out: Any) -> tuple[Any, ...] | None:
    """``out`` as lists, at first sight: none of them, one, or several; None where it is something else."""
    if out is None:
        return ()
    if not isinstance(out, (list, tuple)) or not out:
        return None
    if isinstance(out[0], Tensor):
        return (out,)
    return tuple(out) if all([type(items) is list or type(items) is tuple for items in out]) else None  # noqa: C419


def one_length(operands: Sequence[Any], lists: Sequence[Sequence[Any]]) -> bool:
    """Whether all lists among operands and destinations have one length."""
    lengths = {len(entry) for entry in operands if type(entry) is list or type(entry) is tuple}
    return len(lengths | {len(items) for items in lists}) == 1


def learns(operands: Sequence[Any], lists: Sequence[Sequence[Any]]) -> bool:
    """Whether gradients are recorded and an operand or destination asks for them."""
    if not torch.is_grad_enabled():
        return False
    # Twenty times as quick as asking each tensor.
    return torch._C._any_requires_grad(
        *(*operands, *[items for items in lists if not _among(items, operands)])
    )


def _among(items: Any, operands: Sequence[Any]) -> bool:
    return any([operand is items for operand in operands])  # noqa: C419 (a list is quicker)


def signature(operands: Sequence[Any], grad: bool) -> tuple[object, ...] | None:
    """:func:`_signature`, None also where shapes can not be read (a nested tensor)."""
    try:
        return _signature(operands, grad)
    except RuntimeError:
        return None


def _signature(operands: Sequence[Any], grad: bool) -> tuple[object, ...] | None:
    """What the plan of a common call depends on in its operands; None for a call that is not of the common kind.

    Equal signatures mean equal graphs, one device, dense tensors of at least one dimension, lists of one length,
    equal shapes at each position, and the same operands that ask for gradients if ``grad``.
    """
    parts: list[object] = []
    lengths: set[int] = set()
    devices: set[torch.device] = set()
    shapes: list[torch.Size] | None = None
    for operand in operands:
        kind = type(operand)
        if kind is float:
            parts.append(float)
        elif kind is Tensor:
            if operand.shape != _SCALAR or operand.layout is not torch.strided:
                return None
            devices.add(operand.device)
            parts.append((operand.dtype, grad and operand.requires_grad))
        elif kind is list or kind is tuple:
            lengths.add(len(operand))
            types = set(map(type, operand))
            if types == {float}:
                parts.append(list)
                continue
            if not types <= PLAIN:
                return None
            found = [t.shape for t in operand]
            if shapes is None:
                shapes = found
            elif found != shapes:
                return None
            dtypes, layouts = {t.dtype for t in operand}, {t.layout for t in operand}
            if len(dtypes) != 1 or layouts != {torch.strided}:
                return None
            devices |= {t.device for t in operand}
            parts.append((list, dtypes.pop(), grad and any([t.requires_grad for t in operand])))  # noqa: C419 (a list is quicker)
        else:
            return None
    if shapes is None or len(lengths) != 1 or len(devices) != 1 or _SCALAR in shapes:
        return None
    return devices.pop(), *parts


def plainly_disjoint(written: Sequence[Tensor], operands: Sequence[Any]) -> bool:
    """Whether contiguous tensors that share nothing are all there is; False where a closer look is needed."""
    lists = [
        written,
        *(
            o
            for o in operands
            if o is not written and isinstance(o, (list, tuple)) and isinstance(o[0], Tensor)
        ),
    ]
    tensors = [tensor for items in lists for tensor in items] + [o for o in operands if isinstance(o, Tensor)]
    if not all([t.is_contiguous() for t in tensors]):  # noqa: C419
        return False
    spans = sorted(zip([t.data_ptr() for t in tensors], [t.nbytes for t in tensors], strict=True))
    return all([start + size <= following for (start, size), (following, _) in pairwise(spans)])  # noqa: C419
