"""Which calls cuDNN and FlashAttention-4 serve, why no others, how they are called, and, on a GPU, that they keep the contract."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchhal
from torchhal.pointwise import capture
from torchhal.problems import AttentionProblem, Decline, Plan
from torchhal_cuda128 import attention, engines
from torchhal_cuda128.hardware import Device, Hardware, observe
from torchhal_cuda128.lengths import Least, aligned, regular, seen_keys

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132)
B300 = Device("NVIDIA B300", (10, 3), 270 << 30, 148)
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


def declined(
    name: str, problem: AttentionProblem, device: Device = H100, version: str | None = "4.0.0b36"
) -> str:
    """The code with which an engine can not serve a problem; empty where it can."""
    why = engines.able(problem, device, version)[name]
    return "" if why is None else why.code


@pytest.mark.parametrize("size", [64, 128])
def test_full_attention_of_a_measured_head_size_has_a_rule(size: int) -> None:
    rule = engines.rule_for("cudnn", replace(FULL, head_size=size, value_head_size=size), H100)
    assert isinstance(rule, engines.Rule), rule
    assert (rule.head_size, rule.least) == (size, 512)


SOFT = capture(lambda s, b, h, q, k: s * 2, [("score", torch.float32), *INDICES]).graph
BEFORE = capture(lambda b, h, q, k: k <= q, INDICES).graph


@pytest.mark.parametrize(("fields", "cudnn", "fa4"), [
    ({"is_causal": True}, "", ""),
    ({"mask_dtype": torch.bool}, "cudnn_mask", "fa4_mask"),
    ({"mask_mod": BEFORE, "block_size": (128, 128)}, "cudnn_mask", "fa4_functions"),
    ({"score_mod": SOFT}, "cudnn_score_mod", "fa4_functions"),
    ({"dropout": True}, "cudnn_dropout", "fa4_dropout"),
    ({"return_lse": True}, "cudnn_lse", ""),
    ({"features": frozenset({"backward"})}, "cudnn_lse", ""),
    ({"layout": "varlen"}, "cudnn_layout", "fa4_layout"),
    ({"layout": "paged", "page_size": 16}, "cudnn_layout", "fa4_layout"),
    ({"query_dtype": torch.float16}, "", "fa4_dtype"),
    ({"head_size": 16, "value_head_size": 16}, "cudnn_head_size", "fa4_head_size"),
    ({"value_head_size": 64}, "cudnn_head_size", "fa4_head_size"),
])  # fmt: skip
def test_what_an_engine_does_not_do_has_a_code(fields: dict[str, Any], cudnn: str, fa4: str) -> None:
    problem = replace(FULL, **fields)
    assert (declined("cudnn", problem), declined("fa4", problem)) == (cudnn, fa4)


@pytest.mark.parametrize("device", [H100, B300], ids=lambda d: str(d.name))
@pytest.mark.parametrize(
    ("sizes", "served"), [((64, 64), True), ((128, 128), True), ((16, 16), False), ((128, 64), False)]
)
def test_an_engine_serves_the_head_sizes_at_which_it_was_found_to_be_right(
    sizes: tuple[int, int], served: bool, device: Device
) -> None:
    problem = replace(FULL, head_size=sizes[0], value_head_size=sizes[1])
    assert (declined("fa4", problem, device) == "") is served
    assert (declined("cudnn", problem, device) == "") is served


def test_consumer_blackwell_is_not_a_newer_data_centre_blackwell() -> None:
    assert declined("fa4", FULL, RTX_5090) == "fa4_architecture"


@pytest.mark.parametrize(("version", "code"), [(None, "fa4_missing"), ("4.0.0b1", "fa4_incompatible"), ("4.0.0b40", "")])  # fmt: skip
def test_flash_attention_is_used_in_the_releases_that_this_was_written_for(
    version: str | None, code: str
) -> None:
    assert declined("fa4", FULL, version=version) == code


def test_a_device_that_was_not_measured_has_no_rule() -> None:
    found = engines.rule_for("cudnn", FULL, RTX_5090)
    assert isinstance(found, Decline) and found.code == "cudnn_unmeasured"
    assert "on Blackwell for head sizes 128 and 128, full" in found.reason


@pytest.mark.parametrize(
    "rule", engines.RULES, ids=lambda r: f"{r.engine}-{r.head_size}-{r.causal}-{r.backward}"
)
def test_each_rule_is_of_an_engine_that_can_serve_its_problem(rule: engines.Rule) -> None:
    features = frozenset({"backward"} if rule.backward else ())
    problem = replace(
        FULL,
        head_size=rule.head_size,
        value_head_size=rule.head_size,
        is_causal=rule.causal,
        features=features,
    )
    assert declined(rule.engine, problem) == ""
    assert engines.rule_for(rule.engine, problem, H100) is rule


def test_the_plan_says_from_which_length_on_cudnn_serves() -> None:
    pytest.importorskip("triton")
    answer = attention.plan(FULL, READY)
    assert isinstance(answer, Plan), answer
    assert answer.description.endswith("cuDNN from 512 rows and keys on")


def test_the_plan_offers_every_engine_that_can_serve_as_a_variant_to_measure() -> None:
    pytest.importorskip("triton")
    with_fa4 = attention.plan(FULL, replace(READY, fa4="4.0.0b36"))
    without = attention.plan(FULL, READY)
    training = attention.plan(replace(FULL, features=frozenset({"backward"})), READY)
    assert isinstance(with_fa4, Plan) and isinstance(without, Plan) and isinstance(training, Plan)
    assert list(with_fa4.variants) == ["triton", "fa4", "cudnn"]
    assert list(without.variants) == ["triton", "cudnn"]
    assert not training.variants
    assert with_fa4.run is with_fa4.variants["cudnn"]
    assert without.run is without.variants["cudnn"]


def test_an_engine_that_the_suite_has_not_judged_serves_where_it_was_tuned_for_alone() -> None:
    pytest.importorskip("triton")
    ruled = replace(FULL, features=frozenset({"backward"}))
    assert isinstance(engines.rule_for("fa4", ruled, H100), engines.Rule), "it was measured to be faster"
    training = attention.plan(ruled, replace(READY, fa4="4.0.0b36"))
    assert isinstance(training, Plan)
    assert list(training.variants) == ["triton", "fa4"]
    assert training.run is training.variants["triton"]


@pytest.mark.parametrize(("rows", "keys", "causal", "served"), [
    (511, 600, False, False), (512, 512, False, True), (600, 511, False, False),
    (512, 700, True, True), (700, 512, True, False),
])  # fmt: skip
def test_an_engine_serves_long_calls_whose_causal_rows_all_have_a_key_of_their_own(
    rows: int, keys: int, causal: bool, served: bool
) -> None:
    least = Least(512, causal)
    query, key = torch.zeros(1, 2, rows, 8), torch.zeros(1, 2, keys, 8)
    assert least(query, key, 1.0) is served
    assert not least(query, key, -1.0)
    assert not least(query[:0], key[:0], 1.0)


def test_keys_that_no_row_sees_are_not_given_to_an_engine() -> None:
    query, key, value = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 4)
    assert [t.shape[2] for t in seen_keys(True, query, key, value)] == [3, 3]
    assert [t.shape[2] for t in seen_keys(False, query, key, value)] == [5, 5]


def odd_views(whole: Tensor) -> list[Tensor]:
    odd = torch.cat([torch.zeros(1), whole.flatten()])[1:].view(whole.shape)
    return [whole.transpose(1, 2), whole[:1].expand(2, 3, 5, 8), whole[..., :7], odd]


def test_cudnn_is_given_contiguous_tensors_at_multiples_of_16_bytes() -> None:
    whole = torch.arange(2.0 * 3 * 5 * 8).view(2, 3, 5, 8)
    assert regular(whole) is whole
    for other in odd_views(whole):
        found = regular(other)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0
        assert torch.equal(found, other)


def test_flash_attention_is_given_what_bulk_copies_can_read_and_transposed_tensors_as_they_are() -> None:
    whole = torch.arange(2.0 * 3 * 5 * 8).view(2, 3, 5, 8)
    transposed, expanded, cut, odd = odd_views(whole)
    for readable in (
        whole,
        transposed,
        cut,
    ):  # the rows of the last are 7 of 8 numbers, and begin at multiples of 32 bytes
        assert aligned(readable) is readable
    for other in (expanded, odd, whole.transpose(2, 3)):
        found = aligned(other)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0
        assert torch.equal(found, other)


# ---------------------------------------------------------------------------- on a GPU


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


def variants(causal: bool, size: int, training: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Every way this GPU has to compute a problem, by name; Triton's kernels first."""
    problem = replace(
        FULL, features=frozenset({"backward"} if training else ()), query_dtype=dtype, key_dtype=dtype, value_dtype=dtype,
        query_heads=8, key_heads=2, head_size=size, value_head_size=size, is_causal=causal, return_lse=training,
    )  # fmt: skip
    plan = attention.plan(problem, observe())
    assert isinstance(plan, Plan), plan
    return dict(plan.variants)


def drawn(rows: int, keys: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, h, n, size, device="cuda", dtype=dtype) for h, n in ((8, rows), (2, keys), (2, keys))
    ]


@pytest.mark.hardware
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(600, 600), (513, 777)])
def test_each_engine_of_a_real_device_is_accurate_deterministic_and_differentiable(
    rows: int, keys: int, causal: bool, size: int
) -> None:
    tensors = drawn(rows, keys, size)
    above, lse_above = torch.randn_like(tensors[0]), torch.randn(2, 8, rows, device="cuda")

    def pulled(run: Any, wide: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        out, lse = run(*leaves)
        return [
            out.detach(),
            *torch.autograd.grad((out, lse), leaves, (above.to(wide), lse_above.to(lse.dtype))),
        ]

    def reference(*leaves: Tensor) -> Any:
        rules: dict[str, Any] = {
            "is_causal": causal,
            "enable_gqa": True,
            "return_lse": True,
            "backend": "reference",
        }
        return torchhal.attention(*leaves, **rules)

    exact, plain = pulled(reference, torch.float64), pulled(reference, torch.bfloat16)
    for name, run in variants(causal, size, True).items():
        found, again = (
            pulled(lambda *t, r=run: r(*t, None, size**-0.5, None), torch.bfloat16) for _ in range(2)
        )
        for a, b, truth, baseline in zip(found, again, exact, plain, strict=True):
            assert torch.equal(a, b), name
            assert (a - truth).abs().max() <= 3 * (
                baseline - truth
            ).abs().max() + 2**-7 * truth.abs().max(), name


@pytest.mark.hardware
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_what_is_not_finite_reaches_the_same_places_by_each_engine(place: int, size: int) -> None:
    tensors = drawn(600, 600, size)
    tensors[place][1, 0, 333, 5] = math.nan
    finite: dict[str, list[Tensor]] = {}
    for name, run in variants(True, size, True).items():
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, lse = run(*leaves, None, size**-0.5, None)
        results = (out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out)))
        finite[name] = [t.isfinite() for t in results]
    for name, run in variants(True, size, False).items():
        finite[f"{name}, no gradients"] = [run(*tensors, None, size**-0.5, None).isfinite()]
    expected = finite["triton"]
    for name, found in finite.items():
        assert all(map(torch.equal, found, expected)), name


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
