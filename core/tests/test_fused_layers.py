"""Fused and packed layers by themselves: results, types, names of arguments, and what is done to them later."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_models import IDS, MLP, REF, blocks, few, model
from torch import nn
from torch.nn.utils import parametrize, prune

import torchhal
from torchhal.errors import InvalidProblem
from torchhal.nn import FusedLinear, FusedMLP, PackedEmbedding, load_packed, optimize_linear
from torchhal.reference.packing import unpack


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
