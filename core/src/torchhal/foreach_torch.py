"""``torch._foreach_*`` calls as calls of :func:`torchhal.foreach_map`, where the two mean exactly the same.

What stays with torch, and why:

- reductions and products (``norm``, ``max``, ``powsum``, ``mm``) are not pointwise; ``lgamma`` is not in the language;
- ``addcmul``, ``lerp`` and ``add`` or ``sub`` with an ``alpha`` other than 1 are contracted by torch's kernels into
  fused multiply-adds, which round once where a pointwise graph rounds twice: results would differ in the last bit;
- numbers that torch's kernels round in a way of their own: an exponent that float32 can not hold (rounded for some
  elements and not for others), a factor that a half type can not hold, in place (rounded there and not
  out of place), and on devices other than the CPU, terms of half types and scaled ``addcdiv``;
- a bound (``clamp_min``, ``maximum``) or exponent beyond the range of a list's type, which is an error in torch;
- tensors that are not dense and floating, on several devices, of a subclass, or that share memory with a
  destination;
- everything torch refuses (lists that are empty or of different lengths), so that the error is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal._foreach_checks import arrange, check_shapes
from torchhal._foreach_fast import plainly_disjoint, signature
from torchhal._foreach_out import check_aliasing
from torchhal.errors import InvalidProblem
from torchhal.foreach import LEFT_TO_TORCH, Policy, serve

FLOATS: Final = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
DEFAULT: Final = Policy()
_RANGED: Final = (torch.clamp_min, torch.clamp_max, torch.maximum, torch.minimum, torch.pow)
"""Functions whose number torch's kernels convert to the list's type, and refuse if that overflows."""
_DENSE: Final = (Tensor, torch.nn.Parameter)


class ForeachCall(NamedTuple):
    """The call ``foreach_map(fn, *operands, out=out)``."""

    fn: Callable[..., Any]
    operands: tuple[Any, ...]
    out: Sequence[Tensor] | None
    """The first operand for an in-place function, else None."""

    def run(self, policy: Policy = DEFAULT) -> Any:
        """The result as torch returns it: a tuple of new tensors, or the list that was written to.

        ``LEFT_TO_TORCH`` where the policy says so; nothing has been written then.
        """
        result = serve(self.fn, self.operands, self.out, {}, policy)
        return tuple(result) if self.out is None and result is not LEFT_TO_TORCH else result


class Rule(NamedTuple):
    """How the arguments of one torch function are read."""

    fn: Callable[..., Any]
    second: tuple[str, ...] = ()
    """Names torch's overloads give the second operand; empty if there is none."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """Further keywords, each of which has to have this value."""
    shape: str = "binary"
    """``binary`` also for one operand, ``ternary``, ``power``."""
    scalar_fn: Callable[..., Any] | None = None
    """What computes with numbers, where that is another function."""
    tensor: bool = False
    """Whether the second operand may be a 0-dim tensor."""


def _addcdiv(input: Any, tensor1: Any, tensor2: Any, value: Any) -> Any:
    # torch's kernel multiplies first, in float32 for half types, and rounds once.
    if input.dtype in (torch.bfloat16, torch.float16):
        return (input.float() + value * tensor1.float() / tensor2.float()).to(input.dtype)
    return input + value * tensor1 / tensor2


def _copy(input: Any, src: Any) -> Any:
    return src.to(input.dtype)


_UNARY: Final = (
    "abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor", "frac", "log", "log10",
    "log1p", "log2", "neg", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
_OTHER: Final = ("other", "scalar", "scalars")
_ALPHA: Final = (("alpha", 1),)

_RULES: Final[dict[str, Rule]] = {
    **{name: Rule(getattr(torch, name)) for name in _UNARY},
    "add": Rule(torch.add, _OTHER, _ALPHA, tensor=True),
    "sub": Rule(torch.sub, _OTHER, _ALPHA),
    "mul": Rule(torch.mul, _OTHER, tensor=True),
    "div": Rule(torch.div, _OTHER, tensor=True),
    "clamp_min": Rule(torch.clamp_min, _OTHER),
    "clamp_max": Rule(torch.clamp_max, _OTHER),
    "maximum": Rule(torch.maximum, _OTHER, scalar_fn=torch.clamp_min),
    "minimum": Rule(torch.minimum, _OTHER, scalar_fn=torch.clamp_max),
    "pow": Rule(torch.pow, ("exponent",), shape="power"),
    "addcdiv": Rule(_addcdiv, ("value", "scalars"), shape="ternary"),
    "clone": Rule(torch.clone, fixed=(("memory_format", None),)),
    "zero_": Rule(torch.zeros_like),
    "copy_": Rule(_copy, ("src",), (("non_blocking", False),)),
}


def _table() -> dict[Any, tuple[Rule, bool]]:
    found: dict[Any, tuple[Rule, bool]] = {}
    for name, rule in _RULES.items():
        for spelled in (name,) if name.endswith("_") else (name, f"{name}_"):
            function = getattr(torch, f"_foreach_{spelled}", None)
            if function is not None:
                found[function] = (rule, spelled.endswith("_"))
    return found


TABLE: Final = _table()
"""Every translated torch function: how its arguments are read, and whether it works in place."""


def translate(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> ForeachCall | None:
    """The foreach_map call that means exactly ``func(*args, **kwargs)``; None where torch has to serve it.

    Args:
        func: a ``torch._foreach_*`` function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    entry = TABLE.get(func)
    if entry is None:
        return None
    rule, in_place = entry
    operands = _operands(rule, list(args), dict(kwargs))
    if operands is None:
        return None
    common = signature(operands, False) is not None
    if not all(_acceptable(rule, index, operand, common) for index, operand in enumerate(operands)):
        return None
    lists = [operand for operand in operands if _is_list_of_tensors(operand)]
    out = operands[0] if in_place else None
    if not lists or (out is not None and out is not lists[0]) or not _alike(rule, lists, common):
        return None
    if not _exact(rule, operands, in_place) or not _served(operands, out, common):
        return None
    fn = rule.fn if rule.scalar_fn is None or len(lists) > 1 else rule.scalar_fn
    return ForeachCall(fn, tuple(operands), out)


def _operands(rule: Rule, args: list[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    """The operands in order; None where an argument is missing, unknown, or has another value than it must."""
    names = [
        ("self",),
        *([("tensor1",), ("tensor2",)] if rule.shape == "ternary" else []),
        *([rule.second] if rule.second else []),
    ]
    for accepted in names[len(args) :]:
        given = [name for name in accepted if name in kwargs]
        if given:
            args.append(kwargs.pop(given[0]))
        elif accepted == ("value", "scalars"):
            args.append(1)
        else:
            return None
    if rule.second == ("src",) and len(args) == 3:  # the one keyword that may also be positional
        kwargs["non_blocking"] = args.pop()
    fixed = dict(rule.fixed)
    known = all(
        name in fixed and type(value) in (type(fixed[name]), float) and value == fixed[name]
        for name, value in kwargs.items()
    )
    return args if known and len(args) == len(names) else None


def _is_list_of_tensors(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) > 0 and isinstance(item[0], Tensor)


def _acceptable(rule: Rule, index: int, operand: Any, common: bool) -> bool:
    """Whether torch takes such an operand there, and it is dense and floating; ``common`` lists are alike throughout."""
    if isinstance(operand, Tensor):
        return rule.tensor and index == 1 and operand.dim() == 0 and _dense(operand)
    if _is_list_of_tensors(operand):
        return index < 3 and all(_dense(item) for item in (operand[:1] if common else operand))
    first_number = {"binary": 1, "ternary": 3, "power": 0}[rule.shape]
    if rule.second == ("src",) or index < first_number:
        return False
    numbers = operand if isinstance(operand, (list, tuple)) and index > 0 else [operand]
    return all(type(number) in (int, float) for number in numbers)


def _dense(tensor: Any) -> bool:
    return (
        type(tensor) in _DENSE
        and tensor.dtype in FLOATS
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _alike(rule: Rule, lists: Sequence[Sequence[Tensor]], common: bool) -> bool:
    lists = [items[:1] for items in lists] if common else lists
    if len({tensor.device for items in lists for tensor in items}) > 1:
        return False
    return rule.shape != "ternary" or len({tensor.dtype for items in lists for tensor in items}) == 1


def _exact(rule: Rule, operands: Sequence[Any], in_place: bool) -> bool:
    """Whether no number or 0-dim tensor is one that torch's kernels round in a way of their own."""
    first, last = operands[0], operands[-1]
    if isinstance(last, Tensor):  # torch gives the list's type even to 0-dim tensors, which promote otherwise
        return all(tensor.dim() or tensor.dtype == last.dtype for tensor in first)
    if not _is_list_of_tensors(first) or len(operands) == 1 or _is_list_of_tensors(last):
        return True
    numbers = last if isinstance(last, (list, tuple)) else [last]
    fits = rule.fn not in _RANGED or all(
        _in_range(dtype, number) for dtype in {t.dtype for t in first} for number in numbers
    )
    if (
        rule.shape == "power"
    ):  # the last few elements of a tensor are raised to the double, the others to the float32
        return fits and all(_holds(torch.float32, number) for number in numbers)
    if rule.shape == "ternary":
        return first[0].device.type == "cpu" or all(number == 1 for number in numbers)
    rounded = (rule.fn is torch.mul and in_place) or (
        rule.fn in (torch.add, torch.sub) and first[0].device.type != "cpu"
    )
    halves = {tensor.dtype for tensor in first} & {torch.bfloat16, torch.float16}
    return fits and (not rounded or all(_holds(dtype, number) for dtype in halves for number in numbers))


def _in_range(dtype: torch.dtype, number: float) -> bool:
    return not math.isfinite(number) or abs(number) <= torch.finfo(dtype).max


def _holds(dtype: torch.dtype, number: float) -> bool:
    return number != number or torch.tensor(number, dtype=dtype).item() == number


def _served(operands: Sequence[Any], written: Sequence[Tensor] | None, common: bool) -> bool:
    """Whether foreach_map takes these operands; what it refuses, torch may do in its own way."""
    if common and (written is None or plainly_disjoint(written, operands)):
        return True
    try:
        entries, _ = arrange(operands)
        equal = check_shapes(entries)
        if written is not None:
            check_aliasing(entries, [written])
    except InvalidProblem:
        return False
    return (
        equal
        or written is None
        or all(_covers(entries[0].content[i], entries, i) for i in range(len(written)))
    )


def _covers(destination: Tensor, entries: Sequence[Any], position: int) -> bool:
    shapes = [entry.content[position].shape for entry in entries if entry.how == "list"]
    return torch.Size(torch.broadcast_shapes(*shapes)) == destination.shape  # type: ignore[no-untyped-call]
