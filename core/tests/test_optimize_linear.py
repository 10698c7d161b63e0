"""Linear layers swapped for fused ones: the same results, and an honest report of what was left and of ties."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_backends import Install
from linear_models import IDS, REF, model
from test_matmul_fusion import backend as matmul_backend
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchhal
from torchhal.errors import InvalidProblem, Unsupported
from torchhal.nn import FusedLinear, optimize_linear
from torchhal.reference import matmul as reference
from torchhal.reference.packing import unpack

# ---------------------------------------------------------------------------- swapping


def test_every_layer_is_swapped_and_the_results_stay() -> None:
    ours, plain = model(), model()
    report = optimize_linear(ours, **REF)
    torch.testing.assert_close(ours(IDS), plain(IDS))
    assert {e.name: (e.kind, e.weight) for e in report.swapped} == {
        "attend": ("FusedLinear", "dense"), "mlp.w1": ("FusedLinear", "dense"), "mlp.w2": ("FusedLinear", "dense"),
        "mlp.w3": ("FusedLinear", "dense"), "head": ("FusedLinear", "dense"), "mlp": ("FusedMLP", "dense"),
    }  # fmt: skip
    assert report.left == () and report.bytes_before == report.bytes_after
    assert list(ours.state_dict()) == list(plain.state_dict()), "the keys of a state stay what they were"
    assert not any(type(m) is nn.Linear for m in ours.modules())


@pytest.mark.parametrize(("weight", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantised_model_computes_with_the_quantised_weights_and_is_smaller(
    weight: str, bits: int, symmetric: bool
) -> None:
    ours, plain = model(), model()
    report = optimize_linear(ours, weight, group=32, symmetric=symmetric, **REF)
    for layer in (plain.attend, plain.mlp.w1, plain.mlp.w2, plain.mlp.w3):
        packed = torchhal.pack_weight(layer.weight, bits=bits, group=32, symmetric=symmetric, transposed=True)
        layer.weight.data = unpack(packed).t().contiguous()
    torch.testing.assert_close(ours(IDS), plain(IDS))
    dense = 4 * (32 * 32 + 3 * 32 * 64)
    scales = dense / 4 / 32 * 4 * (1 if symmetric else 2)
    assert report.bytes_before - report.bytes_after == dense - dense * bits / 32 - scales
    assert "int" in str(report) and "before" in str(report) and "int" in report.to_json()


def test_a_quantised_layer_gives_up_its_old_weight_at_once() -> None:
    ours = model()
    old = weakref.ref(ours.attend.weight)
    optimize_linear(ours, "int8", **REF)
    assert old() is None


def test_a_module_used_twice_is_swapped_in_both_places() -> None:
    shared = nn.Linear(8, 8)
    ours = nn.Sequential(shared, nn.ReLU(), shared)
    report = optimize_linear(ours, "int8", keep_original=True, **REF)
    assert ours[0] is ours[2] and isinstance(ours[0], FusedLinear) and len(report.swapped) == 1
    report.restore()
    assert ours[0] is ours[2] is shared


# ---------------------------------------------------------------------------- what is left


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def hooked() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda *_: None)
    return layer


def patched() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def pruned() -> nn.Linear:
    layer = nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def infinite() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight.data[1, 2] = torch.inf
    return layer


class Encoder(nn.TransformerEncoderLayer):
    """A class of torch under another name."""


def of_type(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
    return layer


def sparse() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.eye(8).to_sparse())
    return layer


LEFT: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Own(8, 8), "Own is a subclass of nn.Linear and may compute something else"),
    (hooked, "it has forward hooks"),
    (patched, "its forward was replaced on the instance"),
    (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "it is parametrized"),
    (pruned, "it has forward pre hooks"),
    (Lora, "Lora adapts it, and reads or merges its weight"),
    (lambda: nn.Linear(8, 8, device="meta"), "its weight is on meta and holds no numbers"),
    (lambda: nn.MultiheadAttention(8, 2), "NonDynamicallyQuantizableLinear is a subclass"),
    (
        lambda: nn.TransformerEncoderLayer(8, 2, 8),
        "nn.TransformerEncoderLayer reads its weight without calling it",
    ),
    (lambda: Encoder(8, 2, 8), "nn.TransformerEncoderLayer reads its weight without calling it"),
    (lambda: of_type(torch.int8), "its weight is torch.int8 in the layout torch.strided"),
    (lambda: of_type(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn"),
    (sparse, "its weight is torch.float32 in the layout torch.sparse_coo"),
    (infinite, "expects finite values; the weight has inf"),
]


@pytest.mark.parametrize(("make", "why"), LEFT)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_layer_that_can_not_be_swapped_is_left_with_its_reason(
    make: Callable[[], nn.Module], why: str
) -> None:
    ours = nn.ModuleList([make()])
    before = dict(ours.named_modules())
    report = optimize_linear(ours, "int8", **REF)
    assert report.swapped == () and any(why in entry.why for entry in report.left), str(report)
    assert dict(ours.named_modules()) == before
    assert f"left, because {report.left[0].why}" in str(report)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("weight", [None, "int8"])
def test_tensors_without_memory_and_weights_of_whole_numbers_stop_no_other_layer(weight: str | None) -> None:
    ours = nn.Sequential(nn.Linear(8, 8), of_type(torch.int8), nn.LazyLinear(8))
    ours.register_buffer("adjacency", torch.eye(4).to_sparse())
    report = optimize_linear(ours, weight, **REF)
    assert [entry.name for entry in report.swapped] == ["0"]
    assert {entry.name for entry in report.left} == {"1", "2"}
    assert report.bytes_before == 4 * (8 * 8 + 8) + 8 * 8 + 4 * 8


def test_a_layer_that_only_the_reference_would_serve_is_left_to_torch_unless_it_is_named() -> None:
    ours = nn.Sequential(nn.Linear(8, 8))
    (entry,) = optimize_linear(ours).left
    assert entry.why == "no backend on cpu improves on torch for it (none is installed)"
    assert type(ours[0]) is nn.Linear


def test_a_backend_that_serves_is_chosen_and_one_that_declines_is_quoted(install: Install) -> None:
    install("whole", matmul_backend("whole", {}, 10))
    ours = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16))
    report = optimize_linear(ours)
    assert [e.name for e in report.swapped] == ["0"]
    assert "whole: does not claim torch.bfloat16 [unclaimed_dtype]" in report.left[0].why


def test_a_named_backend_that_can_not_serve_raises_and_changes_nothing(install: Install) -> None:
    install("whole", matmul_backend("whole", {}, 10))
    ours = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16))
    with pytest.raises(Unsupported, match="does not claim torch.bfloat16"):
        optimize_linear(ours, backend="whole")
    assert all(type(layer) is nn.Linear for layer in ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "int2"}, '"int8", "int4" or None and got \'int2\''),
        ({"weight": "int8", "group": 48}, r"group to be one of .* got group=48"),
    ],
)
def test_misuse_says_what_was_expected(options: dict[str, Any], message: str) -> None:
    ours = model()
    with pytest.raises(InvalidProblem, match=message):
        optimize_linear(ours, **options, **REF)
    assert type(ours.attend) is nn.Linear


def test_what_is_no_model_with_layers_inside_is_refused() -> None:
    with pytest.raises(InvalidProblem, match=r"use torchhal.nn.FusedLinear.from_linear\(model\)"):
        optimize_linear(nn.Linear(2, 2))
    with pytest.raises(InvalidProblem, match="expects a torch.nn.Module and got list"):
        optimize_linear([])  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- ties


def test_a_weight_tied_to_an_embedding_stays_tied_and_is_not_quantised() -> None:
    ours = model()
    report = optimize_linear(ours, "int4", **REF)
    assert ours.head.weight is ours.embed.weight and isinstance(ours.head, FusedLinear)
    (note,) = [e.note for e in report.swapped if e.name == "head"]
    assert note == "not packed, because it shares its memory with embed"
    ours.to(torch.bfloat16)
    assert ours.head.weight is ours.embed.weight
    assert copy.deepcopy(ours).head.weight is not ours.embed.weight


def test_layers_tied_to_each_other_share_one_packed_weight() -> None:
    ours = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ours[1].weight = ours[0].weight
    report = optimize_linear(ours, "int8", **REF)
    assert ours[0].packed is ours[1].packed
    assert report.bytes_after == 8 * 8 + 8 * 4 + 2 * 8 * 4
    twin = copy.deepcopy(ours).to(torch.float64)
    assert twin[0].packed is twin[1].packed and twin[0].packed is not ours[0].packed


def test_a_layer_tied_to_one_that_is_left_is_not_packed(install: Install) -> None:
    def plan(problem: Any) -> Any:
        if "bias" in problem.features:
            return torchhal.Decline("no_bias", "it adds none")
        return torchhal.Plan(reference.plan(problem).run)

    install("bare", matmul_backend("bare", plan, 10))
    ours = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    ours[1].weight = ours[0].weight
    report = optimize_linear(ours, "int8")
    assert [entry.name for entry in report.left] == ["0"] and ours[1].weight is ours[0].weight
    (entry,) = report.swapped
    assert (entry.name, entry.weight) == ("1", "dense")
    assert entry.note == "not packed, because it shares its memory with 0"


def test_a_weight_that_is_a_view_of_another_is_not_quantised() -> None:
    both = torch.randn(16, 8)
    ours = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ours[0].weight, ours[1].weight = nn.Parameter(both[:8]), nn.Parameter(both[8:])
    report = optimize_linear(ours, "int8", **REF)
    assert [e.weight for e in report.swapped] == ["dense", "dense"]
    assert report.bytes_before == report.bytes_after
