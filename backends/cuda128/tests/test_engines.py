"""Which calls cuDNN serves, why it serves no others, and, on a GPU, that it computes what the contract asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchhal
from torchhal.pointwise import capture
from torchhal.problems import AttentionProblem, Decline, Plan
from torchhal_cuda128 import attention, engines
from torchhal_cuda128.hardware import Device, Hardware

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132)
RTX_5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30, 170)
READY = Hardware(
    "2.13.0+cu128", torch_cuda=(12, 8), driver_cuda=(12, 8), devices=(H100,), arch_list=("sm_90",)
)
FULL = AttentionProblem(
    torch.device("cuda", 0),
    query_dtype=torch.bfloat16,
    key_dtype=torch.bfloat16,
    value_dtype=torch.bfloat16,
    head_size=128,
    value_head_size=128,
)
INDICES = [(name, torch.int32) for name in ("b", "h", "q_idx", "kv_idx")]


@pytest.mark.parametrize("size", [64, 128])
def test_full_attention_of_a_measured_head_size_has_a_rule(size: int) -> None:
    rule = engines.rule_for(replace(FULL, head_size=size, value_head_size=size), H100)
    assert isinstance(rule, engines.Rule), rule
    assert (rule.head_size, rule.least) == (size, 512)


@pytest.mark.parametrize(("fields", "code"), [
    ({"is_causal": True}, "cudnn_hides"),
    ({"mask_dtype": torch.bool}, "cudnn_hides"),
    ({"mask_mod": capture(lambda b, h, q, k: k <= q, INDICES).graph}, "cudnn_hides"),
    ({"block_size": (128, 128)}, "cudnn_hides"),
    ({"score_mod": capture(lambda s, b, h, q, k: s * 2, [("score", torch.float32), *INDICES]).graph}, "cudnn_score_mod"),
    ({"dropout": True}, "cudnn_dropout"),
    ({"return_lse": True}, "cudnn_lse"),
    ({"features": frozenset({"backward"})}, "cudnn_lse"),
    ({"layout": "varlen"}, "cudnn_layout"),
    ({"head_size": 96, "value_head_size": 96}, "cudnn_unmeasured"),
    ({"value_head_size": 64}, "cudnn_unmeasured"),
])  # fmt: skip
def test_what_cudnn_does_not_do_has_a_reason(fields: dict[str, Any], code: str) -> None:
    found = engines.rule_for(replace(FULL, **fields), H100)
    assert isinstance(found, Decline), found
    assert found.code == code


def test_a_device_that_was_not_measured_has_no_rule() -> None:
    found = engines.rule_for(FULL, RTX_5090)
    assert isinstance(found, Decline)
    assert "was not measured for head sizes 128 and 128 on Blackwell" in found.reason


def test_the_plan_says_from_which_length_on_cudnn_serves() -> None:
    pytest.importorskip("triton")
    answer = attention.plan(FULL, READY)
    assert isinstance(answer, Plan), answer
    assert answer.description.endswith("cuDNN from 512 rows and keys on")


@pytest.mark.parametrize("shape", [(1, 2, 511, 64), (1, 2, 512, 64)])
def test_short_calls_and_negative_scales_go_to_the_kernels(shape: tuple[int, ...]) -> None:
    rule = engines.RULES[0]
    run = engines.with_cudnn(lambda *arguments: "kernels", rule)
    tensor = torch.zeros(shape)
    assert run(tensor, tensor, tensor, None, -1.0, None) == "kernels"
    if shape[2] < rule.least:
        assert run(tensor, tensor, tensor, None, 1.0, None) == "kernels"


def test_cudnn_is_given_contiguous_tensors_at_multiples_of_16_bytes() -> None:
    whole = torch.arange(2.0 * 3 * 5 * 8).view(2, 3, 5, 8)
    assert engines.regular(whole) is whole
    odd = torch.cat([torch.zeros(1), whole.flatten()])[1:].view(whole.shape)
    for other in (whole.transpose(1, 2), whole[:1].expand(2, 3, 5, 8), whole[..., :7], odd):
        found = engines.regular(other)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0
        assert torch.equal(found, other)


@pytest.mark.hardware
@pytest.mark.parametrize("size", [64, 128])
def test_full_attention_on_a_real_device_is_accurate_and_the_same_bits_for_any_strides(size: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, h, 600, size, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2)]

    def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = "cuda128") -> Tensor:
        return torchhal.attention(query, key, value, enable_gqa=True, backend=backend)  # type: ignore[return-value]

    out = attend(*tensors)
    exact = attend(*(t.double() for t in tensors), backend="reference")
    plain = attend(*tensors, backend="reference")
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2**-8 * exact.abs().max()
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    gaps = [torch.cat([t, t[..., :3]], -1)[..., :size] for t in tensors]
    for others in (turned, gaps):
        assert torch.equal(attend(*others), out)


@pytest.mark.hardware
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_on_a_real_device_are_those_of_float64(causal: bool) -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(2, h, 600, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2)
    ]
    above = torch.randn(2, 8, 600, 64, device="cuda", dtype=torch.bfloat16)

    def pulled(wide: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(wide).requires_grad_() for t in tensors]
        out = torchhal.attention(*leaves, is_causal=causal, enable_gqa=True, backend=backend)
        return torch.autograd.grad(out, leaves, above.to(wide))  # type: ignore[arg-type]

    found, again = (pulled(torch.bfloat16, "cuda128") for _ in range(2))
    exact, plain = pulled(torch.float64, "reference"), pulled(torch.bfloat16, "reference")
    for a, b, truth, baseline in zip(found, again, exact, plain, strict=True):
        assert torch.equal(a, b)
        assert (a - truth).abs().max() <= 3 * (baseline - truth).abs().max() + 2**-7 * truth.abs().max()
