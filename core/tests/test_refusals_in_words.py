"""Arguments of a wrong kind are refused with what was expected, what arrived and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_backends import Install, backend
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import torchhal
from torchhal import BackendInfo, Plan
from torchhal._checks import attention_fault, mask_fault
from torchhal._identity import field_fault
from torchhal.errors import InvalidProblem
from torchhal.foreach_torch import translate
from torchhal.problems import AttentionClaims, Capabilities, MatmulClaims
from torchhal.registry import blame, registry

Q = torch.randn(2, 4, 8, 16)
NESTED = torch.nested.nested_tensor([torch.randn(3, 4, 16), torch.randn(5, 4, 16)], layout=torch.jagged)
RIGHT: dict[str, Any] = {
    "name": "mine",
    "vendor": "tests",
    "device_types": {"cpu"},
    "spec": ">=1.0,<2",
    "capabilities": Capabilities(attention=AttentionClaims(layouts={"dense"}, gqa=True)),  # type: ignore[arg-type]
    "preference": {"cpu": 5},
}


def test_an_identity_with_plain_sets_is_accepted(install: Install) -> None:
    assert field_fault(BackendInfo(**RIGHT)) == ""
    install("mine", backend("mine", device_types={"cpu"}))
    assert "mine" in registry().backends


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": 5}, "BackendInfo.name must be a string and is 5"),
        ({"vendor": None}, "vendor must be a string"),
        ({"version": 1.0}, "version must be a string"),
        ({"device_types": {5}}, "device_types must be a set of strings"),
        ({"preference": {"cpu": True}}, "preference must be a mapping of strings to int"),
        ({"preference": {0: 5}}, "preference must be a mapping of strings to int"),
        ({"probe": {}}, "probe must be a function"),
        (
            {"capabilities": Capabilities(attention=MatmulClaims())},
            "capabilities.attention must be None or its Att",
        ),
        (
            {"capabilities": Capabilities(attention=AttentionClaims(dtypes="all"))},
            "attention.dtypes must be a set",
        ),
        (
            {"capabilities": Capabilities(attention=AttentionClaims(dtypes={"float32"}))},
            "set of torch dtypes and",
        ),
        (
            {"capabilities": Capabilities(attention=AttentionClaims(gqa="yes"))},
            "attention.gqa must be True or False",
        ),
    ],
    ids=str,
)
def test_a_wrong_field_of_an_identity_is_named(wrong: dict[str, Any], words: str) -> None:
    assert words in field_fault(BackendInfo(**{**RIGHT, **wrong}))


def test_a_plan_without_a_function_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="run of a Plan expects a function and got None"):
        Plan(run=None)  # type: ignore[arg-type]


def test_an_error_is_blamed_on_a_backend_once_and_never_on_the_reference() -> None:
    error = RuntimeError("kaboom")
    for name in ("mine", "reference", "mine", None):
        blame(error, name)
    assert error.__notes__ == ["raised by the plan of backend 'mine'"]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, "expects a tensor and got NoneType"),
        ([1.0], "expects a tensor and got list"),
        (torch.tensor(1.0), "has 0 dimensions"),
        (Q.to_sparse(), "layout torch.sparse_coo; convert it with .to_dense()"),
        (NESTED.transpose(1, 2), "expects a dense tensor and is nested (torch.jagged)"),
        (torch.nested.nested_tensor([torch.randn(4, 3, 16)]), "nested tensors of layout torch.jagged"),
    ],
    ids=["None", "list", "0-dim", "sparse", "jagged", "nested"],
)
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_check_of_attention_speaks_of_every_kind_of_argument(
    position: int, tensor: Any, words: str
) -> None:
    tensors: list[Any] = [Q, Q, Q]
    tensors[position] = tensor
    fault = attention_fault(*tensors, "dense", False)
    assert words in fault and ("query", "key", "value")[position] in fault


def test_a_sparse_mask_is_refused() -> None:
    assert "attn_mask expects a dense tensor" in mask_fault(torch.ones(8, 8).to_sparse(), Q, Q)


LSE = torch.zeros(2, 4, 8)


@pytest.mark.parametrize(
    ("outs", "lses", "words"),
    [
        (None, None, "outs expects a list of tensors, one for each part, and got NoneType"),
        (Q, LSE, "outs expects a list of tensors, one for each part, and got Tensor"),
        ([Q], LSE, "lses expects a list of tensors, one for each part, and got Tensor"),
        ([1], [2], r"outs\[0\] expects a tensor and got int"),
        ([Q], [2], r"lses\[0\] expects a tensor and got int"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], r"outs\[0\] expects \(\.\.\., Ev\)"),
    ],
)
def test_merging_what_are_no_lists_of_tensors_is_refused(outs: Any, lses: Any, words: str) -> None:
    with pytest.raises(InvalidProblem, match=words):
        torchhal.merge_attention(outs, lses)


@pytest.mark.parametrize("name", ["clamp_min", "clamp_max", "maximum", "minimum", "clamp_min_", "minimum_"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e300), (torch.bfloat16, -1e300), (torch.float16, 65519.0)]
)
def test_a_bound_that_the_lists_type_can_not_hold_is_left_to_torch(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    function: Callable[..., Any] = getattr(torch, f"_foreach_{name}")
    items: list[Tensor] = [torch.ones(3, dtype=dtype)]
    with pytest.raises(RuntimeError, match="without overflow"):
        function(items, bound)
    assert translate(function, (items, bound), {}) is None
    assert translate(function, (items, [bound]), {}) is None
    for fine in (0.5, torch.inf, torch.nan, torch.finfo(dtype).max):
        assert translate(function, (items, fine), {}) is not None


def test_an_exponent_that_the_lists_type_can_not_hold_is_left_to_torch() -> None:
    items = [torch.ones(3, dtype=torch.float16)]
    with pytest.raises(RuntimeError, match="without overflow"):
        torch._foreach_pow(items, 1e5)
    assert translate(torch._foreach_pow, (items, 1e5), {}) is None


@pytest.mark.parametrize(
    ("mod", "found"), [(lambda b, h, i, j: i * 0.5, "float32"), (lambda b, h, i, j: i - j, "int32")]
)
def test_a_mask_that_is_no_bool_is_refused_in_every_layout(mod: Any, found: str) -> None:
    words = f"mask_mod has to return a bool, True for a key that is seen, and returns torch.{found}"
    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, 8, 8, device="cpu")
    blocks.mask_mod = mod
    ends = torch.tensor([0, 8], dtype=torch.int32)
    pages = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(InvalidProblem, match=words):
        torchhal.attention(Q, Q, Q, block_mask=blocks)
    with pytest.raises(InvalidProblem, match=words):
        torchhal.varlen_attention(*[Q[0].transpose(0, 1)] * 3, ends, ends, mask_mod=mod)
    with pytest.raises(InvalidProblem, match=words):
        torchhal.paged_attention(Q, Q, Q, pages, ends[1:].expand(2), mask_mod=mod)


def test_a_function_that_reads_outside_a_captured_tensor_is_told_where() -> None:
    table = torch.randn(4, 7)
    with pytest.raises(
        InvalidProblem, match=r"captured tensor 0 has shape \(4, 7\).* index 7 of its dimension 1"
    ):
        torchhal.attention(Q, Q, Q, score_mod=lambda s, b, h, i, j: s + table[h, j], backend="reference")
