"""One attention call in any layout, after user functions were captured: its Problem, and how it is served."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import BlockMask

from torchhal._checks import QUANTIZED, attention_fault, check_paged, check_varlen, mask_fault
from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.pointwise import Captured, capture_cached
from torchhal.problems import AttentionProblem
from torchhal.reference.attention import score_dtype
from torchhal.registry import blame
from torchhal.selection import Selected, is_traced, select

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

INDICES = tuple((name, torch.int32) for name in ("b", "h", "q_idx", "kv_idx"))


class Functions(NamedTuple):
    """The captured user functions of one attention call."""

    score_mod: Captured | None = None
    mask_mod: Captured | None = None


class Call(NamedTuple):
    """Everything one attention call says, in one layout, after user functions were captured."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    layout: str = "dense"
    functions: Functions = Functions()
    operands: AttentionOperands | None = None
    block_size: tuple[int, int] | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    return_lse: bool = False
    return_max_scores: bool = False
    backend: str | None = None
    strict: bool | None = None
    or_torch: bool = False


def diagnose(query: Tensor, key: Tensor, value: Tensor, layout: str, enable_gqa: bool) -> None:
    """Raise InvalidProblem if something is wrong with the main tensors of a call."""
    fault = attention_fault(query, key, value, layout, enable_gqa)
    if fault:
        raise InvalidProblem(fault)


def share_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of batch size 1 as views of the query's batch size; others unchanged, to be diagnosed."""
    if query.dim() == key.dim() == value.dim() == 4 and key.shape[0] == value.shape[0] == 1:
        batch = query.shape[0]
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    return key, value


def choose(call: Call) -> Selected:
    """The selection for a call of any layout."""
    return select(build_problem(call), call.backend, strict=call.strict, or_torch=call.or_torch)


def run(call: Call) -> Tensor | tuple[Tensor, ...]:
    """Serve a call of any layout: directly, or through an operator when the tensors are being traced."""
    selected = choose(call)
    selected.record()
    assert selected.plan is not None and selected.run is not None
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else check_number("scale", call.scale)
    if is_traced(call.query) and not selected.plan.traceable:
        from torchhal import ops_families

        return _asked_for(call, ops_families.attention(selected.route, call, scale))
    try:
        results = selected.run(call.query, call.key, call.value, call.attn_mask, scale, call.operands)
    except Exception as error:
        blame(error, selected.route.chosen)
        raise
    return _asked_for(call, results)


def _asked_for(call: Call, results: Any) -> Tensor | tuple[Tensor, ...]:
    """A plan's results without the LSE that comes before row maxima, where the caller did not ask for it."""
    kept: Tensor | tuple[Tensor, ...] = results
    return (kept[0], kept[2]) if call.return_max_scores and not call.return_lse else kept


def build_problem(call: Call) -> AttentionProblem:
    """The Problem of a call, checked.

    Raises:
        InvalidProblem: the call means nothing on any backend.
    """
    query, key, value = call.query, call.key, call.value
    fault = attention_fault(query, key, value, call.layout, call.enable_gqa)
    if not fault and call.attn_mask is not None:
        fault = mask_fault(call.attn_mask, query, key)
    if fault:
        raise InvalidProblem(fault)
    operands = call.operands or AttentionOperands()
    if call.layout == "varlen":
        check_varlen(query, key, operands)
    if call.layout == "paged":
        check_paged(query, key, value, operands)
    heads = 1 if call.layout != "varlen" else -2
    score, mask = call.functions
    return AttentionProblem(
        device=query.device,
        features=frozenset(_features(call, operands)),
        layout=call.layout,
        query_dtype=query.dtype,
        key_dtype=key.dtype,
        value_dtype=value.dtype,
        query_heads=int(query.shape[heads]),
        key_heads=int(key.shape[heads]),
        head_size=int(query.shape[-1]),
        value_head_size=int(value.shape[-1]),
        is_causal=call.is_causal,
        return_lse=call.return_lse or call.return_max_scores,
        return_max_scores=call.return_max_scores,
        mask_dtype=None if call.attn_mask is None else call.attn_mask.dtype,
        score_mod=None if score is None else score.graph,
        mask_mod=None if mask is None else mask.graph,
        block_size=call.block_size,
        page_size=int(key.shape[2]) if call.layout == "paged" else None,
        key_scale=_scale_kind(operands.key_scale),
        value_scale=_scale_kind(operands.value_scale),
        dropout=operands.dropout_p > 0.0,
    )


def _scale_kind(scale: Tensor | None) -> str | None:
    return None if scale is None else "head" if scale.dim() == 1 else "token"


def _features(call: Call, operands: AttentionOperands) -> list[str]:
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    heads = 1 if call.layout != "varlen" else -2
    captured = (*operands.captured, *operands.mask_captured)
    grad = torch.is_grad_enabled()
    quantized = key.dtype in QUANTIZED
    asked = {
        "causal": call.is_causal,
        "boolean_mask": mask is not None and mask.dtype is torch.bool,
        "additive_mask": mask is not None and mask.dtype is not torch.bool,
        "gqa": query.shape[heads] != key.shape[heads],
        "value_head_size": query.shape[-1] != value.shape[-1],
        "lse": call.return_lse or call.return_max_scores,
        "max_scores": call.return_max_scores,
        "score_mod": call.functions.score_mod is not None,
        "mask_mod": call.functions.mask_mod is not None or call.block_size is not None,
        "captured_tensors": bool(captured),
        "dropout": operands.dropout_p > 0.0,
        "mixed_dtypes": not (quantized or query.dtype == key.dtype == value.dtype),
        "quantized_kv": quantized,
        "backward": forward_ad._current_level >= 0
        or (grad and any(t.requires_grad for t in (query, key, value))),
        "mask_gradient": grad and mask is not None and mask.requires_grad,
        "captured_gradient": grad and any(t.requires_grad for t in captured),
    }
    return [name for name, wanted in asked.items() if wanted]


# ---------------------------------------------------------------------------- user functions and block masks


def capture_score_mod(
    score_mod: ScoreMod | None, *tensors: Tensor, capture: Callable[..., Captured] = capture_cached
) -> Captured | None:
    """Capture a ``score_mod``; the score's type follows from those of query, key and value."""
    if score_mod is None:
        return None
    inputs = (("score", score_dtype(*(t.dtype for t in tensors))), *INDICES)
    return _single(capture(score_mod, inputs, what="score_mod"), "score_mod")


def capture_mask_mod(
    mask_mod: MaskMod | None, *, capture: Callable[..., Captured] = capture_cached
) -> Captured | None:
    """Capture a ``mask_mod``.

    Raises:
        InvalidProblem: it returns something other than a bool, which flex_attention refuses too: a score that was
            meant for a ``score_mod``, or a count.
    """
    if mask_mod is None:
        return None
    captured = _single(capture(mask_mod, INDICES, what="mask_mod"), "mask_mod")
    (found,) = captured.graph.output_dtypes
    if found is not torch.bool:
        raise InvalidProblem(
            f"mask_mod has to return a bool, True for a key that is seen, and returns {found}; "
            "compare it with something, or change scores with a score_mod"
        )
    return captured


def _single(captured: Captured, what: str) -> Captured:
    if captured.structure == "tuple":
        raise InvalidProblem(
            f"{what} has to return one value and returns a tuple of {len(captured.graph.outputs)}"
        )
    return captured


def capture_block_mask(block_mask: BlockMask | None) -> Captured | None:
    """Capture the ``mask_mod`` of a BlockMask."""
    if block_mask is None:
        return None
    if not isinstance(block_mask, BlockMask):
        hint = "build one with torch.nn.attention.flex_attention.create_block_mask, or pass a tensor as attn_mask"
        raise InvalidProblem(f"block_mask expects a BlockMask and got {type(block_mask).__name__}; {hint}")
    return capture_mask_mod(block_mask.mask_mod)


def block_size_of(block_mask: BlockMask, query: Tensor, key: Tensor) -> tuple[int, int]:
    """The mask's block sizes, once its lengths are known to be those of the call."""
    lengths = (query.shape[2], key.shape[2])
    if tuple(block_mask.seq_lengths) != lengths:
        asked, made = f"{lengths[0]} queries and {lengths[1]} keys", tuple(block_mask.seq_lengths)
        raise InvalidProblem(
            f"block_mask was made for {made[0]} queries and {made[1]} keys, and the call has {asked}; make one for these lengths"
        )
    rows, columns = block_mask.BLOCK_SIZE
    return rows, columns


def check_number(name: str, value: Any) -> float:
    """A real number, which may be symbolic.

    Raises:
        InvalidProblem: it is something else; a tensor would lose its gradient and wait for its device.
    """
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)) and not isinstance(
        value, bool
    ):
        return value  # type: ignore[return-value]
    advice = "; multiply the query by it instead" if isinstance(value, Tensor) and name == "scale" else ""
    raise InvalidProblem(f"{name} expects a number and got {type(value).__name__}{advice}")


def operands_of(
    functions: Functions,
    block_mask: BlockMask | None,
    dropout_p: float,
    query: Tensor,
    **layout: Tensor | None,
) -> AttentionOperands:
    """Gather what a call carries beyond its main tensors."""
    if not 0.0 <= check_number("dropout_p", dropout_p) <= 1.0:
        raise InvalidProblem(f"dropout_p expects a probability between 0 and 1 and got {dropout_p}")
    score, mask = functions
    blocks: dict[str, Any] = {}
    if block_mask is not None:
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        blocks = {name: getattr(block_mask, name) for name in names}
    seed = torch.randint(2**62, (), dtype=torch.int64, device=query.device) if dropout_p > 0.0 else None
    return AttentionOperands(
        captured=() if score is None else tuple(score.tensors),
        mask_captured=() if mask is None else tuple(mask.tensors),
        dropout_p=dropout_p,
        seed=seed,
        **blocks,
        **layout,
    )
