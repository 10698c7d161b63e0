"""The reference under torch.func and forward-mode differentiation, against torch's own attention in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchhal

transforms: Any = torch.func
grad, vmap, jvp = transforms.grad, transforms.vmap, transforms.jvp
jacrev, jacfwd, hessian = transforms.jacrev, transforms.jacfwd, transforms.hessian

Q, K, V = (torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(3))
DIRECTIONS = tuple(torch.randn_like(t) for t in (Q, K, V))
MASK = torch.rand(4, 4) > 0.4
MASK[:, 0] = True


def served(*tensors: Tensor, **options: Any) -> Tensor:
    result = torchhal.attention(*tensors, backend="reference", **options)
    assert isinstance(result, Tensor)
    return result


def expected(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ value


Model = Callable[..., Tensor]
TRANSFORMS: dict[str, Callable[[Model], Any]] = {
    "grad": lambda f: grad(lambda *t: f(*t).pow(2).sum(), argnums=(0, 1, 2))(Q, K, V),
    "jvp": lambda f: jvp(f, (Q, K, V), DIRECTIONS),
    "jvp of the query": lambda f: jvp(lambda q: f(q, K, V), (Q,), DIRECTIONS[:1]),
    "jacrev": lambda f: jacrev(lambda q: f(q, K, V)[0, 0, 0])(Q),
    "jacfwd": lambda f: jacfwd(lambda k: f(Q, k, V)[0, 0, 0])(K),
    "hessian": lambda f: hessian(lambda q: f(q, K[:1, :1], V[:1, :1]).pow(2).sum())(Q[:1, :1, :, :]),
    "vmap": lambda f: vmap(f)(torch.stack([Q, 2 * Q]), torch.stack([K, V]), torch.stack([V, K])),
    "vmap of grad": lambda f: vmap(grad(lambda q: f(q, K, V).pow(2).sum()))(torch.stack([Q, 2 * Q])),
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "boolean mask"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_reference_transforms_as_torch_s_operators_do(
    transform: Callable[[Model], Any], mask: Tensor | None
) -> None:
    torch.testing.assert_close(
        transform(lambda *t: served(*t, attn_mask=mask)), transform(lambda *t: expected(*t, attn_mask=mask))
    )


def test_what_a_hidden_key_holds_reaches_no_forward_derivative() -> None:
    value = V.clone()
    value[:, :, 1:] = torch.nan
    first_key_alone = torch.tensor([True, False, False, False])[None].expand(4, 4)
    out, tangent = jvp(lambda q: served(q, K, value, attn_mask=first_key_alone), (Q,), DIRECTIONS[:1])
    torch.testing.assert_close(out, V[:, :, :1].expand_as(out))
    torch.testing.assert_close(tangent, torch.zeros_like(tangent))


def test_a_score_mod_takes_part_in_forward_derivatives() -> None:
    _, tangent = jvp(lambda q: served(q, K, V, score_mod=lambda s, b, h, i, j: 2 * s), (Q,), DIRECTIONS[:1])
    _, wanted = jvp(lambda q: expected(2 * q, K, V), (Q,), DIRECTIONS[:1])
    torch.testing.assert_close(tangent, wanted)


@pytest.mark.parametrize(("heads", "key_heads"), [(0, 0), (0, 2)])
def test_zero_heads_keep_the_length_and_give_empty_gradients(heads: int, key_heads: int) -> None:
    query = torch.randn(2, heads, 8, 16, requires_grad=True)
    key, value = torch.randn(2, key_heads, 5, 16), torch.randn(2, key_heads, 5, 3)
    out, lse = torchhal.attention(
        query, key, value, enable_gqa=True, return_lse=True, backend="reference", is_causal=True
    )
    assert out.shape == (2, heads, 8, 3) and lse.shape == (2, heads, 8)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None and query.grad.shape == query.shape
