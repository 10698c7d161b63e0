"""torch's attention served in the whole process. What is served, and how, is in test_mode.py for both ways."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_backends import Install, backend, constant_plan
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

import torchhal
from torchhal import Plan, installation
from torchhal.errors import ConfigurationError, Unsupported
from torchhal.problems import AttentionProblem
from torchhal.reference.attention import plan as reference_plan

Q = torch.randn(2, 4, 6, 8)


def attend() -> torch.Tensor:
    return F.scaled_dot_product_attention(Q, Q, Q)


EXPECTED = attend()


def counts() -> dict[str | None, int]:
    return {route.chosen: route.count for route in torchhal.routes()}


@pytest.fixture
def sevens(install: Install) -> None:
    """A backend whose results are full of sevens."""
    install("sevens", backend("sevens", lambda problem: constant_plan(7.0), preference={"cpu": 10}))


@pytest.fixture
def mine(install: Install) -> None:
    """A backend that serves everything, by way of the reference's code."""
    install("mine", backend("mine", reference_plan, preference={"cpu": 10}))


def test_it_reaches_every_thread_until_it_is_removed(sevens: object) -> None:
    found: list[float] = []
    installed = torchhal.install()
    threads = [threading.Thread(target=lambda: found.append(attend().mean().item())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    installed.remove()
    assert found == [7.0] * 8
    assert torch.equal(attend(), EXPECTED)


def test_removing_gives_back_all_that_was_changed_in_torch(sevens: object) -> None:
    import torch._functorch.config as functorch
    import torch.nn.attention.flex_attention as torch_flex

    def state() -> list[Any]:
        operator = "aten::scaled_dot_product_attention"
        python = (
            "Python" in torch._C._dispatch_dump(operator).split("CompositeImplicitAutograd[alias]")[1][:60]
        )
        changed = torch_flex.flex_attention_hop, torch.backends.mha.get_fastpath_enabled()
        return [*changed, functorch.enable_autograd_cache, python]

    before = state()
    with torchhal.install() as installed:
        assert state() != before
    assert state() == before
    installed.remove()  # once more
    assert state() == before
    assert installation.installed() is None


def test_a_second_installation_is_refused_and_the_first_one_stays(sevens: object) -> None:
    with torchhal.install("sevens"):
        with pytest.raises(ConfigurationError, match=r"installed already \(backend='sevens', strict=None\)"):
            torchhal.install()
        assert attend().mean().item() == 7.0
    with torchhal.install("reference"):
        assert attend().mean().item() != 7.0


def test_the_innermost_choice_decides(sevens: object) -> None:
    with torchhal.install("sevens"):
        with torchhal.enable("reference"):
            torch.testing.assert_close(attend(), EXPECTED)
        with torchhal.use("reference"):
            assert attend().mean().item() == 7.0  # an argument is stronger than use(), as everywhere
    with torchhal.install(), torchhal.use("reference"):
        torch.testing.assert_close(attend(), EXPECTED)


def test_a_mode_inside_that_leaves_a_call_to_torch_is_not_asked_over_again() -> None:
    with torchhal.install(), torchhal.enable():
        assert torch.equal(attend(), EXPECTED)
    assert counts() == {"torch": 1}


def test_other_function_modes_and_subclasses_see_the_call_as_without_it(mine: object) -> None:
    seen: list[Any] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Marked(torch.Tensor):
        pass

    with torchhal.install():
        with Watching(), torch.device("cpu"):
            torch.testing.assert_close(attend(), EXPECTED)
        marked = F.scaled_dot_product_attention(*[Q.as_subclass(Marked)] * 3)
    assert F.scaled_dot_product_attention in seen
    assert type(marked) is Marked
    torch.testing.assert_close(marked.as_subclass(torch.Tensor), EXPECTED)
    assert counts()["mine"] >= 1


def test_a_plan_that_calls_torchs_attention_gets_torchs(install: Install) -> None:
    def answer(problem: AttentionProblem) -> Plan:
        return Plan(
            lambda q, k, v, mask, scale, _: F.scaled_dot_product_attention(q, k, v, mask, scale=scale),
            "torch's",
        )

    install("lender", backend("lender", answer, preference={"cpu": 10}))
    with torchhal.install():
        torch.testing.assert_close(attend(), EXPECTED)
        torch.testing.assert_close(torchhal.attention(Q, Q, Q), EXPECTED)
    assert "lender" in counts()


def test_an_error_of_a_plan_comes_out_and_the_next_call_is_served_again(install: Install) -> None:
    outcomes = iter([ArithmeticError("once"), None])

    def run(query: torch.Tensor, *_: Any) -> torch.Tensor:
        if error := next(outcomes):
            raise error
        return query

    install("moody", backend("moody", lambda problem: Plan(run, ""), preference={"cpu": 10}))
    with torchhal.install():
        with pytest.raises(ArithmeticError, match="once"):
            attend()
        assert torch.equal(attend(), Q)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_compiled_function_is_served_with_any_length_and_without_a_new_trace_for_it(
    mine: object, grad: Any
) -> None:
    torch.compiler.reset()
    traces = []

    def compiler(graph: Any, inputs: Any) -> Any:
        traces.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    compiled = torch.compile(
        lambda x: F.scaled_dot_product_attention(x, x, x), fullgraph=True, backend=compiler
    )
    with torchhal.install(), grad():
        for length in (6, 7, 9, 12):
            x = torch.randn(2, 4, length, 8)
            scores = torch.softmax(x.double() @ x.double().mT / 8**0.5, -1) @ x.double()
            torch.testing.assert_close(compiled(x).double(), scores, atol=1e-5, rtol=1e-5)
    assert len(traces) == 2  # one for the first length, one for all
    assert set(counts()) == {"mine"}


def test_gradients_of_a_compiled_function_are_those_of_torch(mine: object) -> None:
    torch.compiler.reset()
    leaf, other = Q.clone().requires_grad_(), Q.clone().requires_grad_()
    compiled = torch.compile(
        lambda x: F.scaled_dot_product_attention(x, x, x), fullgraph=True, backend="aot_eager"
    )
    with torchhal.install():
        compiled(leaf).square().sum().backward()
    F.scaled_dot_product_attention(other, other, other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, atol=1e-4, rtol=1e-4)
    assert set(counts()) == {"mine"}


def test_exported_programs_hold_torchs_own_operator(mine: object) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    with torchhal.install():
        program = torch.export.export(Model(), (Q,))
    assert torch.ops.aten.scaled_dot_product_attention.default in [
        node.target for node in program.graph.nodes
    ]


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit", "ignore:There is a performance drop"
)  # torch's words for vmap
def test_scripted_code_and_function_transforms_give_what_torch_gives(mine: object) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, Q, x).square().sum()

    gradient = torch.func.grad(loss)(Q)
    with torchhal.install():
        torch.testing.assert_close(torch.jit.script(Model())(Q), EXPECTED)
        torch.testing.assert_close(torch.vmap(Model())(Q[None])[0], EXPECTED)
        torch.testing.assert_close(torch.func.grad(loss)(Q), gradient)


def test_explain_answers_as_the_installation_would(sevens: object, install: Install) -> None:
    install("shy", backend("shy", lambda problem: None))
    assert torchhal.explain(F.scaled_dot_product_attention, Q, Q, Q).chosen == "sevens"
    with torchhal.install("reference"):
        assert torchhal.explain(F.scaled_dot_product_attention, Q, Q, Q).chosen == "reference"
    with torchhal.install("shy"), pytest.raises(Unsupported):
        attend()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_mode_inside_decides_for_flex_attention_too(sevens: object) -> None:
    x = torch.randn(1, 2, 32, 16)
    expected = flex_attention(x, x, x)
    with torchhal.install("sevens"):
        assert flex_attention(x, x, x).mean().item() == 7.0
        with torchhal.enable("reference"):
            torch.testing.assert_close(flex_attention(x, x, x), expected)
    torch.testing.assert_close(flex_attention(x, x, x), expected)


def test_it_can_not_be_made_inside_compiled_code() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def program(x: torch.Tensor) -> torch.Tensor:
        torchhal.install()
        return x

    with pytest.raises(Exception, match="call it outside the compiled function"):
        program(Q)
    assert installation.installed() is None
