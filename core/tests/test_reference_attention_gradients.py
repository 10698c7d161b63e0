"""Gradients of the reference attention: of every operand, past hidden keys, in every type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_calls import HIDERS, INF, NAN, alibi, call, normal, plain, qkv, same
from tolerance import assert_accurate
from torch import Tensor

from torchhal.reference.products import weighted_sum


def gradients(tensors: tuple[Tensor, ...], cotangent: Tensor, **rules: Any) -> tuple[Tensor, ...]:
    inputs = [t.clone().requires_grad_() for t in tensors]
    out, lse = call(*inputs, **rules)
    return torch.autograd.grad([out, lse], inputs, [cotangent, cotangent[..., 0]])


@pytest.mark.parametrize("hider", HIDERS)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_what_is_hidden_from_every_row_reaches_no_gradient_and_gets_none(hider: str, poison: float) -> None:
    query, key, value = qkv(1, 4, 2, 4, 6, 8, 8)
    rules = {name: rule[:4] if name == "mask" else rule for name, rule in HIDERS[hider].items()}
    ones = torch.ones_like(query)
    clean = gradients((query, key, value), ones, **rules)
    key[:, :, 4:], value[:, :, 4:] = poison, poison
    poisoned = gradients((query, key, value), ones, **rules)
    same(poisoned, clean)
    assert (poisoned[1][:, :, 4:] == 0).all() and (poisoned[2][:, :, 4:] == 0).all()


@pytest.mark.parametrize("hider", HIDERS)
def test_a_poisoned_row_spoils_only_the_gradients_of_keys_it_sees(hider: str) -> None:
    query, key, value = qkv(1, 4, 2, 6, 6, 8, 8)
    clean = gradients((query, key, value), torch.ones_like(query), **HIDERS[hider])
    query[:, :, 2] = NAN
    cotangent = torch.ones_like(query)
    cotangent[:, :, 2] = NAN
    poisoned = gradients((query, key, value), cotangent, **HIDERS[hider])
    same(tuple(t[:, :, 3:] for t in poisoned), tuple(t[:, :, 3:] for t in clean))
    assert poisoned[1][:, :, :3].isnan().all() and poisoned[2][:, :, :3].isnan().all()


@pytest.mark.parametrize("hider", ["boolean mask", "mask_mod", "is_causal", "additive mask"])
def test_a_mod_without_a_value_at_a_hidden_pair_spoils_no_gradient(hider: str) -> None:
    tensors = qkv(1, 1, 1, 6, 6, 8, 8)
    root = {"score_mod": lambda s, b, h, q, k: torch.sqrt(s + 100 * (q - k) + 50)}
    for gradient in gradients(tensors, torch.ones_like(tensors[0]), **HIDERS[hider], **root):
        assert gradient.isfinite().all() and (gradient != 0).any()


def test_gradients_of_every_floating_operand_are_those_of_the_formula() -> None:
    query, key, value = qkv(1, 4, 2, 3, 4, 3, 2)
    bias, slopes = normal(1, 1, 4), normal(4)
    inputs = tuple(t.requires_grad_() for t in (query, key, value, bias, slopes))

    def function(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor, slopes: Tensor
    ) -> tuple[Tensor, Tensor]:
        return call(query, key, value, is_causal=True, mask=bias, score_mod=alibi(slopes))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, (*inputs[:3], bias.detach(), slopes.detach()))


def test_gradients_flow_through_dropout() -> None:
    inputs = tuple(t.requires_grad_() for t in qkv(1, 2, 1, 3, 6, 3, 2))
    seed = torch.tensor(7)
    assert torch.autograd.gradcheck(lambda *t: call(*t, dropout_p=0.4, seed=seed), inputs)


def test_low_precision_inputs_get_gradients_of_their_own_type() -> None:
    inputs = [t.requires_grad_() for t in qkv(1, 2, 1, 5, 6, 8, 8, torch.bfloat16)]
    torch.autograd.backward(call(*inputs)[0].sum())
    wide = [t.detach().double().requires_grad_() for t in inputs]
    torch.autograd.backward(call(*wide)[0].sum())
    base = [t.detach().clone().requires_grad_() for t in inputs]
    torch.autograd.backward(plain(*base)[0].sum())
    for got, expected, baseline in zip(inputs, wide, base, strict=True):
        assert got.grad is not None and expected.grad is not None and baseline.grad is not None
        assert_accurate(got.grad, expected.grad, baseline.grad, k=3)


@pytest.mark.parametrize("poison", [1.0, NAN, INF])
def test_a_weight_that_does_not_count_gets_no_gradient_whatever_its_value_holds(poison: float) -> None:
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.75]], requires_grad=True)
    counts = torch.tensor([[True, False], [True, True]])
    values = torch.tensor([[2.0, 3.0], [poison, 1.0]])
    (gradient,) = torch.autograd.grad(weighted_sum(weights, counts, values).sum(), weights)
    same((gradient,), (torch.tensor([[5.0, 0.0], [5.0, poison + 1.0]]),))
