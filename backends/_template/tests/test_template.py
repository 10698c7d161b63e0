"""The template is a backend that works: it conforms, computes, and declines what it does not claim."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import torchhal
import torchhal_template
from torchhal.registry import Backend, verify
from torchhal_conformance.runner import examine
from torchhal_template import plugin


def loaded() -> Backend:
    outcome = verify("template", "torchhal-template", plugin)
    assert isinstance(outcome, Backend), outcome
    return outcome


def test_it_conforms_to_the_contract() -> None:
    report = examine(loaded())
    assert report.passed, str(report)


def test_it_stays_small_enough_to_read_at_once() -> None:
    files = Path(torchhal_template.__file__).parent.glob("*.py")
    assert sum(len(file.read_text().splitlines()) for file in files) <= 140


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 8), (1, 2, 7, 33)])
def test_it_agrees_with_a_float64_evaluation(shape: tuple[int, int, int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    b, h, n, e = shape
    q, k, v = (torch.randn(b, h, n + i, e, generator=generator) for i in (0, 3, 3))
    out, lse = torchhal.attention(q, k, v, return_lse=True, backend="template")
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(e)
    torch.testing.assert_close(out.double(), torch.softmax(scores, -1) @ v.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=1e-5, atol=1e-5)


def test_no_keys_give_zero_and_an_lse_of_minus_infinity() -> None:
    q, k = torch.ones(1, 2, 3, 4), torch.empty(1, 2, 0, 4)
    out, lse = torchhal.attention(q, k, k, return_lse=True, backend="template")
    assert torch.equal(out, torch.zeros(1, 2, 3, 4))
    assert torch.equal(lse, torch.full((1, 2, 3), -math.inf))


def test_a_mask_it_does_not_claim_is_refused_by_name() -> None:
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(torchhal.errors.Unsupported, match="boolean_mask"):
        torchhal.attention(q, q, q, attn_mask=torch.ones(2, 2, dtype=torch.bool), backend="template")
