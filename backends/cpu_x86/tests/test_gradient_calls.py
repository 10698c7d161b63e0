"""Gradients as torch's machinery asks for them: operators, compilation, transforms, checkpoints, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradient_cases as cases
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from gradient_cases import CAPTURED, Problem, draw, native
from native_cases import OPS, Tensor, inputs, respread
from processes import printed_by
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchhal
from torchhal.errors import Unsupported

SCORE, (TABLE,) = CAPTURED["a table of distances for each head"]


def learning(**options: Any) -> Problem:
    """With a mask and a captured table that learn too."""
    main = inputs(2, 4, 2, 21, 35, 16, 24, torch.float32)
    return cases.learning(Problem(*main, draw((21, 35))[0], (TABLE,), SCORE, **options))


def loss(problem: Problem) -> Tensor:
    out, lse = native(problem)
    return out.square().sum() + lse.sin().sum()


# ---------------------------------------------------------------------------- operators


class Watch(TorchDispatchMode):
    """Remembers what the native operators are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "torchhal_cpu_x86":
            self.seen[func] = args
        return func(*args, **(kwargs or {}))


def arguments_of(call: Callable[[], Tensor]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What ``differentiable_attention`` and ``attention_backward`` get."""
    with Watch() as watch:
        call().sum().backward()
    forward, backward = (OPS.differentiable_attention.default, OPS.attention_backward.default)
    return watch.seen[forward], watch.seen[backward]


def owned(arguments: Sequence[Any], learn: bool) -> list[Any]:
    """With leaves in place of the tensors that were part of another graph."""
    found = []
    for x in arguments:
        if isinstance(x, list):
            found.append(owned(x, learn))
        elif isinstance(x, Tensor):
            copy = x.detach() if x.is_contiguous() else respread(x.detach(), "swapped")
            found.append(copy.requires_grad_(learn and x.is_floating_point()))
        else:
            found.append(x)
    return found


def call_of(layout: str) -> Callable[[], Tensor]:
    """A call in a layout, with swapped strides where there are four dimensions."""
    options: dict[str, Any] = {
        "score_mod": SCORE(TABLE.clone().requires_grad_()), "enable_gqa": True, "backend": "cpu_x86",
    }  # fmt: skip
    if layout == "dense":
        main = [respread(x, "swapped") for x in inputs(2, 4, 2, 21, 35, 16, 24, torch.float32)]
        mask = draw((21, 35))[0].requires_grad_()
        return lambda: torchhal.attention(*(x.requires_grad_() for x in main), attn_mask=mask, **options)  # type: ignore[return-value]
    if layout == "varlen":
        starts = torch.tensor([0, 5, 5, 21], dtype=torch.int32)
        main = [x.requires_grad_() for x in draw((21, 4, 16), (21, 2, 16), (21, 2, 24))]
        return lambda: torchhal.varlen_attention(*main, starts, starts, **options)  # type: ignore[return-value]
    table, lengths = (
        torch.tensor([[2, 0], [2, 1]], dtype=torch.int32),
        torch.tensor([7, 5], dtype=torch.int32),
    )
    main = [x.requires_grad_() for x in draw((2, 4, 3, 16), (3, 2, 4, 16), (3, 2, 4, 24))]
    return lambda: torchhal.paged_attention(*main, table, lengths, **options)  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["dense", "varlen", "paged"])
def test_both_operators_pass_opcheck(layout: str) -> None:
    forward, backward = arguments_of(call_of(layout))
    torch.library.opcheck(OPS.differentiable_attention.default, tuple(owned(forward, learn=True)))
    torch.library.opcheck(OPS.attention_backward.default, tuple(owned(backward, learn=False)))


@pytest.mark.parametrize(
    ("place", "given", "message"),
    [
        (6, "", "gradient is not one that torchhal_cpu_x86.gradients has written"),
        (7, torch.ones(2, 4, 21, 23), r"out \(2, 4, 21, 24\), grad_out \(2, 4, 21, 23\) and lse"),
        (7, torch.ones(2, 4, 21, 24).half(), "out and grad_out must be of the query's dtype"),
        (8, torch.ones(2, 4, 20), "grad_lse does not fit the lse"),
        (8, torch.ones(3), "grad_lse does not fit the lse"),
        (8, torch.ones(2, 4, 21).double(), "lse and grad_lse must be float32"),
        (9, torch.ones(2, 4, 20, 24), r"out \(2, 4, 20, 24\)"),
        (10, torch.ones(2, 4, 22), r"lse \(2, 4, 22\) do not fit the query \(2, 4, 21, 16\)"),
        (3, [], "attn_mask is missing"),
    ],
)
def test_results_that_are_not_the_forward_passs_are_refused(place: int, given: Any, message: str) -> None:
    _, backward = arguments_of(call_of("dense"))
    wrong = owned(backward, learn=False)
    wrong[place] = given
    with pytest.raises(RuntimeError, match=message):
        OPS.attention_backward(*wrong)


def test_a_second_derivative_is_refused_in_words() -> None:
    problem = learning()
    (gradient,) = torch.autograd.grad(loss(problem), problem.query, create_graph=True)
    with pytest.raises(
        Unsupported, match=r"first derivatives of attention and no second ones.*backend='reference'"
    ):
        gradient.sum().backward()


# ---------------------------------------------------------------------------- who asks


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "table"])
def test_one_tensor_can_learn_alone(name: str) -> None:
    problem = learning()
    expected = torch.autograd.grad(loss(problem), problem.leaves)
    place = ["query", "key", "value", "mask", "table"].index(name)
    leaves = [x.detach().requires_grad_(i == place) for i, x in enumerate(problem.leaves)]
    (found,) = torch.autograd.grad(loss(problem.over(leaves)), leaves[place])
    assert torch.equal(found, expected[place])


@pytest.mark.parametrize("kind", ["plain", "functions"])
def test_a_compiled_step_gives_the_gradients_of_an_eager_one(kind: str) -> None:
    problem = learning()
    if kind == "plain":
        problem = Problem(problem.query, problem.key, problem.value, causal=True)

    def step(*leaves: Tensor) -> Tensor:
        given = problem.over(leaves)
        out = torchhal.attention(
            given.query, given.key, given.value, attn_mask=given.mask, is_causal=given.causal, enable_gqa=True,
            score_mod=given.score and given.score(*given.captured), backend="cpu_x86",
        )  # fmt: skip
        return out.square().sum()  # type: ignore[union-attr]

    expected = torch.autograd.grad(step(*problem.leaves), problem.leaves)
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, eager in zip(torch.autograd.grad(run(*problem.leaves), problem.leaves), expected, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-6)


def test_a_checkpointed_call_gives_the_same_gradients() -> None:
    problem = learning()
    expected = torch.autograd.grad(loss(problem), problem.leaves)

    def again(*leaves: Tensor) -> Tensor:
        return loss(problem.over(leaves))

    found = torch.autograd.grad(checkpoint(again, *problem.leaves, use_reentrant=False), problem.leaves)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_gradient_by_torch_func_is_that_of_autograd(p: float) -> None:
    problem = learning()

    def dropped(query: Tensor) -> Tensor:
        torch.manual_seed(1)
        out, lse = native(problem.over([query, *problem.leaves[1:]]), dropout_p=p)
        return out.square().sum() + lse.sin().sum()

    (expected,) = torch.autograd.grad(dropped(problem.query), problem.query)
    found = torch.func.grad(dropped)(problem.query.detach())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_each_sample_has_a_gradient_of_its_own_by_torch_func() -> None:
    query, key, _ = inputs(3, 4, 4, 9, 11, 16, 16, torch.float32)

    def of_one(q: Tensor, k: Tensor) -> Tensor:
        return torchhal.attention(q[None], k[None], k[None], backend="cpu_x86").square().sum()  # type: ignore[union-attr]

    found = torch.func.vmap(torch.func.grad(of_one))(query, key)
    for i in range(3):
        own = query[i].clone().requires_grad_()
        torch.testing.assert_close(found[i], torch.autograd.grad(of_one(own, key[i]), own)[0])


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tangent_is_never_lost(place: int) -> None:
    problem = Problem(*inputs(2, 4, 2, 9, 11, 16, 24, torch.float32), causal=True)
    (tangent,) = draw(problem.leaves[place].shape, seed=4)

    def of_one(x: Tensor) -> Tensor:
        return native(problem.over([x if i == place else leaf for i, leaf in enumerate(problem.leaves)]))[0]

    def exact(x: Tensor) -> Tensor:
        leaves = [x if i == place else leaf.double() for i, leaf in enumerate(problem.leaves)]
        return cases.attend(problem.over(leaves))[0]

    start = problem.leaves[place]
    _, expected = torch.func.jvp(exact, (start.double(),), (tangent.double(),))
    _, found = torch.func.jvp(of_one, (start,), (tangent,))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        dual = of_one(forward_ad.make_dual(start, tangent))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, found)


def test_a_step_of_training_takes_memory_that_does_not_grow_with_the_square_of_the_length() -> None:
    code = """
        import resource, torch, torchhal
        torch.set_num_threads(1)
        table = torch.zeros(2, 33, requires_grad=True)
        def bias(s, b, h, q, k):
            return s + table[h, torch.clamp(k - q, -16, 16) + 16]
        def peak(length):
            q = torch.randn(1, 2, length, 16, requires_grad=True)
            for score_mod in (None, bias):
                torchhal.attention(q, q, q, is_causal=True, score_mod=score_mod, backend="cpu_x86").sum().backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak(256)
        small = peak(512)
        print(peak(4096) - small)
    """
    # Scores of 2 heads would take 128 MiB in float32; the tensors themselves take half a MiB each.
    assert printed_by(code) < 24 * 1024, "KiB"
