"""Fused matrix product: the public functions, the one place their Problem is built, and the eager path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchhal import scope
from torchhal._caches import fast_cache
from torchhal._matmul_checks import captured_fault, operand_fault, out_dtype_fault, shape_fault, type_fault
from torchhal.errors import InvalidProblem
from torchhal.operands import GGUFWeight, MatmulOperands, Packed, PackedWeight
from torchhal.pointwise import Captured, capture_cached
from torchhal.problems import MatmulProblem
from torchhal.registry import blame
from torchhal.selection import Selected, is_traced, select

INDICES = tuple((name, torch.int32) for name in ("batch", "row", "col"))

_plans: dict[tuple[object, ...], Selected] = fast_cache()


class Functions(NamedTuple):
    """The captured user functions of one call."""

    a_prologue: Captured | None = None
    b_prologue: Captured | None = None
    epilogue: Captured | None = None


NO_FUNCTIONS = Functions()


class Call(NamedTuple):
    """Everything one matmul call says, after user functions were captured."""

    a: Tensor
    b: Tensor | Packed
    bias: Tensor | None = None
    functions: Functions = NO_FUNCTIONS
    out_dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    backend: str | None = None
    fused: bool = False
    """Whether a plan that leaves something unfused counts as declined."""


def matmul(
    a: Tensor,
    b: Tensor | Packed,
    *,
    bias: Tensor | None = None,
    a_prologue: Callable[..., Tensor] | None = None,
    b_prologue: Callable[..., Tensor] | None = None,
    epilogue: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
    out_dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    backend: str | None = None,
    fusion: str = "report",
) -> Tensor | tuple[Tensor, ...]:
    """``epilogue(a_prologue(a) @ b_prologue(b) + bias)`` in one pass, on the best backend there is.

    The user functions are pointwise. Each takes ``(value)`` or ``(value, batch, row, col)``, told apart by the number
    of parameters without a default; indices are int32 and count in the operand the function applies to,
    ``batch`` in the flattened broadcast batch. Values are float32 (float64 where a or b is float64): prologues
    see each element widened, the epilogue the accumulated sum plus bias before it is rounded. Functions may
    read captured tensors by index, such as ``residual[row, col]``, and 0-dim ones as they are.

    Args:
        a: (..., M, K) or (K,), floating point, any strides.
        b: (..., K, N) or (K,), or a packed weight of shape (K, N), from :func:`pack_weight` or
            :func:`gguf_weight`. Batch dimensions broadcast, and vectors are treated, as in ``torch.matmul``.
        bias: (N,), in the type of ``a`` or ``b`` or in float32.
        a_prologue: applied to each element of ``a``.
        b_prologue: applied to each element of ``b``.
        epilogue: applied to each element of the result; may return a tuple.
        out_dtype: floating type of the results, or a tuple with one for each; by default floating results have
            the promoted type of ``a`` and ``b``, and others (a comparison) their own.
        backend: name of the backend to use; overrides every other choice.
        fusion: what happens where a backend does a prologue, the bias, the epilogue or the dequantisation of ``b`` in
            a pass of its own instead of inside the product: ``"report"`` names it in the Route, ``"require"`` counts
            it as declined, with a code such as ``unfused_epilogue``, so that the next backend is asked.

    Returns:
        (..., M, N); a tuple of such tensors if ``epilogue`` returns a tuple. Accumulated in float32 or
        wider and rounded once; autocast does not change it. Where K = 0 the sum is 0.

    Raises:
        InvalidProblem: operands that mean nothing together; the message says which.
        CaptureError: a user function does something that is not pointwise.
        Unsupported: nobody the policy allows can serve the call; carries each backend's reason.
    """
    if torch.compiler.is_dynamo_compiling():
        from torchhal import compiled

        return compiled.matmul(a, b, bias, a_prologue, b_prologue, epilogue, out_dtype, backend, fusion)  # type: ignore[no-any-return]
    fused = fusion != "report" and is_required(fusion)
    functions = NO_FUNCTIONS
    if a_prologue is not None or b_prologue is not None or epilogue is not None:
        fault = operand_fault(a, b, bias)
        if fault:
            raise InvalidProblem(fault)
        functions = capture_functions(element_dtype(a, b), a_prologue, b_prologue, epilogue)
    return run(Call(a, b, bias, functions, out_dtype, backend, fused))


def is_required(fusion: object) -> bool:
    """Whether this ``fusion`` of :func:`matmul` refuses what is not fused.

    Raises:
        InvalidProblem: it is neither ``"report"`` nor ``"require"``.
    """
    if not isinstance(fusion, str) or fusion not in ("report", "require"):
        raise InvalidProblem(f'fusion expects "report" or "require" and got {fusion!r}')
    return fusion == "require"


def pack_weight(
    weight: Tensor,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
    transposed: bool = False,
) -> PackedWeight:
    """Quantise a weight once, for :func:`matmul` to multiply by many times.

    Each group of a column has its own float32 scale; values are rounded to the nearest of ``2**bits`` steps
    (one fewer if symmetric), so no element moves by more than half a step. A step is the group's range, which
    always contains 0, over the number of steps; 0 stays exactly 0.

    Args:
        weight: (K, N), floating and finite; or with ``transposed`` (N, K), as ``nn.Linear.weight`` is.
        bits: 8 or 4; two int4 values share a byte.
        group: rows that share a scale, 32, 64 or 128; None for the whole column.
        symmetric: no zero point: the range is as wide below 0 as above.
        transposed: ``weight`` is (N, K).

    Returns:
        The packed weight, of logical shape (K, N) whatever ``transposed`` says.

    Raises:
        InvalidProblem: not a finite floating matrix, or an unknown ``bits`` or ``group``.
    """
    from torchhal.reference.packing import pack_weight as pack

    return pack(weight, bits=bits, group=group, symmetric=symmetric, transposed=transposed)


def gguf_weight(data: Any, kind: str, *, dtype: torch.dtype = torch.float32) -> GGUFWeight:
    """A weight whose blocks come from a GGUF file, for :func:`matmul` to multiply by as they are, without requantising.

    With the ``gguf`` package: ``gguf_weight(t.data, t.tensor_type.name.lower())`` for a tensor ``t`` of a ``GGUFReader``.

    Args:
        data: (N, K / 32 * bytes of a block) uint8, a tensor or a numpy array. A tensor and an array that may be written to
            share their memory with the weight; an array that may not, such as a reader's map of its file, is copied.
        kind: ``q4_0``, ``q4_1`` or ``q8_0``; :class:`torchhal.operands.GGUFWeight` has the layouts.
        dtype: floating type that the weight stands for: with the type of ``a`` it makes that of a product. Its elements
            are never rounded to it.

    Returns:
        The weight, of logical shape (K, N): as a packed ``nn.Linear.weight`` that is (N, K).

    Raises:
        InvalidProblem: another kind of block, or data that are no rows of whole blocks.
    """
    from torchhal.reference.packing import gguf_weight as wrap

    return wrap(data, kind, dtype)


# ---------------------------------------------------------------------------- the eager path


def run(call: Call) -> Tensor | tuple[Tensor, ...]:
    """Serve a call whose functions are captured."""
    a, b, bias, functions, *_ = call
    rows, columns, selected = _prepare(call)
    selected.record()
    left = a.unsqueeze(0) if rows == 1 else a
    right = b.unsqueeze(-1) if columns == 1 and isinstance(b, Tensor) else b
    outputs = _dispatch(selected, left, right, bias, operands_of(functions))
    if rows == 1 or columns == 1:
        outputs = tuple(_squeeze(o, rows == 1, columns == 1) for o in outputs)
    return outputs if returns_tuple(functions) else outputs[0]


def _prepare(call: Call) -> tuple[int, int, Selected]:
    """Ranks of ``a`` and ``b`` and the selection. Shapes are checked on every call, the rest for each new key."""
    a, b, bias, *_ = call
    try:
        left, right = a.shape, b.shape
        rows, columns = len(left), len(right)
        plain = bias is None and rows == 2 and columns == 2 and left[1] == right[0]
        fault = (
            ""
            if plain
            else shape_fault(left, right, None if bias is None else bias.shape, isinstance(b, Packed))
        )
        key = _key(call)
    except (AttributeError, IndexError, RuntimeError):
        fault = operand_fault(*call[:3])
        if not fault:
            raise
    if fault:
        raise InvalidProblem(fault)
    selected = _plans.get(key)
    if selected is None:
        selected = _plans[key] = choose(call)
    return rows, columns, selected


def _dispatch(
    selected: Selected,
    a: Tensor,
    b: Tensor | Packed,
    bias: Tensor | None,
    operands: MatmulOperands | None,
) -> tuple[Tensor, ...]:
    """Run the chosen plan on operands of at least two dimensions."""
    assert selected.plan is not None and selected.run is not None
    if is_traced(a) and not selected.plan.traceable:
        from torchhal import chains, ops_families

        recorded = chains.record(selected, a, b, bias, operands) if isinstance(b, Packed) else None
        if recorded is not None:
            return recorded
        return ops_families.matmul(selected.route, a, b, bias, operands)
    try:
        return selected.run(a, b, bias, operands)  # type: ignore[no-any-return]
    except Exception as error:
        blame(error, selected.route.chosen)
        raise


def choose(call: Call) -> Selected:
    """The selection for a call, from its Problem."""
    return select(build_problem(call), call.backend, fused=call.fused)


def _key(call: Call) -> tuple[object, ...]:
    """Whatever :func:`build_problem` reads of a call: equal keys give equal problems."""
    a, b, bias, functions, out_dtype, backend, fused = call
    if isinstance(b, Packed):
        weight: tuple[object, ...] = (b.scheme,)
    else:
        weight = (b.dim() > 2, b.layout, b.is_nested, b.requires_grad)
    added = None if bias is None else (bias.dtype, bias.device, bias.requires_grad)
    captured = None if functions is NO_FUNCTIONS else tuple(_function_key(f) for f in functions)
    return (
        a.dtype, b.dtype, a.device, b.device, a.dim() > 2, a.layout, a.is_nested, a.requires_grad, weight, added, captured,
        out_dtype, torch.is_grad_enabled(), backend, fused, scope.current.state,
    )  # fmt: skip


def _function_key(function: Captured | None) -> object:
    return (
        None
        if function is None
        else (function.graph, *((t.device, t.requires_grad) for t in function.tensors))
    )


def _learns(b: Tensor | Packed) -> bool:
    return isinstance(b, Tensor) and b.requires_grad


def _squeeze(out: Tensor, row: bool, column: bool) -> Tensor:
    out = out.squeeze(-1) if column else out
    return out.squeeze(-1 if column else -2) if row else out


def operands_of(functions: Functions) -> MatmulOperands | None:
    """The captured tensors of a call's functions; None where there are no functions."""
    if functions is NO_FUNCTIONS:
        return None
    return MatmulOperands(*(() if f is None else tuple(f.tensors) for f in functions))


# ---------------------------------------------------------------------------- the problem


def build_problem(call: Call) -> MatmulProblem:
    """The Problem of a call, checked.

    Raises:
        InvalidProblem: the call means nothing on any backend.
    """
    a, b, bias, functions, out_dtype, *_ = call
    shape = None if bias is None else bias.shape
    fault = (
        operand_fault(a, b, bias)
        or shape_fault(a.shape, b.shape, shape, isinstance(b, Packed))
        or type_fault(a, b, bias)
    )
    for name, function in functions._asdict().items():
        fault = fault or captured_fault(name, () if function is None else function.tensors, a.device)
    if fault:
        raise InvalidProblem(fault)
    graphs = {name: None if f is None else f.graph for name, f in functions._asdict().items()}
    return MatmulProblem(
        device=a.device,
        features=frozenset(_features(call)),
        a_dtype=a.dtype,
        b_dtype=b.dtype,
        out_dtypes=_out_dtypes(a, b, functions.epilogue, out_dtype),
        bias_dtype=None if bias is None else bias.dtype,
        packing=b.scheme if isinstance(b, Packed) else None,
        **graphs,
    )


def _features(call: Call) -> list[str]:
    a, b, bias, functions, *_ = call
    bits = b.bits if isinstance(b, PackedWeight) else None
    captured = [t for f in functions if f is not None for t in f.tensors]
    grad = torch.is_grad_enabled()
    asked = {
        "batched": a.dim() > 2 or len(b.shape) > 2,
        "bias": bias is not None,
        "a_prologue": functions.a_prologue is not None,
        "b_prologue": functions.b_prologue is not None,
        "epilogue": functions.epilogue is not None,
        "auxiliary_outputs": functions.epilogue is not None and len(functions.epilogue.graph.outputs) > 1,
        "captured_tensors": bool(captured),
        "packed_int8": bits == 8,
        "packed_int4": bits == 4,
        "packed_gguf": isinstance(b, GGUFWeight),
        "mixed_dtypes": a.dtype != b.dtype,
        "backward": grad and (a.requires_grad or _learns(b) or (bias is not None and bias.requires_grad)),
        "captured_gradient": grad and any(t.requires_grad for t in captured),
    }
    return [name for name, wanted in asked.items() if wanted]


def _out_dtypes(
    a: Tensor,
    b: Tensor | Packed,
    epilogue: Captured | None,
    out_dtype: torch.dtype | tuple[torch.dtype, ...] | None,
) -> tuple[torch.dtype, ...]:
    found = (element_dtype(a, b),) if epilogue is None else epilogue.graph.output_dtypes
    if out_dtype is None:
        main = _promoted(a.dtype, b.dtype)
        return tuple(main if dtype.is_floating_point else dtype for dtype in found)
    fault = out_dtype_fault(out_dtype, len(found))
    if fault:
        raise InvalidProblem(fault)
    return out_dtype if isinstance(out_dtype, tuple) else (out_dtype,) * len(found)


def _promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    try:
        return torch.promote_types(a, b)
    except RuntimeError as error:  # torch has no promotion for 8-bit floats
        raise InvalidProblem(
            f"{a} and {b} have no common type in torch; say the result's with out_dtype="
        ) from error


# ---------------------------------------------------------------------------- user functions


def element_dtype(a: Tensor, b: Tensor | Packed) -> torch.dtype:
    """The type values have inside the functions: float32, or float64 where an operand is."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def capture_functions(
    dtype: torch.dtype,
    a_prologue: Callable[..., Any] | None,
    b_prologue: Callable[..., Any] | None,
    epilogue: Callable[..., Any] | None,
) -> Functions:
    """Capture the functions of one call; ``dtype`` is :func:`element_dtype`."""
    named = {"a_prologue": a_prologue, "b_prologue": b_prologue, "epilogue": epilogue}
    captured = Functions(
        **{name: None if fn is None else _capture(name, fn, dtype) for name, fn in named.items()}
    )
    for name in ("a_prologue", "b_prologue"):
        function = getattr(captured, name)
        if function is not None and function.structure == "tuple":
            raise InvalidProblem(
                f"{name} returns a tuple of {len(function.graph.outputs)}; only an epilogue may return a tuple"
            )
    return captured


def _capture(name: str, fn: Callable[..., Any], dtype: torch.dtype) -> Captured:
    if not callable(fn):
        raise InvalidProblem(
            f"{name} expects a function of (value) or (value, batch, row, col) and got {type(fn).__name__}"
        )
    count = _parameters(fn)
    if count not in (1, 4):
        raise InvalidProblem(
            f"{name} takes (value) or (value, batch, row, col), 1 or 4 parameters without a default; it has {count}"
        )
    return capture_cached(fn, (("value", dtype), *INDICES)[:count], what=name)


def _parameters(fn: Callable[..., Any]) -> int:
    if type(fn) is FunctionType and not fn.__code__.co_flags & inspect.CO_VARARGS:
        return fn.__code__.co_argcount - len(fn.__defaults__ or ())
    try:
        parameters = inspect.signature(
            fn.forward if isinstance(fn, torch.nn.Module) else fn
        ).parameters.values()
    except ValueError:  # a torch builtin such as torch.relu
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def returns_tuple(functions: Functions) -> bool:
    """Whether the call's result is a tuple."""
    return functions.epilogue is not None and functions.epilogue.structure == "tuple"
