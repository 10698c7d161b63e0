"""Linear layers swapped for fused ones: the same results, an honest report, and a way back."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_backends import Install
from hypothesis import given, settings
from hypothesis import strategies as st
from test_matmul_fusion import backend as matmul_backend
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize, prune

import torchhal
from torchhal.errors import InvalidProblem, Unsupported
from torchhal.nn import FusedLinear, FusedMLP, PackedEmbedding, load_packed, optimize_linear
from torchhal.reference import matmul as reference
from torchhal.reference.packing import unpack

few = settings(max_examples=20, deadline=None)
REF: dict[str, Any] = {"backend": "reference"}


class MLP(nn.Module):
    """Down of activated gate times up, with names of its own."""

    def __init__(self, activation: Callable[..., Any] | None = None, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(32, 64, bias), nn.Linear(64, 32, bias), nn.Linear(32, 64, bias)
        self.activation = activation or nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Model(nn.Module):
    """A small language model whose output layer is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.attend = nn.Linear(32, 32)
        self.mlp = MLP()
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.attend(x)
        return self.head(x + self.mlp(x))


IDS = torch.tensor([[3, 1, 49], [0, 7, 7]])


def model() -> Model:
    torch.manual_seed(3)
    return Model().eval()


# ---------------------------------------------------------------------------- the layers


@few
@given(
    batch=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.booleans(),
)
def test_a_fused_layer_computes_what_the_plain_one_does(
    batch: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    plain = nn.Linear(9, 7, bias, dtype=dtype)
    x = torch.randn(*batch, 9, dtype=dtype)
    found, exact = FusedLinear.from_linear(plain, **REF)(x), plain.double()(x.double())
    assert found.dtype == dtype and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_layer_multiplies_by_the_dequantised_weight_in_the_type_of_its_input(
    bits: int, dtype: torch.dtype
) -> None:
    packed = torchhal.pack_weight(torch.randn(64, 7), bits=bits, group=32, symmetric=False)
    layer = FusedLinear(packed, nn.Parameter(torch.randn(7)), **REF).eval()
    x = torch.randn(2, 3, 64, dtype=dtype)
    found = layer(x)
    assert found.dtype == dtype
    exact = x.double() @ unpack(packed, torch.float64) + layer.bias.double()  # type: ignore[union-attr]
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps * 4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_under_autocast_a_layer_has_the_type_that_a_plain_one_has(packed: bool) -> None:
    plain = nn.Linear(32, 8)
    layer = FusedLinear.from_linear(plain, **REF)
    if packed:
        layer = FusedLinear(torchhal.pack_weight(plain.weight, transposed=True), plain.bias, **REF).eval()
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x), plain(x)
        assert layer(x.double()).dtype == torch.float64, "autocast leaves float64 alone"
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_a_bias_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidProblem, match=r"bias expects the shape \(N,\) = \(7,\).*has \(9,\)"):
        FusedLinear(nn.Parameter(torch.randn(7, 9)), nn.Parameter(torch.randn(9)))


def test_an_embedding_dequantises_the_rows_it_is_asked_for() -> None:
    table = torch.randn(50, 64)
    for packed in (
        torchhal.pack_weight(table, transposed=True, bits=4, group=32, symmetric=False),
        blocks(table),
    ):
        layer = PackedEmbedding(packed).eval()
        assert torch.equal(layer(IDS), unpack(packed).t()[IDS])
        assert layer(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 64)
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            layer(torch.tensor([50]))


def test_an_embedding_that_would_be_trained_is_refused_unless_it_is_frozen() -> None:
    ours = model().train()
    load_packed(ours, {"embed": blocks(torch.randn(50, 32))}, **REF)
    with pytest.raises(InvalidProblem, match=r"packed \(gguf:q8_0\) and has no gradient.*frozen=True"):
        ours(IDS)
    with torch.no_grad():
        ours(IDS)
    ours = model().train()
    load_packed(ours, {"embed": blocks(torch.randn(50, 32))}, frozen=True, **REF)
    ours(IDS).sum().backward()


def test_inputs_are_taken_under_the_names_that_the_layers_before_gave_them() -> None:
    layer, packed = FusedLinear.from_linear(nn.Linear(32, 8), **REF), blocks(torch.randn(50, 32))
    x = torch.randn(2, 32)
    assert torch.equal(layer(input=x), layer(x))
    table = PackedEmbedding(packed).eval()
    assert torch.equal(table(input=IDS), table(IDS))


def test_a_fused_mlp_takes_its_input_under_the_name_that_its_class_gave_it_and_no_other() -> None:
    class Named(MLP):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states)

    ours, x = nn.Sequential(Named()).eval(), torch.randn(2, 32)
    optimize_linear(ours, **REF)
    assert isinstance(ours[0], FusedMLP)
    assert torch.equal(ours[0](hidden_states=x), ours[0](x))
    for args, named in (((), {"x": x}), ((x,), {"hidden_states": x}), ((), {})):
        with pytest.raises(TypeError, match="expects one argument, hidden_states"):
            ours[0](*args, **named)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_whose_parameter_is_pruned_or_parametrized_after_the_swap_computes_with_it(name: str) -> None:
    x, plain = torch.randn(3, 32), nn.Linear(32, 8)
    for change in (
        lambda layer: prune.l1_unstructured(layer, name, 0.5),
        lambda layer: parametrize.register_parametrization(layer, name, nn.Tanh()),
    ):
        wanted = copy.deepcopy(plain)
        ours = nn.Sequential(copy.deepcopy(plain))
        report = optimize_linear(ours, **REF)
        change(wanted)
        change(ours[0])
        torch.testing.assert_close(ours(x), wanted(x))
        with pytest.raises(InvalidProblem, match=f"the {name} of a swapped layer was pruned or parametrized"):
            report.restore()
        assert isinstance(ours[0], FusedLinear)


def blocks(table: torch.Tensor) -> Any:
    """q8_0 blocks of a table (N, K), made here by the definition of the format."""
    groups = table.reshape(table.shape[0], -1, 32)
    d = (groups.abs().amax(-1, keepdim=True) / 127).half()
    q = torch.round(groups / d.float()).to(torch.int8)
    data = torch.cat((d.view(torch.uint8), q.view(torch.uint8)), -1).flatten(1)
    return torchhal.gguf_weight(data, "q8_0")


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


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU("tanh"), F.relu, F.silu, torch.tanh,
                                        lambda v: F.gelu(v, approximate="tanh"), lambda v: v.relu()])  # fmt: skip
def test_a_gated_mlp_is_found_by_what_it_computes(activation: Any) -> None:
    ours = nn.Sequential(MLP(activation, bias=True)).eval()
    plain = copy.deepcopy(ours)
    optimize_linear(ours, **REF)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours(x[0, 0]), plain(x[0, 0]))
    assert isinstance(ours[0], FusedMLP)


def test_the_activation_of_an_mlp_is_the_epilogue_of_the_first_product() -> None:
    ours = nn.Sequential(MLP()).eval()
    optimize_linear(ours, **REF)
    torchhal.selection.reset()
    ours(torch.randn(2, 32))
    asked = sorted((r.problem.summary(), r.count) for r in torchhal.routes())
    epilogues = [s for s, _ in asked if "epilogue" in s]
    assert len(epilogues) == 2 and sum(c for _, c in asked) == 3, "three products and nothing else"
    assert any("captured_tensors" in s for s in epilogues)


def test_who_watches_a_layer_of_a_fused_mlp_sees_what_the_layer_gives() -> None:
    ours = nn.Sequential(MLP()).eval()
    plain, x, seen = copy.deepcopy(ours), torch.randn(2, 3, 32), {}
    optimize_linear(ours, **REF)
    for name in ("w1", "w2", "w3"):
        layer = ours[0].get_submodule(name)
        layer.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    out = ours(x)
    torch.testing.assert_close(seen, {"w1": plain[0].w1(x), "w3": plain[0].w3(x), "w2": plain(x)})
    torch.testing.assert_close(out, plain(x))


def test_who_replaces_or_watches_a_part_of_a_fused_mlp_later_is_called() -> None:
    x = torch.randn(3, 32)

    def fused() -> tuple[FusedMLP, MLP]:
        ours = nn.Sequential(MLP()).eval()
        plain = copy.deepcopy(ours[0])
        optimize_linear(ours, **REF)
        return ours[0], plain  # type: ignore[return-value]

    for name in ("w1", "w3", "w2"):
        ours, plain = fused()
        for mlp in (ours, plain):
            layer = mlp.get_submodule(name)
            layer.forward = lambda v, forward=layer.forward: 2 * forward(v)  # type: ignore[method-assign]
        torch.testing.assert_close(ours(x), plain(x))
    ours, plain = fused()
    for activation in (ours.activation, plain.activation):
        activation.register_forward_hook(lambda _m, _i, out: out + 1)
    torch.testing.assert_close(ours(x), plain(x))
    ours, _ = fused()
    seen: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, _i, _o: seen.append(module)):
        ours(x)
    assert {id(m) for m in (ours, ours.w1, ours.w2, ours.w3, ours.activation)} <= set(map(id, seen))


class Dropping(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.w1(x)) * self.w3(x)
        if self.training:
            hidden = hidden * 0.5
        return self.w2(hidden)


class Adding(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x)) + x


class Mixing(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x + 1))


class Summing(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) + self.w3(x))


class Deciding(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x)) if x.sum() > 0 else super().forward(x)


class Exact(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Rounded(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Fixed(MLP):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Learning(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return super().forward(x)


@pytest.mark.parametrize("kind", [Exact, Rounded, Fixed, Learning])
def test_a_forward_that_changes_gradients_or_autocast_is_kept(kind: type[MLP]) -> None:
    ours = nn.Sequential(kind()).eval()
    plain, x = copy.deepcopy(ours), torch.randn(3, 32)
    before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    optimize_linear(ours, **REF)
    assert before == (
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    )  # fmt: skip
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            found, wanted = ours(x), plain(x)
        assert (found.dtype, found.requires_grad) == (wanted.dtype, wanted.requires_grad)
    assert type(ours[0]) is kind


class Remembering(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        return super().forward(x)


class Collecting(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return super().forward(x)


class Telling(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.activation.last = x
        return super().forward(x)


@pytest.mark.parametrize("kind", [Remembering, Collecting, Telling])
def test_a_forward_that_leaves_something_behind_is_kept_and_finds_nothing_of_the_swap(
    kind: type[MLP],
) -> None:
    ours = nn.Sequential(kind()).eval()
    optimize_linear(ours, **REF)
    assert type(ours[0]) is kind
    assert not hasattr(ours[0], "last") and not hasattr(ours[0].activation, "last")
    assert getattr(ours[0], "seen", []) == []
    ours(torch.randn(1, 32))


@pytest.mark.parametrize("extra", [
    lambda mlp: mlp.register_parameter("scale", nn.Parameter(torch.ones(1))),
    lambda mlp: mlp.register_buffer("count", torch.ones(1)),
    lambda mlp: mlp.register_module("norm", nn.LayerNorm(32)),
    lambda mlp: mlp.register_module("gate", mlp.w1),
])  # fmt: skip
def test_an_mlp_that_holds_more_than_its_layers_keeps_it(extra: Callable[[nn.Module], None]) -> None:
    mlp = MLP()
    extra(mlp)
    ours = nn.Sequential(mlp).eval()
    before = list(ours.state_dict())
    optimize_linear(ours, **REF)
    assert ours[0] is mlp and list(ours.state_dict()) == before


def test_an_mlp_whose_activation_is_watched_in_the_backward_pass_keeps_calling_it() -> None:
    ours, seen = nn.Sequential(MLP()).eval(), []
    ours[0].activation.register_full_backward_hook(lambda *_: seen.append(1))
    optimize_linear(ours, **REF)
    ours(torch.randn(3, 32)).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("kind", [Dropping, Adding, Mixing, Summing, Deciding])
def test_what_only_looks_like_a_gated_mlp_keeps_its_own_forward(kind: type[MLP]) -> None:
    ours = nn.Sequential(kind()).eval()
    plain = copy.deepcopy(ours)
    report = optimize_linear(ours, **REF)
    assert type(ours[0]) is kind and len(report.swapped) == 3
    for mode in (True, False):
        x = torch.randn(4, 32)
        torch.testing.assert_close(ours.train(mode)(x), plain.train(mode)(x))


@pytest.mark.parametrize("activation", [nn.PReLU(), nn.Softmax(-1), nn.Dropout(0.5)])
def test_an_activation_that_no_epilogue_can_be_keeps_the_mlp(activation: nn.Module) -> None:
    ours = nn.Sequential(MLP(activation)).eval()
    plain = copy.deepcopy(ours)
    optimize_linear(ours, **REF)
    assert type(ours[0]) is MLP
    x = torch.randn(4, 32)
    torch.testing.assert_close(ours(x), plain(x))


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


# ---------------------------------------------------------------------------- the way back


def test_restoring_gives_the_same_modules_on_the_same_parameters() -> None:
    ours = model()
    before, bits = dict(ours.named_modules()), {n: p.clone() for n, p in ours.named_parameters()}
    report = optimize_linear(ours, **REF)
    report.restore()
    assert dict(ours.named_modules()) == before
    assert all(torch.equal(p, bits[n]) for n, p in ours.named_parameters())
    with pytest.raises(InvalidProblem, match="restored before"):
        report.restore()


def test_restoring_keeps_what_was_learnt_and_loaded_since() -> None:
    ours = model()
    report = optimize_linear(ours, **REF)
    state = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    ours.train()
    report.restore()
    assert type(ours.attend) is nn.Linear and ours.attend.training and ours.mlp.training
    assert torch.equal(ours.attend.weight, state["attend.weight"])


def test_a_quantised_model_is_restored_only_if_its_originals_were_kept() -> None:
    ours, plain = model(), model()
    report = optimize_linear(ours, "int4", **REF)
    with pytest.raises(InvalidProblem, match=r"^4 modules can not be restored.*keep_original=True"):
        report.restore()
    ours = model()
    report = optimize_linear(ours, "int4", keep_original=True, **REF)
    report.restore()
    assert torch.equal(ours(IDS), plain(IDS))
    assert type(ours.mlp) is MLP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_kept_weight_follows_the_model_into_another_type(dtype: torch.dtype) -> None:
    ours, plain = model(), model()
    report = optimize_linear(ours, "int8", keep_original=True, **REF)
    ours.to(dtype)
    report.restore()
    assert torch.equal(ours(IDS), plain.to(dtype)(IDS))


def test_a_kept_weight_follows_the_model_to_another_device_and_one_without_numbers_stays() -> None:
    ours = model()
    report = optimize_linear(ours, "int8", keep_original=True, **REF)
    ours.to("meta")
    report.restore()
    assert ours.attend.weight.is_meta and ours(IDS.to("meta")).shape == (2, 3, 50)
    with torch.device("meta"):
        ours = Model()
    load_packed(ours, {"attend": blocks(torch.randn(32, 32))}, keep_original=True, **REF).restore()
    assert ours.attend.weight.is_meta


def test_kept_weights_that_are_tied_stay_tied_when_they_are_converted() -> None:
    ours = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ours[1].weight = ours[0].weight
    report = optimize_linear(ours, "int8", keep_original=True, **REF)
    ours.to(torch.float64)
    report.restore()
    assert ours[0].weight is ours[1].weight and ours[0].weight.dtype == torch.float64


def test_a_module_replaced_since_stops_the_restoration() -> None:
    ours = model()
    report = optimize_linear(ours, **REF)
    ours.attend = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(InvalidProblem, match="attend was replaced after the swap"):
        report.restore()
    assert isinstance(ours.mlp, FusedMLP)


# ---------------------------------------------------------------------------- saving, moving, copying


@pytest.mark.parametrize("weight", [None, "int8", "int4"])
def test_a_state_goes_round_through_a_file_of_tensors(weight: str | None) -> None:
    ours, other = model(), Model().eval()
    for m in (ours, other):
        optimize_linear(m, weight, group=32, symmetric=False, **REF)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values()), "safetensors keeps tensors alone"
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(IDS), ours(IDS))


def test_a_state_that_is_packed_otherwise_is_refused() -> None:
    ours, other, plain = model(), model(), model()
    optimize_linear(ours, "int4", group=32, **REF)
    optimize_linear(other, "int4", group=64, **REF)
    with pytest.raises(
        (InvalidProblem, RuntimeError),
        match=r"packed as .*group=32.* and the module one packed as .*group=64",
    ):
        other.load_state_dict(ours.state_dict())
    with pytest.raises(
        RuntimeError, match=r"attend.weight is a floating weight.*load the state before optimize_linear"
    ):
        ours.load_state_dict(plain.state_dict())


def test_a_state_of_the_same_sizes_and_another_meaning_is_refused() -> None:
    table = torch.randn(32, 32)
    one, two = (
        FusedLinear(blocks(table)),
        FusedLinear(torchhal.gguf_weight(torch.zeros(32, 34, dtype=torch.uint8), "q8_0")),
    )
    two.packed._rest["kind"] = "q4_0"  # type: ignore[union-attr]
    with pytest.raises(
        InvalidProblem, match="holds a weight packed as kind=q8_0 and the module one packed as kind=q4_0"
    ):
        two.load_state_dict(one.state_dict())


def test_whole_models_are_pickled_and_copied() -> None:
    ours = model()
    optimize_linear(ours, "int8", **REF)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(ours)):
        assert torch.equal(twin(IDS), ours(IDS))
        twin.attend.packed.data.zero_()
        assert not torch.equal(twin(IDS), ours(IDS)), "the copy has memory of its own, and reads it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_conversion_changes_the_type_of_results_and_no_packed_byte(dtype: torch.dtype) -> None:
    ours = model()
    optimize_linear(ours, "int8", **REF)
    before = ours.attend.packed.scale.clone()  # type: ignore[union-attr]
    exact = ours(IDS)
    found = ours.to(dtype)(IDS)
    assert found.dtype == dtype
    assert torch.equal(ours.attend.packed.scale, before)  # type: ignore[union-attr]
    assert ours.attend.packed.weight.dtype == dtype  # type: ignore[union-attr]
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)


def test_a_packed_model_moves_through_the_meta_device() -> None:
    ours, state = model(), None
    optimize_linear(ours, "int4", **REF)
    exact, state = ours(IDS), {k: v.clone() for k, v in ours.state_dict().items()}
    ours.to("meta")
    assert ours.attend.packed.weight.device.type == "meta"  # type: ignore[union-attr]
    ours.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(ours(IDS), exact)


def test_a_model_on_the_meta_device_tells_the_shape_of_its_result() -> None:
    ours = model()
    optimize_linear(ours, "int4", **REF)
    assert ours.to("meta")(IDS.to("meta")).shape == (2, 3, 50)


def test_buffers_that_stand_in_for_one_call_are_read() -> None:
    layer = FusedLinear(torchhal.pack_weight(torch.randn(32, 4)), **REF).eval()
    x = torch.randn(2, 32)
    doubled = {"packed.scale": 2 * layer.packed.scale}  # type: ignore[union-attr]
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), 2 * layer(x))


# ---------------------------------------------------------------------------- training and compiling


def gradients(of: nn.Module) -> dict[str, torch.Tensor]:
    of.zero_grad()
    of(IDS).square().sum().backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def test_a_model_with_its_own_weights_trains_as_before() -> None:
    ours, plain = model().train(), model().train()
    optimize_linear(ours, **REF)
    found, wanted = gradients(ours), gradients(plain)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=float(value.abs().max()) * 1e-5)


def test_training_a_quantised_layer_is_an_error_unless_it_is_frozen() -> None:
    ours = model().train()
    report = optimize_linear(ours, "int8", frozen=False, keep_original=True, **REF)
    with pytest.raises(
        InvalidProblem, match=r"packed \(int8:.*\) and has no gradient.*weight=None.*frozen=True"
    ):
        ours(IDS)
    with torch.no_grad():
        ours(IDS)
    report.restore()
    optimize_linear(ours, "int8", frozen=True, **REF)
    ours(IDS).sum().backward()
    assert ours.embed.weight.grad is not None and ours.embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weight", [None, "int4"])
def test_a_swapped_model_compiles_to_one_graph_for_all_lengths(weight: str | None) -> None:
    torch._dynamo.reset()
    ours = model()
    optimize_linear(ours, weight, **REF)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(ours, fullgraph=True, backend=counter)
    for length in (3, 2, 3, 5):
        ids = torch.arange(2 * length).reshape(2, length)
        torch.testing.assert_close(run(ids), ours(ids))
    assert counter.frame_count <= 2, "one static graph and one with symbolic lengths"


@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_a_swapped_model_is_exported_with_its_packed_weights_and_read_back() -> None:
    ours = model()
    optimize_linear(ours, "int4", **REF)
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(ours, (IDS,), dynamic_shapes=({1: length},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(torch.export.load(file).module()(ids), ours(ids))
    assert not any("weight" in name and "attend" in name for name in program.state_dict), (
        "no other copy is kept"
    )


# ---------------------------------------------------------------------------- packed weights from elsewhere


def test_blocks_drive_a_model_that_never_had_other_weights() -> None:
    with torch.device("meta"):
        ours = Model()
    table = torch.randn(50, 32)
    shared = blocks(table)
    parts = {
        f"mlp.w{i}": blocks(torch.randn(*shape)) for i, shape in ((1, (64, 32)), (2, (32, 64)), (3, (64, 32)))
    }
    load_packed(ours, {"embed": shared, "head": shared, **parts}, **REF)
    ours.attend = nn.Linear(32, 32)
    ours.eval()
    assert ours.embed.packed is ours.head.packed and isinstance(ours.mlp, FusedMLP)  # type: ignore[union-attr]
    plain = model()
    plain.embed.weight.data.copy_(unpack(shared).t())
    plain.attend = ours.attend
    for name in ("w1", "w2", "w3"):
        getattr(plain.mlp, name).weight.data = unpack(parts[f"mlp.{name}"]).t()
    torch.testing.assert_close(ours(IDS), plain(IDS), rtol=1e-4, atol=1e-3)


def test_one_module_in_two_places_is_named_once() -> None:
    shared = nn.Linear(32, 32)
    ours = nn.Sequential(shared, shared)
    packed = blocks(torch.randn(32, 32))
    with pytest.raises(InvalidProblem, match="0 and 1 are one module, used in two places; name one of them"):
        load_packed(ours, {"0": packed, "1": packed}, **REF)
    load_packed(ours, {"1": packed}, **REF)
    assert ours[0] is ours[1] and isinstance(ours[0], FusedLinear)


def test_blocks_stand_for_numbers_of_the_type_their_layer_had() -> None:
    ours = model().to(torch.bfloat16)
    load_packed(ours, {"embed": blocks(torch.randn(50, 32)), "attend": blocks(torch.randn(32, 32))}, **REF)
    assert ours.embed(IDS).dtype == torch.bfloat16
    x = ours.embed(IDS)
    asked = torchhal.explain(ours.attend, x).problem
    assert "mixed_dtypes" not in asked.features and ours(IDS).dtype == torch.bfloat16


def test_loading_is_taken_back_only_with_the_originals() -> None:
    ours, plain = model(), model()
    parts = {"attend": torchhal.pack_weight(torch.randn(32, 32))}
    load_packed(ours, parts, keep_original=True, **REF).restore()
    assert torch.equal(ours(IDS), plain(IDS))
    with pytest.raises(InvalidProblem, match="1 modules can not be restored"):
        load_packed(ours, parts, **REF).restore()


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("attened", blocks(torch.randn(32, 32)), r"no nn.Linear or nn.Embedding at 'attened'; did you mean attend\?"),
        ("attend.weight", blocks(torch.randn(32, 32)), r"did you mean attend\?"),
        ("mlp", blocks(torch.randn(32, 32)), "no nn.Linear or nn.Embedding at 'mlp'"),
        ("attend", torch.randn(32, 32), "attend expects a packed weight .* got Tensor"),
        ("mlp.w1", torchhal.pack_weight(torch.randn(64, 32)), r"\(K, N\) = \(32, 64\) and got .*; it was packed without transposed=True"),
        ("attend", blocks(torch.randn(32, 64)), r"\(K, N\) = \(32, 32\) and got \(64, 32\)$"),
        ("mlp.w2", blocks(torch.randn(32, 64)), "can not hold a packed weight: it has forward hooks"),
        ("embed", blocks(torch.randn(50, 32)), "its max_norm changes the table as it is read"),
    ],
)  # fmt: skip
def test_a_weight_that_does_not_fit_changes_nothing(name: str, weight: Any, message: str) -> None:
    ours = model()
    ours.mlp.w2.register_forward_hook(lambda *_: None)
    ours.embed.max_norm = 1.0
    before = dict(ours.named_modules())
    with pytest.raises(InvalidProblem, match=message):
        load_packed(ours, {"mlp.w3": blocks(torch.randn(64, 32)), name: weight}, **REF)
    assert dict(ours.named_modules()) == before


def test_a_compiled_mlp_calls_its_activation_whatever_form_it_has() -> None:
    torch._dynamo.reset()
    for activation in (lambda v: F.gelu(v, approximate="tanh"), lambda v: v.relu(), nn.SiLU()):
        ours = nn.Sequential(MLP(activation)).eval()
        optimize_linear(ours, **REF)
        x = torch.randn(2, 3, 32)
        torch.testing.assert_close(torch.compile(ours[0], fullgraph=True, backend="aot_eager")(x), ours(x))
