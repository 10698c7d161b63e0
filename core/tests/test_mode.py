"""The mode and the installation: what they serve, what they leave to torch, and torch's meaning of every argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_backends import EVERYTHING, Install, backend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as imported_beforehand

import torchhal
from torchhal import Decline, Plan
from torchhal.errors import BackendNotFound, Unsupported
from torchhal.problems import AttentionProblem
from torchhal.reference.attention import plan as reference_plan

Q = torch.randn(2, 4, 6, 8)
K = torch.randn(2, 4, 9, 8)


Serve = Callable[..., AbstractContextManager[object]]


@pytest.fixture(params=[torchhal.enable, torchhal.install], ids=["mode", "installation"])
def serve(request: pytest.FixtureRequest) -> Serve:
    """Either way in which torch's own calls are served."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def mine(install: Install) -> list[AttentionProblem]:
    """A backend that serves everything, by way of the reference's code; the problems it was asked."""
    asked: list[AttentionProblem] = []

    def answer(problem: AttentionProblem) -> Plan | Decline:
        asked.append(problem)
        return reference_plan(problem)

    install("mine", backend("mine", answer, preference={"cpu": 10}))
    return asked


def chosen() -> list[str | None]:
    return [route.chosen for route in torchhal.routes()]


CALLS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"attn_mask": torch.rand(6, 9) > 0.3},
    {"attn_mask": torch.randn(2, 1, 6, 9)},
    {"scale": 0.7},
]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda a: ",".join(a) or "plain")
def test_attention_is_served_with_torchs_meaning(
    serve: Serve, mine: object, arguments: dict[str, Any]
) -> None:
    expected = F.scaled_dot_product_attention(Q, K, K, **arguments)
    with serve():
        served = imported_beforehand(Q, K, K, **arguments)
        again = torch._C._nn.scaled_dot_product_attention(Q, K, K, **arguments)
    torch.testing.assert_close(served, expected)
    torch.testing.assert_close(again, expected)
    assert set(chosen()) == {"mine"}


def test_grouped_heads_and_three_dimensions_are_served(serve: Serve, mine: object) -> None:
    key = K[:, :2]
    with serve():
        grouped = F.scaled_dot_product_attention(Q, key, key, enable_gqa=True)
        flat = F.scaled_dot_product_attention(
            Q[:, 0], K[:, 0], K[:, 0], torch.ones(2, 6, 9, dtype=torch.bool)
        )
    torch.testing.assert_close(grouped, F.scaled_dot_product_attention(Q, key, key, enable_gqa=True))
    torch.testing.assert_close(flat, F.scaled_dot_product_attention(Q[:, 0], K[:, 0], K[:, 0]))
    assert set(chosen()) == {"mine"}


UNTOUCHED: list[tuple[str, Callable[[], Any]]] = [
    ("dropout", lambda: F.scaled_dot_product_attention(Q, K, K, dropout_p=0.5)),
    ("causal and masked", lambda: F.scaled_dot_product_attention(Q, K, K, torch.ones(6, 9), is_causal=True)),
    ("five dimensions", lambda: F.scaled_dot_product_attention(Q[None], K[None], K[None])),
    ("broadcast batch", lambda: F.scaled_dot_product_attention(Q, K[:1], K[:1])),
]


def outcome(call: Callable[[], Any]) -> Any:
    """The result or the words of the refusal: since 2.14 torch refuses a mask beside is_causal, which it took before."""
    torch.manual_seed(3)
    try:
        return call()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("call", [c[1] for c in UNTOUCHED], ids=[c[0] for c in UNTOUCHED])
def test_what_only_torch_knows_goes_to_torch(
    serve: Serve, mine: list[AttentionProblem], call: Callable[[], Any]
) -> None:
    expected = outcome(call)
    with serve():
        found = outcome(call)
    assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    assert mine == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.ones(5, 5)},
        {"dropout_p": -1.0},
    ],
)
def test_what_torch_refuses_is_refused_in_torchs_words(
    serve: Serve, mine: object, arguments: dict[str, Any]
) -> None:
    with pytest.raises(Exception) as plain:
        F.scaled_dot_product_attention(Q, K, K, **arguments)
    with serve(), pytest.raises(type(plain.value)) as served:
        F.scaled_dot_product_attention(Q, K, K, **arguments)
    assert str(served.value) == str(plain.value)


def test_a_user_who_chose_a_kernel_of_torch_keeps_it(serve: Serve, mine: list[AttentionProblem]) -> None:
    with serve(), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(Q, K, K)
    assert mine == []


def test_without_a_backend_that_improves_it_torch_serves_and_nothing_warns(serve: Serve) -> None:
    expected = F.scaled_dot_product_attention(Q, K, K)
    with serve(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(F.scaled_dot_product_attention(Q, K, K), expected)
    assert chosen() == ["torch"]


def test_an_explicit_backend_that_can_not_serve_raises(serve: Serve, install: Install) -> None:
    install("shy", backend("shy", lambda problem: Decline("busy", "is busy")))
    with serve("shy"), pytest.raises(Unsupported, match="is busy"):
        F.scaled_dot_product_attention(Q, K, K)


def test_strict_raises_where_a_backend_declined(serve: Serve, install: Install) -> None:
    install("shy", backend("shy", lambda problem: Decline("busy", "is busy"), preference={"cpu": 10}))
    with serve(strict=True), pytest.raises(Unsupported, match="strict mode forbids"):
        F.scaled_dot_product_attention(Q, K, K)


def test_an_unknown_backend_is_refused_when_the_mode_is_made(serve: Serve) -> None:
    with pytest.raises(BackendNotFound):
        serve("ghost")


def test_the_attention_inside_multihead_attention_is_served(
    serve: Serve, mine: list[AttentionProblem]
) -> None:
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected, _ = layer(x, x, x, need_weights=False)
    with serve():
        served, _ = layer(x, x, x, need_weights=False)
    torch.testing.assert_close(served, expected)
    assert chosen() == ["mine"]


def test_the_attention_inside_a_transformer_encoder_is_served(
    serve: Serve, mine: list[AttentionProblem]
) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer(x)
        with serve():
            served = layer(x)
    torch.testing.assert_close(served, expected)
    assert chosen() == ["mine"]


def test_gradients_flow_through_a_served_call(serve: Serve, mine: object) -> None:
    leaf, other = Q.clone().requires_grad_(), Q.clone().requires_grad_()
    with serve():
        F.scaled_dot_product_attention(leaf, K, K).square().sum().backward()
    F.scaled_dot_product_attention(other, K, K).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert chosen() == ["mine"]


def test_other_operations_give_what_they_give_without_the_mode(serve: Serve) -> None:
    with serve():
        assert torch.equal(torch.add(Q, 1, alpha=2), Q + 2)
        assert Q.mul(2).sum().item() == pytest.approx(2 * Q.sum().item())


BIAS = torch.randn(64)
MASK = create_block_mask(lambda b, h, i, j: i >= j, None, None, 32, 32, device="cpu", BLOCK_SIZE=16)
FLEX: list[dict[str, Any]] = [
    {},
    {"score_mod": lambda score, b, h, i, j: score + BIAS[i - j + 31]},
    {"block_mask": MASK},
    {"scale": 0.3, "score_mod": lambda score, b, h, i, j: torch.tanh(score / 5) * 5},
]


@pytest.mark.parametrize("arguments", FLEX, ids=["plain", "score_mod", "block_mask", "scale"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_served_in_eager_mode(
    serve: Serve, mine: object, arguments: dict[str, Any]
) -> None:
    q = torch.randn(1, 2, 32, 16)
    expected = flex_attention(q, q, q, **arguments)
    with serve():
        served = flex_attention(q, q, q, **arguments)
    torch.testing.assert_close(served, expected)
    assert set(chosen()) == {"mine"}


def test_flex_attention_gives_the_lse_in_torchs_unit(serve: Serve, mine: object) -> None:
    q = torch.randn(1, 2, 32, 16)
    _, expected = flex_attention(q, q, q, return_lse=True)
    with serve():
        _, served = flex_attention(q, q, q, return_lse=True)
    torch.testing.assert_close(served, expected)
    assert set(chosen()) == {"mine"}


def test_flex_attention_stays_with_torch_when_nobody_claims_its_functions(
    serve: Serve, install: Install
) -> None:
    plain = type(EVERYTHING)(dtypes=EVERYTHING.dtypes, layouts=EVERYTHING.layouts)
    install("plain", backend("plain", reference_plan, claims=plain, preference={"cpu": 10}))
    q = torch.randn(1, 2, 32, 16)
    with serve():
        flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score * 2)
    assert chosen() == []
