"""Calls that once gave a wrong result, a wrong refusal or a message that does not help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from fake_backends import Install, backend, constant_plan
from torch import Tensor

import torchhal
from torchhal import BackendInfo, Capabilities, Plan, hookimpl
from torchhal.errors import InvalidProblem, TorchhalError, Unsupported
from torchhal.reference.attention import plan as reference_plan

Q, K, V = (torch.randn(2, 4, 8, 16) for _ in range(3))
"""Read before the other fixture clears the environment."""


@pytest.fixture
def mine(install: Install) -> None:
    """A backend that serves everything, by way of the reference's code."""
    install("mine", backend("mine", reference_plan, preference={"cpu": 10}))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


# ---------------------------------------------------------------------------- the mode and torch's meaning


def test_the_mode_keeps_the_result_type_of_autocast(mine: None) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.scaled_dot_product_attention(Q, K, V)
        with torchhal.enable():
            served = F.scaled_dot_product_attention(Q, K, V)
    assert served.dtype == expected.dtype == torch.bfloat16


def test_the_mode_keeps_the_result_type_of_autocast_under_compile(mine: None) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torchhal.enable():
        served = compiled(lambda q: F.scaled_dot_product_attention(q, K, V) * 1)(Q)
    assert served.dtype == torch.bfloat16


def test_the_mode_under_compile_knows_the_shape_that_torch_broadcasts_heads_to(mine: None) -> None:
    def model(q: Tensor, k: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, k)
        return out.reshape(out.shape[0], out.shape[1], -1)

    with torchhal.enable():
        served = compiled(model)(Q[:, :1], K)
    torch.testing.assert_close(served, model(Q[:, :1], K))


def test_the_mode_under_compile_knows_that_torch_broadcasts_a_batch_of_values(mine: None) -> None:
    def model(q: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, q, v)
        return out.reshape(out.shape[0], -1)

    with torchhal.enable():
        served = compiled(model)(Q[:1], V)
    torch.testing.assert_close(served, model(Q[:1], V))


def test_the_mode_leaves_nested_jagged_attention_as_it_is(native: None) -> None:
    parts = [torch.randn(3, 4, 16), torch.randn(5, 4, 16)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    expected = F.scaled_dot_product_attention(nested, nested, nested)
    with torchhal.enable():
        served = F.scaled_dot_product_attention(nested, nested, nested)
    torch.testing.assert_close(served.values(), expected.values())


def test_the_mode_leaves_nested_strided_attention_as_it_is(mine: None) -> None:
    nested = torch.nested.nested_tensor([torch.randn(4, 3, 16), torch.randn(4, 5, 16)])
    expected = F.scaled_dot_product_attention(nested, nested, nested)
    with torchhal.enable():
        served = F.scaled_dot_product_attention(nested, nested, nested)
    for one, other in zip(served.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other)


class _Overriding(torch.Tensor):
    """Has an attention of its own, as DTensor and quantised tensors do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return "my own attention"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_mode_respects_a_tensor_subclass_with_its_own_attention(mine: None, position: int) -> None:
    tensors: list[Any] = [Q, K, V]
    tensors[position] = tensors[position].as_subclass(_Overriding)
    with torchhal.enable():
        assert F.scaled_dot_product_attention(*tensors) == "my own attention"


@pytest.mark.parametrize(
    ("tensors", "arguments"),
    [
        ((Q, K, V), {"dropout_p": 0.5}),
        ((Q[None], K[None], V[None]), {}),
        ((Q, K[:, :1], V[:, :1]), {}),
        ((Q.bfloat16(), K.bfloat16(), V.bfloat16()), {"attn_mask": torch.randn(8, 8)}),
    ],
    ids=["dropout", "five dimensions", "broadcast heads", "mask of another type"],
)
def test_a_backend_named_to_the_mode_is_never_passed_over_silently(
    install: Install, tensors: tuple[Tensor, ...], arguments: dict[str, Any]
) -> None:
    install("mine", backend("mine", lambda problem: constant_plan(7.0)))
    with torchhal.enable(backend="mine"):
        try:
            served = F.scaled_dot_product_attention(*tensors, **arguments)
        except TorchhalError:
            return
    assert (served == 7.0).all()


def test_explain_tells_what_the_mode_around_it_does(mine: None) -> None:
    with torchhal.enable(backend="reference"):
        assert torchhal.explain(F.scaled_dot_product_attention, Q, K, V).chosen == "reference"


# ---------------------------------------------------------------------------- the cached plan


@pytest.mark.parametrize("position", [1, 2])
def test_tensors_on_two_devices_are_refused_also_when_the_plan_is_cached(native: None, position: int) -> None:
    torchhal.attention(Q, K, V)
    tensors = [Q, K, V]
    tensors[position] = tensors[position].to("meta")
    with pytest.raises(InvalidProblem, match="one device"):
        torchhal.attention(*tensors)


@pytest.mark.parametrize("key", [None, torch.tensor(1.0), [1.0]], ids=["None", "0-dim", "list"])
def test_a_key_that_is_no_tensor_of_four_dimensions_is_refused_in_words(key: Any) -> None:
    with pytest.raises(InvalidProblem, match="key"):
        torchhal.attention(Q, key, V)


@pytest.mark.parametrize("chosen", [5, True, ["reference"]], ids=repr)
def test_a_backend_that_is_no_name_is_refused_in_words(chosen: Any) -> None:
    with pytest.raises(TorchhalError, match="backend"):
        torchhal.attention(Q, K, V, backend=chosen)
    with pytest.raises(TorchhalError, match="backend"):
        torchhal.enable(backend=chosen)


def test_a_dropout_probability_that_is_no_number_is_refused_in_words() -> None:
    with pytest.raises(InvalidProblem, match="dropout_p"):
        torchhal.attention(Q, K, V, dropout_p="0.1")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["x", [1.0]], ids=repr)
def test_a_scale_that_is_no_number_is_refused_in_words(scale: Any) -> None:
    with pytest.raises(InvalidProblem, match="scale"):
        torchhal.attention(Q, K, V, scale=scale)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_sparse_tensor_is_refused_in_words(native: None, position: int) -> None:
    tensors = [Q, K, V]
    tensors[position] = tensors[position].to_sparse()
    with pytest.raises(InvalidProblem):
        torchhal.attention(*tensors)


def test_a_nested_key_beside_a_dense_query_is_refused_in_words(native: None) -> None:
    parts = [torch.randn(3, 4, 16), torch.randn(5, 4, 16)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with pytest.raises(InvalidProblem, match="nested"):
        torchhal.attention(Q, nested, nested)


def test_a_nested_strided_query_is_refused_in_words() -> None:
    nested = torch.nested.nested_tensor([torch.randn(4, 3, 16), torch.randn(4, 5, 16)])
    with pytest.raises(InvalidProblem, match="jagged"):
        torchhal.attention(nested, nested, nested)


# ---------------------------------------------------------------------------- derivatives


def test_a_forward_derivative_is_never_silently_zero(native: None) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, torch.ones_like(Q))
        try:
            out = torchhal.attention(dual, K, V)
        except (TorchhalError, NotImplementedError):
            return
        assert forward_ad.unpack_dual(out).tangent is not None


def test_jvp_through_the_mode_is_never_silently_zero(native: None) -> None:
    def model(q: Tensor) -> Tensor:
        with torchhal.enable():
            return F.scaled_dot_product_attention(q, K, V)

    try:
        _, tangent = torch.func.jvp(model, (Q,), (torch.ones_like(Q),))
    except (TorchhalError, NotImplementedError):
        return
    assert tangent.abs().sum() > 0


def test_the_reference_runs_under_vmap() -> None:
    queries = torch.stack([Q, 2 * Q])
    served = torch.func.vmap(lambda q: torchhal.attention(q, K, V))(queries)
    torch.testing.assert_close(
        served, torch.stack([F.scaled_dot_product_attention(q, K, V) for q in queries])
    )


def test_a_scale_that_asks_for_a_gradient_gets_it_or_is_refused(native: None) -> None:
    scale = torch.tensor(0.3, requires_grad=True)
    try:
        out = torchhal.attention(Q, K, V, scale=scale)  # type: ignore[arg-type]
    except TorchhalError:
        return
    assert out.requires_grad


# ---------------------------------------------------------------------------- odd sizes and masks


def test_no_heads_at_all_give_an_empty_result_of_the_right_shape() -> None:
    nothing = torch.randn(2, 0, 8, 16)
    assert torchhal.attention(nothing, nothing, nothing).shape == (2, 0, 8, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize("mask", [torch.ones(8, dtype=torch.bool), torch.tensor(True)], ids=["(S,)", "()"])
def test_a_mask_of_fewer_than_two_dimensions_is_served(native: None, mask: Tensor) -> None:
    torch.testing.assert_close(torchhal.attention(Q, K, V, attn_mask=mask), torchhal.attention(Q, K, V))


def test_a_float64_mask_beside_float32_tensors_is_served(native: None) -> None:
    mask = torch.randn(8, 8, dtype=torch.float64)
    expected = torchhal.attention(Q, K, V, attn_mask=mask, backend="reference")
    torch.testing.assert_close(torchhal.attention(Q, K, V, attn_mask=mask), expected)


@pytest.mark.parametrize(
    "tensors", [(Q[:, :0], K[:, :0], V[:, :0]), (Q, K, V[..., :0])], ids=["H = 0", "Ev = 0"]
)
def test_empty_heads_and_values_are_served_by_whoever_is_chosen(
    native: None, tensors: tuple[Tensor, ...]
) -> None:
    assert torchhal.attention(*tensors).shape == (*tensors[0].shape[:3], tensors[2].shape[3])  # type: ignore[union-attr]


def test_a_score_mod_that_returns_a_tuple_is_refused_in_words() -> None:
    with pytest.raises(InvalidProblem, match="score_mod"):
        torchhal.attention(Q, K, V, score_mod=lambda s, b, h, i, j: (s, s))  # type: ignore[arg-type,return-value]


# ---------------------------------------------------------------------------- torch.compile


def test_attention_compiles_with_dynamic_shapes_in_one_graph() -> None:
    served = compiled(lambda q: torchhal.attention(q, K, V), dynamic=True)(Q)
    torch.testing.assert_close(served, torchhal.attention(Q, K, V))


def test_varlen_attention_compiles_with_dynamic_shapes_in_one_graph() -> None:
    tokens, lengths = torch.randn(8, 4, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    run = compiled(lambda x, cu: torchhal.varlen_attention(x, x, x, cu, cu), dynamic=True)
    torch.testing.assert_close(
        run(tokens, lengths), torchhal.varlen_attention(tokens, tokens, tokens, lengths, lengths)
    )


def test_a_dropout_probability_may_change_between_compiled_calls() -> None:
    run = compiled(lambda q, p: torchhal.attention(q, K, V, dropout_p=p))
    for p in (0.1, 0.2, 0.3):
        assert run(Q, p).shape == Q.shape


def test_one_number_may_be_the_scale_and_stand_in_a_score_mod_under_compile() -> None:
    def model(q: Tensor, number: float) -> Any:
        return torchhal.attention(q, K, V, scale=number, score_mod=lambda s, b, h, i, j: s * number)

    run = compiled(model)
    for number in (0.1, 0.2, 0.3):
        torch.testing.assert_close(run(Q, number), model(Q, number))


def test_a_score_mod_may_return_a_plain_number_under_compile() -> None:
    def model(q: Tensor) -> Any:
        return torchhal.attention(q, K, V, score_mod=lambda s, b, h, i, j: 0.0)  # type: ignore[arg-type,return-value]

    torch.testing.assert_close(compiled(model)(Q), model(Q))


def test_the_mode_may_be_entered_inside_a_compiled_function(mine: None) -> None:
    def model(q: Tensor) -> Tensor:
        with torchhal.enable():
            return F.scaled_dot_product_attention(q, K, V)

    torch.testing.assert_close(compiled(model)(Q), model(Q))


def test_nested_jagged_attention_compiles() -> None:
    parts = [torch.randn(3, 4, 16), torch.randn(5, 4, 16)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    served = compiled(lambda x: torchhal.attention(x, x, x))(nested)
    torch.testing.assert_close(served.values(), torchhal.attention(nested, nested, nested).values())  # type: ignore[union-attr]


# ---------------------------------------------------------------------------- plugins that misbehave


def test_a_plan_that_raises_names_its_backend(install: Install) -> None:
    def run(*arguments: Any) -> Tensor:
        raise RuntimeError("kaboom")

    install("broken", backend("broken", lambda problem: Plan(run=run), preference={"cpu": 10}))
    with pytest.raises(Exception, match="kaboom") as caught:
        torchhal.attention(Q, K, V)
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any("broken" in text for text in said)


def test_a_hook_that_exits_does_not_take_the_others_down(install: Install) -> None:
    def answer(problem: object) -> None:
        raise SystemExit("kaboom")

    install("broken", backend("broken", answer, preference={"cpu": 10}))
    with pytest.warns(UserWarning, match="broken"):
        assert torchhal.attention(Q, K, V).shape == Q.shape  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong",
    [
        {"capabilities": None},
        {"capabilities": {}},
        {"capabilities": Capabilities(attention=True)},  # type: ignore[arg-type]
        {"preference": None},
        {"preference": {"cpu": "high"}},
        {"spec": None},
        {"device_types": None},
        {"device_types": "cpu"},
    ],
    ids=str,
)
def test_a_malformed_identity_is_a_load_failure_and_leaves_the_others_alone(
    install: Install, wrong: dict[str, Any]
) -> None:
    @hookimpl
    def torchhal_backend() -> BackendInfo:
        right: dict[str, Any] = {
            "name": "broken",
            "vendor": "tests",
            "device_types": frozenset({"cpu"}),
            "spec": ">=1.0,<2",
            "capabilities": Capabilities(),
        }
        return BackendInfo(**{**right, **wrong})

    plugin = type("Plugin", (), {"torchhal_backend": staticmethod(torchhal_backend)})
    install("broken", plugin)
    with pytest.warns(UserWarning, match="broken"):
        assert torchhal.attention(Q, K, V).shape == Q.shape  # type: ignore[union-attr]
    with pytest.raises(TorchhalError, match="broken"):
        torchhal.attention(Q, K, V, backend="broken")
    assert "broken" in str(torchhal.backends())


def test_explain_says_that_strict_mode_refuses(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("picky", backend("picky", lambda problem: None, preference={"cpu": 10}))
    monkeypatch.setenv("TORCHHAL_STRICT", "1")
    with pytest.raises(Unsupported):
        torchhal.attention(Q, K, V)
    assert "strict" in str(torchhal.explain(torchhal.attention, Q, K, V))
