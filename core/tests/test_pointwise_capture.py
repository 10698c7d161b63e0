"""What can be captured, what is refused, and what each refusal says."""

from __future__ import annotations

import functools
import math
import operator
import sys
from typing import Any

import numpy
import pytest
import torch

from torchhal.errors import CaptureError
from torchhal.pointwise import Captured, Value, capture, evaluate

F32, I32 = torch.float32, torch.int32
SCORE = [("score", F32), ("b", I32), ("h", I32), ("q_idx", I32), ("kv_idx", I32)]
TABLE = torch.linspace(0, 1, 24).view(2, 3, 4)
SLOPES = torch.rand(3)
OFFSET = torch.tensor(3)


def positions() -> list[torch.Tensor]:
    score = torch.randn(2, 3, 4, 4)
    sizes = ((2, 1, 1, 1), (3, 1, 1), (4, 1), (4,))
    return [score, *(torch.arange(max(size), dtype=I32).view(size) for size in sizes)]


def run(captured: Captured, *args: torch.Tensor) -> torch.Tensor:
    return evaluate(captured.graph, args, captured.tensors)[0]


def check(fn: Any, reference: Any = None) -> Captured:
    """Capture ``fn`` and compare it with ``reference`` (or itself) run on tensors."""
    captured, args = capture(fn, SCORE), positions()
    assert torch.equal(run(captured, *args), (reference or fn)(*args))
    return captured


def test_index_arithmetic_captured_tensors_and_selection_are_captured() -> None:
    def mod(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        distance = q - kv + OFFSET
        score = torch.tanh((score + SLOPES[h] * distance) / 20.0) * 20.0 + TABLE[b, h, kv]
        return torch.where((q >= kv) & (distance < 5), score, -float("inf"))

    captured = check(mod)
    assert [id(t) for t in captured.tensors] == [id(OFFSET), id(SLOPES), id(TABLE)]
    assert captured.structure == "single" and captured.pure


def test_partial_indexing_mixes_with_ints_negative_ints_and_zero_dim_tensors() -> None:
    pick = torch.tensor(1)
    captured = check(lambda s, b, h, q, kv: s + TABLE[b][h, q], lambda s, b, h, q, kv: s + TABLE[b, h, q])
    assert len(captured.tensors) == 1
    check(lambda s, b, h, q, kv: s + TABLE[b, -1][kv], lambda s, b, h, q, kv: s + TABLE[b, -1, kv])
    check(lambda s, b, h, q, kv: s + TABLE[b, pick, q - 4])
    check(lambda s, b, h, q, kv: s + TABLE[1, ...][h][q], lambda s, b, h, q, kv: s + TABLE[1, h, q])


def test_a_tensor_captured_twice_is_one_captured_tensor_and_unused_ones_are_dropped() -> None:
    captured = check(lambda s, b, h, q, kv: s + SLOPES[h] * SLOPES[h - 1] + 0 * q)
    assert len(captured.tensors) == 1
    assert capture(lambda s, b, h, q, kv: (SLOPES[h], s)[1], SCORE).tensors == ()


def test_operations_on_plain_tensors_stay_torchs_and_differentiable() -> None:
    bias = torch.rand(4, requires_grad=True)
    captured = capture(lambda s, b, h, q, kv: s + bias.exp()[q], SCORE)
    assert captured.tensors[0].grad_fn is not None and not captured.pure
    (gradient,) = torch.autograd.grad(run(captured, *positions()).sum(), bias)
    torch.testing.assert_close(gradient, 24 * bias.exp())


def test_conversion_methods_of_plain_tensors_are_not_taken_for_reads() -> None:
    check(lambda s, b, h, q, kv: s * OFFSET.float() + SLOPES.double()[h].float() * OFFSET.bool())


def test_data_of_captured_tensors_is_never_read() -> None:
    meta = torch.empty(3, device="meta")
    flag = torch.empty((), device="meta", dtype=torch.int64)
    captured = capture(lambda s, b, h, q, kv: s * flag.item() + meta[h] + meta[flag + b], SCORE)
    assert {t.device.type for t in captured.tensors} == {"meta"}


def test_fake_tensors_can_be_captured() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(SLOPES)
        captured = capture(lambda s, b, h, q, kv: torch.where(q > kv, s + fake[h], 0.5), SCORE)
    assert captured.tensors == (fake,)


def test_item_is_a_weak_scalar_and_reads_nothing() -> None:
    scale = torch.tensor(0.3, dtype=torch.float64)
    captured = check(lambda s, b, h, q, kv: s * (scale.item() * 2) + OFFSET.item())
    assert captured.graph.output_dtypes == (F32,)
    assert captured.tensors[0] is scale and captured.pure


def test_torch_scalars_made_inside_become_constants() -> None:
    def mod(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        low = torch.tensor(-float("inf"))
        half = torch.full((), 0.5, dtype=score.dtype, device=score.device)
        return torch.where(q >= kv, score * half + torch.scalar_tensor(2.0) - torch.zeros(()), low)

    captured = check(mod)
    assert captured.tensors == () and captured.pure


@pytest.mark.parametrize("result", [1.5, 2, True, OFFSET])
def test_constants_and_zero_dim_tensors_are_results(result: Any) -> None:
    captured = capture(lambda *_: result, SCORE)
    value = run(captured, *positions())
    assert value == result and value.dtype is torch.as_tensor(result).dtype


@pytest.mark.parametrize(
    "fn",
    [
        torch.fmod,
        torch.clamp_min,
        torch.clamp_max,
        torch.eq,
        torch.ne,
        torch.lt,
        torch.le,
        torch.gt,
        torch.ge,
    ],
)
def test_a_constant_may_stand_first_where_torch_s_operators_want_a_tensor(fn: Any) -> None:
    def shifted(x: Any) -> Any:
        return fn(torch.full_like(x, 1.5), x)

    x = torch.tensor([-2.0, 1.0, 1.5, 4.0, torch.nan])
    captured = capture(shifted, [("x", torch.float32)])
    (result,) = evaluate(captured.graph, (x,), captured.tensors)
    torch.testing.assert_close(result, shifted(x), equal_nan=True, rtol=0, atol=0)


def test_tuples_give_several_outputs() -> None:
    captured = capture(lambda s, *rest: (s, s + 1, rest[0]), SCORE)
    assert captured.structure == "tuple" and captured.graph.output_dtypes == (F32, F32, I32)
    assert capture(lambda s, *_: (s,), SCORE).structure == "tuple"


def test_methods_overloads_operators_and_conversions_are_the_same_functions() -> None:
    aten = torch.ops.aten
    pairs: list[tuple[Any, Any]] = [
        (lambda x: aten.add.Tensor(x, 2.0), lambda x: x + 2.0),
        (
            lambda x: aten.where.self(x > 0, x, aten.full.default([], -1.0)),
            lambda x: torch.where(x > 0, x, torch.tensor(-1.0)),
        ),
        (lambda x: aten.index.Tensor(SLOPES, [x.int()]), lambda x: SLOPES[x.int()]),
        (lambda x: operator.mul(x, 3.0), lambda x: x * 3.0),
        (lambda x: torch.special.expit(x), lambda x: x.sigmoid()),
        (lambda x: x.to(torch.float64), lambda x: x.double()),
        (lambda x: x.type_as(x.half()), lambda x: x.half()),
        (lambda x: aten._to_copy.default(x, dtype=I32), lambda x: x.int()),
        (lambda x: torch.clamp(x, min=0.0), lambda x: x.clamp_min(0.0)),
        (lambda x: torch.clip(x, -1, 1), lambda x: x.clamp(-1, 1)),
        (lambda x: torch.true_divide(x, 3.0), lambda x: x / 3.0),
        (lambda x: x.new_full((), 2.0) * x, lambda x: x.new_tensor(2.0) * x),
        (lambda x: torch.ones_like(x) + x, lambda x: x + 1.0),
        (lambda x: torch.add(x, x, alpha=2), lambda x: x + x * 2),
        (lambda x: torch.rsub(x, 1.0), lambda x: 1.0 - x),
        (lambda x: +x, lambda x: x),
        (
            lambda x: functools.reduce(torch.maximum, [x, x * 2, x * 3]),
            lambda x: torch.max(torch.max(x, x * 2), x * 3),
        ),
    ]
    for left, right in pairs:
        assert capture(left, [("x", F32)]).graph == capture(right, [("x", F32)]).graph


def test_a_traced_fx_module_is_captured_like_the_function_it_came_from() -> None:
    def fn(x: Any, y: Any) -> Any:
        return torch.where(x > y, torch.exp(x - 1.0), y.clamp(0.0, 1.0))

    inputs = [("x", F32), ("y", F32)]
    assert capture(torch.fx.symbolic_trace(fn), inputs).graph == capture(fn, inputs).graph


def test_values_answer_what_a_scalar_tensor_would() -> None:
    seen: list[Any] = []
    capture(lambda x: seen.append((x.shape, x.ndim, x.dtype, x.device.type)) or x, [("x", F32)])
    assert seen == [(torch.Size([]), 0, F32, "cpu")]
    device = torch.device("meta")
    capture(lambda x: seen.append(x.device) or x, [("x", F32)], device=device)
    assert seen[-1] == device


def refused(fn: Any, *parts: str, what: str = "score_mod") -> None:
    with pytest.raises(CaptureError) as caught:
        capture(fn, SCORE, what=what)
    text = str(caught.value)
    for part in (f"cannot capture this {what}", *parts):
        assert part in text, text


def test_a_refusal_names_the_file_the_line_and_its_source() -> None:
    def helper(value: Any) -> Any:
        return value.sum()  # the culprit

    line = helper.__code__.co_firstlineno + 1
    refused(
        lambda s, *_: helper(s) + 1,
        f"{__file__}:{line}: return value.sum()  # the culprit",
        "Tensor.sum",
        what="epilogue",
    )


def branch(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    if s > 0:
        return s
    return -s


FAR_TOO_BIG = 2**70
REFUSALS: list[tuple[Any, tuple[str, ...]]] = [
    (branch, ("the truth of a value is needed", "if s > 0:", "use torch.where(condition, a, b)")),
    (lambda s, b, h, q, kv: max(q, kv), ("truth of a value", "torch.minimum/torch.maximum")),
    (lambda s, *_: math.exp(s), ("math.exp of a value", "use torch.exp")),
    (lambda s, *_: math.floor(s), ("math.floor of a value", "use torch.floor")),
    (lambda s, *_: float(s), ("float() of a value", "value.to(dtype)")),
    (lambda s, b, *_: int(b), ("int() of a value",)),
    (lambda s, b, *_: [1, 2][b], ("used as a Python int", "put the table in a tensor")),
    (lambda s, *_: numpy.sin(s), ("conversion to numpy",)),
    (lambda s, *_: list(s), ("iteration over a value",)),
    (lambda s, *_: len(s), ("len() of a value",)),
    (lambda s, *_: s[0], ("indexing of a value",)),
    (lambda s, *_: s.item(), ("Tensor.item", "reads data")),
    (lambda s, *_: torch.softmax(s, -1), ("'softmax'", "compute it outside and capture")),
    (lambda s, *_: s.max(), ("maximum over elements", "torch.maximum(a, b)")),
    (lambda s, *_: s @ s, ("matrix product",)),
    (lambda s, *_: s.view(1), ("Tensor.view", "a value is a scalar")),
    (lambda s, *_: s.add_(1), ("Tensor.add_", "out-of-place form add")),
    (lambda s, *_: torch.nn.functional.relu(s, inplace=True), ("relu",)),
    (lambda s, *_: torch.rand_like(s), ("'rand_like'", "draws random numbers")),
    (lambda s, *_: s + torch.rand(()), ("random function rand",)),
    (lambda s, *_: torch.nn.functional.dropout(s), ("dropout", "random")),
    (lambda s, *_: torch.linalg.inv(s), ("linalg_inv", "not in the pointwise language")),
    (lambda s, *_: s + SLOPES, ("whole captured tensor of shape (3,)", "index it down")),
    (lambda s, *_: SLOPES + s, ("whole captured tensor of shape (3,)",)),
    (lambda s, b, *_: s + TABLE[b], ("2 of its 3 dimensions not indexed",)),
    (lambda s, b, *_: torch.exp(TABLE[b]), ("2 of its 3 dimensions not indexed",)),
    (lambda s, b, *_: TABLE[b].sum(), ("2 of its 3 dimensions not indexed",)),
    (lambda s, b, h, q, kv: TABLE[b, :, q], ("indexing a captured tensor with slice",)),
    (lambda s, b, h, q, kv: TABLE[b, None, q], ("indexing a captured tensor with NoneType",)),
    (lambda s, b, h, q, kv: SLOPES[h, q], ("2 indices for a captured tensor of 1 dimensions",)),
    (lambda s, b, h, q, kv: SLOPES[q > kv], ("with a bool value",)),
    (lambda s, b, h, q, kv: SLOPES[s], ("with a float32 value", "index.to(torch.int32)")),
    (lambda s, *_: SLOPES.add_(s), ("in-place add_ on a captured tensor",)),
    (lambda s, *_: SLOPES.mul_(2), ("in-place mul_ on a tensor",)),
    (lambda s, b, *_: operator.setitem(SLOPES, b, s), ("in-place setitem",)),
    (lambda s, *_: s * float(OFFSET), ("float() of a captured tensor", "must not depend on data")),
    (lambda s, *_: s if OFFSET > 2 else -s, ("bool() of a captured tensor",)),
    (lambda s, *_: s * SLOPES.tolist()[0], ("tolist of a captured tensor",)),
    (lambda s, *_: torch.add(s, 1, out=s), ("add with these arguments", "unexpected keyword argument 'out'")),
    (lambda s, *_: s + "a", ("add with an operand of type str",)),
    (lambda s, *_: s + FAR_TOO_BIG, ("integers must fit in int64",)),
    (lambda s, *_: s.to(torch.complex64), ("conversion to torch.complex64",)),
    (lambda s, *_: s & 1, ("bitwise_and of floating values",)),
    (lambda s, *_: torch.where(s, 1.0, 2.0), ("float32 condition", "must be bool")),
    (lambda s, b, h, q, kv: -(q > kv), ("neg of a bool value", "~mask")),
    (lambda s, b, h, q, kv: b + 2**40, ("does not fit torch.int32",)),
    (lambda s, *_: None, ("returned NoneType None",)),
    (lambda s, *_: SLOPES, ("returned a tensor of shape (3,)",)),
    (lambda s: s, ("must take 5 positional parameters (score, b, h, q_idx, kv_idx)",)),
]


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_what_has_no_pointwise_meaning_is_refused_with_advice(case: int) -> None:
    refused(REFUSALS[case][0], *REFUSALS[case][1])


def test_a_value_kept_after_its_capture_is_refused() -> None:
    kept: list[Value] = []
    capture(lambda s, *_: kept.append(s) or s, SCORE)
    with pytest.raises(CaptureError, match="after its capture ended"):
        kept[0] + 1
    with pytest.raises(CaptureError, match="another capture"):
        capture(lambda s, *_: s + kept[0], SCORE)


def test_the_users_own_exceptions_propagate_untouched() -> None:
    def wrong_key(s: Any, *_: Any) -> Any:
        return {}["scale"] * s

    def wrong_type(s: Any, *_: Any) -> Any:
        return len(3)  # type: ignore[arg-type]

    with pytest.raises(KeyError, match="scale"):
        capture(wrong_key, SCORE)
    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        capture(wrong_type, SCORE)
    with pytest.raises(AttributeError, match="has an attribute 'frobnicate'"):
        capture(lambda s, *_: s.frobnicate(), SCORE)


def test_capture_leaves_no_mode_behind_after_an_error() -> None:
    with pytest.raises(CaptureError):
        capture(branch, SCORE)
    assert torch.rand(2).sum().item() >= 0 and sys.exc_info() == (None, None, None)
