"""Models whose layers were swapped: the way back, files, devices, training, compiling, and weights packed elsewhere."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from linear_models import IDS, MLP, REF, Model, blocks, model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchhal
from torchhal.errors import InvalidProblem
from torchhal.nn import FusedLinear, FusedMLP, load_packed, optimize_linear
from torchhal.reference.packing import unpack

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
