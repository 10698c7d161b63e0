"""The public functions under torch.compile, export and opcheck: one node, right results, no needless recompiling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_backends import Install, backend, constant_plan
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

import torchhal
from torchhal import ops, ops_families
from torchhal.attention_call import Call, Functions, build_problem, capture_score_mod, operands_of
from torchhal.selection import select

BIAS = torch.randn(64, requires_grad=True)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(
    fn: Callable[..., Any], backend: str = "aot_eager"
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(fn, fullgraph=True, backend=counter), counter


def nodes(counter: CompileCounterWithBackend) -> list[str]:
    return [str(node.target) for node in counter.graphs[-1].graph.nodes if "torchhal" in str(node.target)]


class Model(torch.nn.Module):
    """Attention whose function reads a parameter, a buffer of the module, a global and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.randn(4))
        self.window = 7
        self.soft = 0.5

    def forward(self, query: torch.Tensor, key: torch.Tensor, shift: torch.Tensor) -> Any:
        def mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            near = torch.tanh(score * self.soft) + BIAS[j] * self.slope[h] + shift
            return torch.where(i - j < self.window, near, -float("inf"))

        return torchhal.attention(query, key, key, score_mod=mod, return_lse=True)


def gradients(
    model: Model, run: Callable[..., Any], query: torch.Tensor, key: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [query, key, model.slope, BIAS]
    for leaf in leaves:
        leaf.grad = None
    out, lse = run(query, key, torch.tensor(0.25))
    (out.square().sum() + lse.clamp(-50, 50).sum()).backward()
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_a_function_with_captured_tensors_is_one_node_with_the_gradients_of_eager_mode() -> None:
    model = Model()
    run, counter = compiled(model)
    for length in (5, 9, 12):
        query = torch.randn(2, 4, length, 8, requires_grad=True)
        key = torch.randn(2, 4, 11, 8, requires_grad=True)
        for mine, eager in zip(
            gradients(model, run, query, key), gradients(model, model, query, key), strict=True
        ):
            torch.testing.assert_close(mine, eager)
    assert len(nodes(counter)) == 1
    assert counter.frame_count <= 2, "one static graph and one with symbolic lengths"


def test_another_value_of_a_captured_scalar_tensor_does_not_compile_again() -> None:
    run, counter = compiled(Model())
    query = torch.randn(1, 4, 6, 8)
    for value in (0.0, 1.0, -3.5):
        out, _ = run(query, query, torch.tensor(value))
    assert counter.frame_count == 1
    assert torch.isfinite(out).all()


def test_the_inductor_backend_gives_the_same() -> None:
    model = Model()
    run, _ = compiled(model, "inductor")
    query, key = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(2, 4, 11, 8, requires_grad=True)
    for mine, eager in zip(
        gradients(model, run, query, key), gradients(model, model, query, key), strict=True
    ):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


LENS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
TABLE = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)


def block_masked(q: torch.Tensor) -> Any:
    return torchhal.attention(q, q, q, block_mask=create_block_mask_for(q.shape[2]))


def create_block_mask_for(length: int) -> Any:
    return create_block_mask(
        lambda b, h, i, j: i >= j, None, None, length, length, device="cpu", BLOCK_SIZE=4
    )


def weighted(x: torch.Tensor, y: torch.Tensor) -> Any:
    total = x.sum()
    return torchhal.foreach_map(lambda a, b: a * total - b, [x], [y])


class Shift:
    amount = 2.0

    def apply(self, item: torch.Tensor) -> torch.Tensor:
        return item - self.amount


SHIFT = Shift()
FORMS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "plain": (lambda q: torchhal.attention(q, q, q, is_causal=True), (torch.randn(2, 4, 6, 8),)),
    "masked": (
        lambda q, m: torchhal.attention(q, q, q, attn_mask=m),
        (torch.randn(2, 4, 6, 8), torch.rand(6, 6) > 0.2),
    ),
    "transposed": (
        lambda q: torchhal.attention(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2)),
        (torch.randn(2, 6, 4, 8),),
    ),
    "one storage": (
        lambda x: torchhal.attention(*x.unflatten(-1, (3, 8)).permute(3, 0, 1, 2, 4).unbind()),
        (torch.randn(2, 4, 6, 24),),
    ),
    "grouped": (
        lambda q, k: torchhal.attention(q, k, k, enable_gqa=True),
        (torch.randn(2, 4, 6, 8), torch.randn(2, 2, 5, 8)),
    ),
    "shared batch": (
        lambda q, k: torchhal.attention(q, k, k),
        (torch.randn(2, 4, 6, 8), torch.randn(1, 4, 5, 8)),
    ),
    "varlen": (
        lambda q, n: torchhal.varlen_attention(q, q, q, n, n, mask_mod=lambda b, h, i, j: i >= j),
        (torch.randn(8, 4, 8), LENS),
    ),
    "paged": (
        lambda q, p, t, n: torchhal.paged_attention(
            q, p, p, t, n, is_causal=True, score_mod=lambda s, b, h, i, j: s - (i - j)
        ),
        (torch.randn(2, 4, 1, 8), torch.randn(4, 4, 3, 8), TABLE, torch.tensor([5, 6], dtype=torch.int32)),
    ),
    "matmul": (
        lambda a, b: torchhal.matmul(
            a, b, a_prologue=torch.relu, epilogue=lambda v, n, r, c: (v + BIAS[c], v * 2)
        ),
        (torch.randn(5, 6), torch.randn(6, 7)),
    ),
    "matmul plain": (
        lambda a, b: torchhal.matmul(a, b, bias=b[0]),
        (torch.randn(3, 5, 6), torch.randn(6, 7)),
    ),
    "foreach": (
        lambda x, y: torchhal.foreach_map(lambda a, b, c: (a - b * c, a * b), [x, y], [y, x], 0.5),
        (torch.randn(5), torch.randn(5)),
    ),
    "foreach kinds": (
        lambda x, y: torchhal.foreach_map(torch.mul, [x, y.bfloat16()], [1.5, 2]),
        (torch.randn(5), torch.randn(2, 3)),
    ),
    "foreach keyword": (
        lambda x, y: torchhal.foreach_map(torch.add, [x], [y], alpha=3),
        (torch.randn(5), torch.randn(5)),
    ),
    "foreach closing over a tensor made while tracing": (weighted, (torch.randn(5), torch.randn(5))),
    "foreach method": (lambda x: torchhal.foreach_map(SHIFT.apply, [x]), (torch.randn(5),)),
}


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_traces_as_one_node_and_equals_eager_mode(name: str) -> None:
    fn, inputs = FORMS[name]
    run, counter = compiled(fn)
    for mine, eager in zip(flat(run(*inputs)), flat(fn(*inputs)), strict=True):
        torch.testing.assert_close(mine, eager)
        assert mine.dtype == eager.dtype
    assert len(nodes(counter)) == 1


CHANGING: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "a float": (lambda xs, n: torchhal.foreach_map(torch.mul, xs, n), [0.5, 0.7, -1.5]),
    "a number on the left": (lambda xs, n: torchhal.foreach_map(torch.sub, n, xs), [0.5, 0.7]),
    "an exponent": (lambda xs, n: torchhal.foreach_map(torch.pow, xs, n), [2.0, 3.0, 0.5]),
    "a list": (lambda xs, n: torchhal.foreach_map(torch.mul, xs, n), [[0.5, 0.5], [0.5, 0.7], [0.9, 0.7]]),
    "a list of both signs of zero": (lambda xs, n: torchhal.foreach_map(torch.mul, xs, n), [[0.0, -0.0]]),
    "a list of an int and its float": (
        lambda xs, n: torchhal.foreach_map(torch.add, xs, n),
        [[1, 1.0], [2, 2.0]],
    ),
    "a keyword": (lambda xs, n: torchhal.foreach_map(torch.add, xs, xs, alpha=n), [0.5, 1.0, 3.0]),
    "an int": (lambda xs, n: torchhal.foreach_map(torch.add, xs, n), [2, 3, 4]),
    "an int closed over": (lambda xs, n: torchhal.foreach_map(lambda x: x * n, xs), [2, 3, 4]),
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
@pytest.mark.parametrize("shape", [(5,), ()])
def test_a_number_of_a_foreach_call_may_change(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    function, numbers = CHANGING[name]
    run, counter = compiled(function)
    xs = [torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype) for _ in range(2)]
    for number in numbers:
        if name in ("an exponent", "a keyword") and not dtype.is_floating_point:
            continue  # torch raises integers to no fraction, and adds no fraction of them
        found, wanted = run(xs, number), function(xs, number)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())
    if "int" in name and "list" not in name:
        assert counter.frame_count <= 2, "one trace for the first int and one for all"


def test_in_place_foreach_writes_its_destinations() -> None:
    def step(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> Any:
        return torchhal.foreach_map(torch.Tensor.add_, xs, ys)

    run, _ = compiled(step)
    xs, ys = [torch.ones(3), torch.ones(2, 2)], [torch.full((3,), 2.0), torch.full((2, 2), 3.0)]
    result = run(xs, ys)
    assert result[0] is xs[0]
    assert [x.unique().tolist() for x in xs] == [[3.0], [4.0]]


def test_a_block_mask_built_outside_is_honoured_at_every_length() -> None:
    run, counter = compiled(lambda q, mask: torchhal.attention(q, q, q, block_mask=mask))
    for length in (8, 12, 16, 20):
        q, mask = torch.randn(1, 2, length, 8), create_block_mask_for(length)
        torch.testing.assert_close(run(q, mask), torchhal.attention(q, q, q, is_causal=True))
    assert counter.frame_count <= 2


def test_use_around_a_compiled_call_is_a_guard(install: Install) -> None:
    install("five", backend("five", lambda problem: constant_plan(5.0), preference={"cpu": 10}))
    install("six", backend("six", lambda problem: constant_plan(6.0), preference={"cpu": 5}))
    run, counter = compiled(lambda q: torchhal.attention(q, q, q))
    q = torch.randn(1, 1, 3, 4)
    assert run(q).unique().tolist() == [5.0]
    with torchhal.use("six"):
        assert run(q).unique().tolist() == [6.0]
    assert run(q).unique().tolist() == [5.0]
    assert counter.frame_count == 2


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_torchs_own_attention_is_rerouted_under_the_mode(install: Install, arguments: dict[str, Any]) -> None:
    install("five", backend("five", lambda problem: constant_plan(5.0), preference={"cpu": 10}))
    run, counter = compiled(lambda q: F.scaled_dot_product_attention(q, q, q, **arguments))
    with torchhal.enable():
        for length in (3, 4, 5):
            assert run(torch.randn(1, 1, length, 4)).unique().tolist() == [5.0]
    assert counter.frame_count <= 2


def test_a_compiled_call_that_nobody_improves_is_torchs_own() -> None:
    run, _ = compiled(lambda q: F.scaled_dot_product_attention(q, q, q))
    q = torch.randn(2, 4, 6, 8)
    with torchhal.enable():
        torch.testing.assert_close(run(q), F.scaled_dot_product_attention(q, q, q))
    assert [route.chosen for route in torchhal.routes()] == ["torch"]


def test_multihead_attention_compiles_under_the_mode(install: Install) -> None:
    from torchhal.reference.attention import plan as reference_plan

    install("mine", backend("mine", reference_plan, preference={"cpu": 10}))
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected, _ = layer(x, x, x, need_weights=False)
    run, _ = compiled(lambda t: layer(t, t, t, need_weights=False)[0])
    with torchhal.enable():
        torch.testing.assert_close(run(x), expected)
    assert [route.chosen for route in torchhal.routes()] == ["mine"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, out of copy.deepcopy
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["masked", "varlen", "matmul", "foreach"])
def test_an_exported_program_holds_one_operator_and_runs(name: str, strict: bool) -> None:
    fn, inputs = FORMS[name]

    class Program(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            return fn(*tensors)

    with contextlib.nullcontext() if strict else torch.no_grad():
        program = torch.export.export(Program(), inputs, strict=strict)
    targets = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert sum(target.startswith("torchhal.") for target in targets) == 1
    for mine, eager in zip(flat(program.module()(*inputs)), flat(fn(*inputs)), strict=True):
        torch.testing.assert_close(mine, eager)


def attention_operator() -> tuple[Any, tuple[Any, ...]]:
    query = torch.randn(2, 6, 4, 8, requires_grad=True).transpose(1, 2)
    bias = torch.randn(16, requires_grad=True)
    captured = Functions(
        capture_score_mod(lambda s, b, h, i, j: s + bias[i - j + 5], query, query, query), None
    )
    call = Call(
        query,
        query,
        query,
        functions=captured,
        operands=operands_of(captured, None, 0.0, query),
        return_lse=True,
    )
    problem = build_problem(call)
    selected = select(problem)
    assert selected.plan is not None
    described = '{"names": ["query", "key", "value", "captured"], "scale": 0.5, "dropout_p": 0.0}'
    return torch.ops.torchhal.attention, ([query, query, query, bias], described, problem.text, "reference")


def test_the_attention_operator_passes_opcheck() -> None:
    operator, arguments = attention_operator()
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", ["matmul", "foreach"])
def test_the_other_operators_pass_opcheck(name: str) -> None:
    seen: list[tuple[Any, ...]] = []

    def record(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        for node in graph.graph.nodes:
            if str(node.target).startswith("torchhal."):
                seen.append((node.target, len(node.args[0]), node.args[1:]))
        return graph.forward

    fn, inputs = FORMS[name]
    torch.compile(fn, fullgraph=True, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=record))(
        *inputs
    )
    operator, count, rest = seen[0]
    sizes = {"matmul": [*inputs, BIAS], "foreach": [inputs[0], inputs[1], inputs[1], inputs[0]]}[name]
    assert count == len(sizes)
    torch.library.opcheck(operator, (sizes, *rest))


def test_every_family_with_tensors_has_an_operator() -> None:
    assert ops_families.define is ops.define
    assert set(ops.OPERATORS) == {"attention", "matmul", "foreach"}
