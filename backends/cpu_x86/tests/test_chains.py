"""Layers on packed weights whose products are prepared once and run by one native call: results, and what must be noticed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import LIBRARY, Tensor
from test_packed import assert_close, weights
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import torchhal
from torchhal.errors import InvalidProblem
from torchhal.nn import FusedLinear, FusedMLP, optimize_linear
from torchhal.reference.packing import unpack
from torchhal_cpu_x86 import products

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")
HALVES = (torch.bfloat16, torch.float16)


class MLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(64, 96, bias),
            nn.Linear(64, 96, bias),
            nn.Linear(96, 64, bias),
        )
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def mlp(bias: bool = True, **packing: Any) -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(MLP(bias)).eval()
    optimize_linear(model, backend="cpu_x86", **{"weight": "int8", "group": 32, **packing})
    assert isinstance(model[0], FusedMLP)
    return model


def linear(weight: Any, bias: Tensor | None = None) -> FusedLinear:
    return FusedLinear(weight, None if bias is None else nn.Parameter(bias), backend="cpu_x86").eval()


def one_by_one(module: Any, x: Tensor) -> Tensor:
    """What the module gives where gradients may be wanted: every product by a call of its own."""
    result: Tensor = module(x)
    return result.detach()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails every product that is asked for by itself."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a product was asked for by itself")

    monkeypatch.setattr(products, "multiply", refuse)


sizes = st.integers(1, 70)
leading = st.sampled_from([(), (1,), (1, 1), (3,), (2, 3), (17,), (0,), (2, 0)])


@pytest.mark.sanitized
@settings(max_examples=60, deadline=None)
@given(weight=weights(st.sampled_from([32, 64, 96]) | sizes, sizes), shape=leading, has_bias=st.booleans(),
       dtype=st.sampled_from([torch.float32, *HALVES]), seed=st.integers(0, 99))  # fmt: skip
def test_a_layer_gives_the_product_within_rounding_and_the_bits_of_a_call_of_its_own(
    weight: Any, shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    if 0 in weight.shape:
        return
    torch.manual_seed(seed)
    x = torch.randn(*shape, weight.shape[0]).to(dtype)
    bias = torch.randn(weight.shape[1]) if has_bias else None
    layer = linear(weight, bias)
    with torch.no_grad():
        found = layer(x)
    assert torch.equal(found, one_by_one(layer, x)) and found.dtype == dtype
    assert found.shape == (*shape, weight.shape[1])
    if dtype == torch.float32 and x.numel():
        rows = x.reshape(-1, x.shape[-1])
        assert_close(found.reshape(rows.shape[0], -1), rows, unpack(weight, torch.float64), bias)


@pytest.mark.parametrize(
    "packing", [{"weight": "int8"}, {"weight": "int4"}, {"weight": "int4", "symmetric": False, "group": None}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_mlp_is_what_its_dequantised_weights_give_in_float64(
    packing: Any, bias: bool, alone: None
) -> None:
    model = mlp(bias, **packing)
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        found = model(x)

    def product(value: Tensor, layer: FusedLinear) -> Tensor:
        added = 0.0 if layer.bias is None else layer.bias.detach().double()
        assert layer.packed is not None
        return value @ unpack(layer.packed.weight, torch.float64) + added

    gate, up, down = model[0].linked()
    hidden = torch.nn.functional.silu(product(x.double(), gate)) * product(x.double(), up)
    torch.testing.assert_close(found.double(), product(hidden, down), rtol=1e-5, atol=1e-6)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_gated_mlp_gives_the_bits_of_three_products(dtype: torch.dtype, rows: int) -> None:
    model, x = mlp().to(dtype), torch.randn(rows, 64).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(x), one_by_one(model, x))


def test_each_product_of_a_chain_counts_as_a_call_of_its_route() -> None:
    model, x = mlp(), torch.randn(1, 64)
    torchhal.selection.reset()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert sum(route.count for route in torchhal.routes() if route.chosen == "cpu_x86") == 9


# ---------------------------------------------------------------------------- what must be noticed


def replace_bias(model: Any) -> None:
    model[0].gate.bias = nn.Parameter(torch.ones(96))


def write_bias(model: Any) -> None:
    with torch.no_grad():
        model[0].up.bias.add_(1)


def point_bias_elsewhere(model: Any) -> None:
    model[0].down.bias.data = torch.full((64,), 7.0)


def load_other_weights(model: Any) -> None:
    torch.manual_seed(9)
    other = nn.Sequential(MLP(True)).eval()
    optimize_linear(other, weight="int8", group=32, backend="cpu_x86")
    model.load_state_dict(other.state_dict(), assign=True)


def point_weight_elsewhere(model: Any) -> None:
    packed = model[0].down.packed
    packed.data.data = packed.data.clone().zero_()


def replace_layer(model: Any) -> None:
    model[0].up = linear(torchhal.pack_weight(torch.randn(64, 96), group=32))


def hook_layer(model: Any) -> None:
    model[0].gate.register_forward_hook(lambda _m, _i, out: out * 2)


def hook_down(model: Any) -> None:
    model[0].down.register_forward_hook(lambda _m, _i, out: out * 2)


def replace_forward(model: Any) -> None:
    model[0].down.forward = lambda value: value[..., :64] * 3


def convert(model: Any) -> None:
    model.bfloat16()


def choose_reference(model: Any) -> None:
    for layer in model[0].linked():
        layer.backend = "reference"


def forget(model: Any) -> None:
    torchhal.selection.reset()


CHANGES = (
    replace_bias, write_bias, point_bias_elsewhere, load_other_weights, point_weight_elsewhere, replace_layer, hook_layer,
    hook_down, replace_forward, convert, choose_reference, forget,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_after_the_first_call_is_seen_by_the_next(change: Callable[[Any], None]) -> None:
    model, x = mlp(), torch.randn(2, 64)
    with torch.no_grad():
        before = model(x)
    change(model)
    x = x.to(model[0].down.bias.dtype)
    with torch.no_grad():
        after = model(x)
    torch.testing.assert_close(after, one_by_one(model, x))
    assert change in (convert, choose_reference, forget) or not torch.allclose(after, before)


def test_hooks_on_all_modules_see_the_layers_of_an_mlp() -> None:
    model, x, seen = mlp(), torch.randn(2, 64), []
    with torch.no_grad():
        model(x)
        handle = nn.modules.module.register_module_forward_hook(lambda m, _i, _o: seen.append(m))
        try:
            model(x)
        finally:
            handle.remove()
    assert model[0].gate in seen and model[0].down in seen


def test_copies_and_pickles_of_a_model_that_ran_compute_with_weights_of_their_own() -> None:
    model, x = mlp(), torch.randn(2, 64)
    with torch.no_grad():
        wanted = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            twin[0].down.bias.add_(1)
            assert torch.equal(model(x), wanted)
            torch.testing.assert_close(twin(x), wanted + 1)


# ---------------------------------------------------------------------------- what is no plain call


def test_gradients_autocast_transforms_and_scopes_are_served_by_the_products_themselves() -> None:
    model, x = mlp(), torch.randn(2, 64)
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.vmap(model)(x), plain)
        with torchhal.use("cpu_x86"):
            torch.testing.assert_close(model(x), plain)
        torch.testing.assert_close(torch.func.jvp(model, (x,), (x,))[0], plain)
    learned = x.clone().requires_grad_()
    model(learned).sum().backward()
    assert learned.grad is not None and learned.grad.abs().sum() > 0


@pytest.mark.sanitized
def test_inputs_of_any_strides_give_what_contiguous_ones_do() -> None:
    model = mlp()
    x = torch.randn(64, 5, 3).permute(2, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x.contiguous()))
        torch.testing.assert_close(model(x[:, ::2]), model(x[:, ::2].contiguous()))


@pytest.mark.sanitized
@pytest.mark.parametrize("x", [torch.randn(2, 63), torch.tensor(1.0), torch.ones(2, 64, dtype=torch.int64)])
def test_inputs_that_mean_nothing_are_refused_as_without_a_chain(x: Tensor) -> None:
    layer = linear(torchhal.pack_weight(torch.randn(64, 8)))
    with pytest.raises(InvalidProblem) as slow:
        layer(x)
    with torch.no_grad(), pytest.raises(InvalidProblem) as quick:
        layer(x)
    assert str(quick.value) == str(slow.value)


# ---------------------------------------------------------------------------- compiled graphs


@pytest.mark.parametrize(("model", "products", "sizes"), [(lambda: linear(torchhal.pack_weight(torch.randn(64, 9))), 1, (2, 5, 9)),
                                                            (mlp, 3, (2,))], ids=["layer", "mlp"])  # fmt: skip
def test_a_compiled_graph_holds_one_native_operator_for_each_product(
    model: Callable[[], Any], products: int, sizes: tuple[int, ...]
) -> None:
    module, graphs = model(), []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in sizes:
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), module(x))
    called = [
        str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"
    ]
    assert len(graphs) == 1 and sum("torchhal_cpu_x86.products" in name for name in called) == products
    assert not any(name.startswith("torchhal.") for name in called)


# ---------------------------------------------------------------------------- the operator


def bound(required: int) -> tuple[str, list[Tensor]]:
    """The text of one int8 product (4, 3), and its parts."""
    return f"{required} 0 1 0 4 3 4 0 -1 -1 0 0 -1 0 0", [
        torch.ones(4, 3, dtype=torch.int8),
        torch.ones(1, 3),
    ]


def test_the_operator_has_the_shapes_that_a_compiler_is_told() -> None:
    text, parts = bound(1)
    operator = torch.ops.torchhal_cpu_x86.products.default
    torch.library.opcheck(
        operator, (torch.ones(2, 5, 4), parts, text), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.sanitized
@pytest.mark.parametrize("a", [torch.ones(2, 5), torch.ones(2, 4, dtype=torch.float64), torch.ones(4, 2).t()])
def test_operands_that_are_not_as_the_chain_says_give_nothing_or_where_required_an_error(a: Tensor) -> None:
    operator = torch.ops.torchhal_cpu_x86.products.default
    text, parts = bound(0)
    assert operator(a, parts, text) == []
    with pytest.raises(RuntimeError, match="an operand is not as the chain says: .* a (has|is)"):
        operator(a, parts, bound(1)[0])


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "parts",
    [
        [torch.ones(4, 2, dtype=torch.int8), torch.ones(1, 3)],
        [torch.ones(4, 3, dtype=torch.uint8), torch.ones(1, 3)],
        [torch.ones(3, 4, dtype=torch.int8).t(), torch.ones(1, 3)],
        [torch.ones(4, 3, dtype=torch.int8), torch.ones(2, 3)],
    ],
)
def test_parts_of_another_size_type_or_order_are_never_read(parts: list[Tensor]) -> None:
    with pytest.raises(RuntimeError, match="a part has another"):
        torch.ops.torchhal_cpu_x86.products.default(torch.ones(1, 4), parts, bound(1)[0])


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "text",
    [
        "", "1 0", "x", "1 0 1", "1 3 1 0 4 3 4 0 -1 -1 0 0 -1 0 0",  # types
        "1 0 1 9 4 3 4 0 -1 -1 0 0 -1 0 0", "1 0 1 0 0 3 4 0 -1 -1 0 0 -1 0 0", "1 0 1 2 33 3 1 0 -1 -1 0 0 -1 0 0",
        "1 0 1 0 4 3 4 0 0 -1 0 0 -1 0 0", "1 0 1 0 4 3 4 0 -1 0 0 0 -1 0 0",  # reads itself
        "1 0 1 0 4 3 4 0 -1 -1 0 0 -1 0 5 1", "1 0 1 0 4 3 4 0 -1 -1 0 0 -1 0 0 0",  # words
        "1 0 2 0 4 3 4 0 -1 -1 0 0 -1 0 0 0 4 3 4 0 0 -1 0 0 -1 0 0",  # three columns are no four rows
    ],
)  # fmt: skip
def test_a_text_that_is_no_chain_is_refused(text: str) -> None:
    parts = bound(1)[1]
    with pytest.raises(RuntimeError, match="chain is none"):
        torch.ops.torchhal_cpu_x86.products.default(torch.ones(1, 4), parts, text)


@pytest.mark.sanitized
def test_another_number_of_parts_is_refused_with_both_numbers() -> None:
    text, parts = bound(1)
    with pytest.raises(RuntimeError, match="takes 2 parts, got 1"):
        torch.ops.torchhal_cpu_x86.products.default(torch.ones(1, 4), parts[:1], text)
