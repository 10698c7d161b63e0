"""Reductions over lists of tensors: sums, norms and checks, each one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.foreach import Policy, serve
from torchhal.reference.foreach import reduce

REDUCTIONS: Final = ("sum", "max", "any")


def foreach_reduce(
    fn: Callable[..., Any],
    *operands: Any,
    reduction: str = "sum",
    total: bool = False,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """One number for each position of the lists: what the elements of ``fn``'s result there come to.

    Nothing of the size of an operand is ever written. Sums are taken in float64, in an order that depends neither on the
    number of threads nor on the run, and rounded once: to float64 if ``fn`` gives that, float32 for other floats, int64
    for integers and truth values.

    Args:
        fn: as for :func:`torchhal.foreach_map`.
        operands: as for :func:`torchhal.foreach_map`.
        reduction: ``sum``; ``max``, the largest element, NaN if there is one, -inf (the smallest integer) of an empty
            tensor; ``any``, whether an element is not 0.
        total: True for one number for all positions together, computed from theirs in the order of the lists.
        backend: name of the backend to use; overrides every other choice.
        kwargs: passed to ``fn``.

    Returns:
        A list of 0-dim tensors, or with ``total`` one of them; a tuple of those if ``fn`` returns a tuple. Of empty lists
        ``[]``, and as a total float32 0 or -inf, or False.

    Raises:
        InvalidProblem: an unknown reduction, ``out``, or operands that :func:`torchhal.foreach_map` refuses.
        CaptureError: ``fn`` is not pointwise.
        Unsupported: nobody the policy allows can serve the call; carries each backend's reason.
    """
    if reduction not in REDUCTIONS:
        known = ", ".join(REDUCTIONS)
        raise InvalidProblem(f"foreach_reduce knows the reductions {known}, and got {reduction!r}")
    if "out" in kwargs:
        raise InvalidProblem(
            "foreach_reduce returns new tensors and takes no out; copy them where you want them"
        )
    if torch.compiler.is_dynamo_compiling():
        from torchhal import compiled

        found = compiled.foreach_map(fn, operands, backend, kwargs, reduction)
    else:
        found = serve(fn, operands, None, kwargs, Policy(backend, reduction=reduction))
    if not total:
        return found
    return (
        tuple(_total(o, reduction) for o in found) if isinstance(found, tuple) else _total(found, reduction)
    )


def _total(parts: Sequence[Tensor], reduction: str) -> Tensor:
    if parts and len({part.dtype for part in parts} | {part.device for part in parts}) > 2:
        # Integers exactly, in the widest of their types.
        floating = any(part.dtype.is_floating_point for part in parts)
        dtype, device = torch.float64 if floating else parts[0].dtype, parts[0].device
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        parts = [part.to(device, dtype) for part in parts]
    return reduce(torch.stack(tuple(parts)) if parts else torch.empty(0), reduction)


def foreach_norm(
    tensors: Sequence[Tensor], ord: float = 2.0, *, total: bool = False, backend: str | None = None
) -> Any:
    """The norm of each tensor, or of all their elements together, in one pass.

    Args:
        tensors: floating, of any shapes and types.
        ord: 1, 2 or infinity.
        total: True for the norm of all elements.
        backend: name of the backend to use; overrides every other choice.

    Returns:
        A list of 0-dim tensors, float64 for float64 tensors and float32 for others (for infinity, the tensor's own
        type), or one of them. Sums are taken as by :func:`foreach_reduce`. Of nothing it is 0.

    Raises:
        InvalidProblem: another ``ord``, or tensors that are not floating.
    """
    fn = _POWERS.get(float(ord))
    if fn is None:
        raise InvalidProblem(f"foreach_norm knows the orders 1, 2 and inf, and got {ord}")
    if any(not tensor.dtype.is_floating_point for tensor in tensors):
        kinds = ", ".join(sorted({str(t.dtype) for t in tensors if not t.dtype.is_floating_point}))
        raise InvalidProblem(f"foreach_norm expects floating tensors and got {kinds}; convert them")
    reduction = "max" if ord == float("inf") else "sum"
    found = foreach_reduce(fn, tensors, reduction=reduction, total=total, backend=backend)
    if reduction == "max":  # of an empty tensor -inf
        return found.clamp_min(0) if total else [norm.clamp_min(0) for norm in found]
    if ord == 1:
        return found
    return torch.sqrt(found) if total else list(torch._foreach_sqrt(found)) if found else []


def foreach_any_nonfinite(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Whether any element of any tensor is infinite or NaN, in one pass.

    Args:
        tensors: of any shapes and types.
        backend: name of the backend to use; overrides every other choice.

    Returns:
        A 0-dim truth value.
    """
    found = foreach_reduce(_is_nonfinite, tensors, reduction="any", total=True, backend=backend)
    assert isinstance(found, Tensor)
    return found


def _is_nonfinite(x: Any) -> Any:
    return torch.logical_not(torch.isfinite(x))


def _square(x: Any) -> Any:
    # In float32 at least, as torch's norms; squares of 16-bit values would be rounded, and overflow.
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x * x


_POWERS: Final[dict[float, Callable[[Any], Any]]] = {1.0: torch.abs, 2.0: _square, float("inf"): torch.abs}
