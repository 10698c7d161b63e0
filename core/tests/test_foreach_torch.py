"""Every ``torch._foreach_*`` call that is translated gives torch's own bits; every other one is left to torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_backends import Install
from torch import Tensor

import torchhal
from torchhal import BackendInfo, Capabilities, Plan, hookimpl
from torchhal.foreach import Policy
from torchhal.foreach_torch import TABLE, translate
from torchhal.problems import ForeachProblem
from torchhal.reference import foreach as reference
from torchhal.reference.plugin import FOREACH

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(5,), (33, 7), (0, 3), (), (130,)]
POSITIVE = ("acosh", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "pow")
UNARY = sorted(
    {f.__name__ for f, (rule, _) in TABLE.items() if not rule.second and rule.fn is not torch.zeros_like}
)


def lists(count: int, dtype: torch.dtype, name: str = "", seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = [[torch.randn(shape, generator=generator) * 3 for shape in SHAPES] for _ in range(count)]
    if any(name.removeprefix("_foreach_").rstrip("_") == p for p in POSITIVE):
        made[0] = [t.abs() + 0.01 for t in made[0]]
    return [[t.to(dtype) for t in items] for items in made]


def bits(tensor: Tensor) -> Tensor:
    """The pattern of bits, with one pattern for every NaN."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    plain = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return plain.contiguous().view(kinds[tensor.element_size()])


def check(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run both on their own copies and compare results, types, shapes, and what was written where."""
    mine = [
        [t.clone() for t in arg] if isinstance(arg, list) and isinstance(arg[0], Tensor) else arg
        for arg in args
    ]
    call = translate(function, mine, kwargs)
    assert call is not None
    found = call.run(Policy("reference"))
    wanted = function(*args, **kwargs)
    assert type(found) is type(wanted) and len(found) == len(wanted)
    if function.__name__.endswith("_"):
        assert found is mine[0]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_list_have_torchs_bits(name: str, dtype: torch.dtype) -> None:
    check(getattr(torch, name), *lists(1, dtype, name))


@pytest.mark.parametrize("suffix", ["", "_"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "div", "clamp_min", "clamp_max", "maximum", "minimum", "pow"]
)
def test_functions_of_two_have_torchs_bits_in_every_overload(
    name: str, dtype: torch.dtype, suffix: str
) -> None:
    function = getattr(torch, f"_foreach_{name}{suffix}")
    xs, ys = lists(2, dtype, name)
    check(function, *lists(2, dtype, name))
    half = dtype in (torch.bfloat16, torch.float16)
    uneven = [] if name == "pow" or (half and name == "mul" and suffix) else [2.1, -0.7, 1e-3]
    for number in (*uneven, 1.75, 3, 0.0, float("nan"), 2, 0.5, -1.0, -0.5):
        check(function, *lists(1, dtype, name), number)
    check(function, *lists(1, dtype, name), [*uneven, 2, -1.75, 0.5, 3, -0.5][: len(SHAPES)])
    if name in ("add", "mul", "div"):
        with_dimensions = [t for t in xs if t.dim()]
        check(function, with_dimensions, torch.tensor(2.1))
        check(function, [t for t in ys if t.dim()], torch.tensor(-0.3, dtype=torch.float64))
        check(function, xs, torch.tensor(2.1, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("suffix", ["", "_"])
def test_addcdiv_has_torchs_bits(dtype: torch.dtype, suffix: str) -> None:
    function = getattr(torch, f"_foreach_addcdiv{suffix}")
    check(function, *lists(3, dtype))
    check(function, *lists(3, dtype), value=-1.7)
    check(function, *lists(3, dtype), 0.37)
    check(function, *lists(3, dtype), [0.1, 2.0, -3.3, 1, 0.7])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_number_to_the_power_of_a_list_has_torchs_bits(dtype: torch.dtype) -> None:
    for base in (2.0, 0.3, 10):
        check(torch._foreach_pow, base, *lists(1, dtype))


def test_copy_and_zero_write_where_torch_does() -> None:
    check(torch._foreach_copy_, *lists(2, torch.float32))
    check(torch._foreach_copy_, lists(1, torch.bfloat16)[0], lists(1, torch.float64)[0], non_blocking=False)
    check(torch._foreach_zero_, *lists(1, torch.float16))


def test_types_may_differ_between_lists() -> None:
    check(torch._foreach_add, lists(1, torch.bfloat16)[0], lists(1, torch.float32)[0])
    check(torch._foreach_mul_, lists(1, torch.bfloat16)[0], lists(1, torch.float32)[0])


def test_strided_tensors_keep_their_strides() -> None:
    check(
        torch._foreach_mul,
        [torch.randn(4, 6).t(), torch.randn(8)[::2]],
        [torch.randn(4, 6).t(), torch.randn(4)],
    )


def test_keywords_name_the_second_operand() -> None:
    xs, ys = lists(2, torch.float32)
    check(torch._foreach_add, xs, other=ys)
    check(torch._foreach_add, xs, scalar=2.0)
    check(torch._foreach_pow, xs, exponent=2)


def test_the_optimizer_steps_that_torch_contracts_are_left_to_torch() -> None:
    xs, ys, zs = lists(3, torch.float32)
    assert translate(torch._foreach_addcmul, (xs, ys, zs), {}) is None
    assert translate(torch._foreach_lerp, (xs, ys, 0.3), {}) is None
    assert translate(torch._foreach_add, (xs, ys), {"alpha": 0.5}) is None
    assert translate(torch._foreach_add, (xs, ys), {"alpha": 1.0}) is not None


@pytest.mark.parametrize("name", ["norm", "max", "powsum", "lgamma", "lgamma_"])
def test_what_is_not_pointwise_or_has_no_word_is_left_to_torch(name: str) -> None:
    if not hasattr(torch, f"_foreach_{name}"):
        pytest.skip(f"_foreach_{name} is newer than this torch: powsum came with 2.11")
    assert translate(getattr(torch, f"_foreach_{name}"), lists(1, torch.float32), {}) is None


X = torch.randn(4)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch._foreach_add, ([X, X], [X]), {}),
        (torch._foreach_add, ([], []), {}),
        (torch._foreach_abs, ([],), {}),
        (torch._foreach_add, ([X], [torch.randn(3)]), {}),
        (torch._foreach_add_, ([torch.randn(1)], [X]), {}),
        (torch._foreach_add_, ([X, X], [X, X]), {}),
        (torch._foreach_add_, ([X[:3]], [X[1:]]), {}),
        (torch._foreach_exp, ([torch.arange(3)],), {}),
        (torch._foreach_exp, ([X.to(torch.complex64)],), {}),
        (torch._foreach_exp, ([X.to_sparse()],), {}),
        (torch._foreach_exp, ([X, X.to("meta")],), {}),
        (torch._foreach_mul, ([X], 2j), {}),
        (torch._foreach_mul, ([X], True), {}),
        (torch._foreach_mul, ([X], X), {}),
        (torch._foreach_mul, ([X],), {}),
        (torch._foreach_mul, ([X], 2.0), {"beta": 1}),
        (torch._foreach_sub, ([X], torch.tensor(2.0)), {}),
        (torch._foreach_add, ([X], [X], 1), {}),
        (torch._foreach_addcdiv, ([X], [X], 2.0), {}),
        (torch._foreach_addcdiv, ([X], [X], [X], torch.ones(1)), {}),
        (torch._foreach_addcdiv, ([X], [X], [X.double()]), {}),
        (torch._foreach_pow_, (2.0, [X]), {}),
        (torch._foreach_pow, ([X], 2.1), {}),
        (torch._foreach_mul_, ([X.bfloat16()], 2.1), {}),
        (torch._foreach_add, ([X, X[0]], torch.tensor(2.1, dtype=torch.float64)), {}),
        (torch._foreach_copy_, ([X], 2.0), {}),
        (torch._foreach_copy_, ([X], [X]), {"non_blocking": True}),
        (torch.add, (X, X), {}),
    ],
)
def test_what_torch_refuses_or_does_in_its_own_way_is_left_to_torch(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert translate(function, args, kwargs) is None


def test_writing_to_a_leaf_that_requires_grad_raises_as_torch_does() -> None:
    leaf = torch.randn(3, requires_grad=True)
    call = translate(torch._foreach_mul_, ([leaf], 2.0), {})
    assert call is not None
    with pytest.raises(
        RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"
    ):
        call.run(Policy("reference"))


def test_gradients_are_torchs() -> None:
    xs = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    call = translate(torch._foreach_div, (xs, [2.0, 3.0]), {})
    assert call is not None
    found = torch.autograd.grad([t.sum() for t in call.run()], xs)
    wanted = torch.autograd.grad([t.sum() for t in torch._foreach_div(xs, [2.0, 3.0])], xs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---------------------------------------------------------------------------- who serves them


def fuser(*devices: str) -> SimpleNamespace:
    """A backend for some devices that claims the foreach family."""

    @hookimpl
    def torchhal_backend() -> BackendInfo:
        capabilities = Capabilities(foreach=FOREACH)
        return BackendInfo(
            "fuser", "tests", frozenset(devices), ">=1.0,<2", capabilities, dict.fromkeys(devices, 9)
        )

    @hookimpl
    def torchhal_foreach(problem: ForeachProblem) -> Plan:
        return reference.plan(problem)

    return SimpleNamespace(torchhal_backend=torchhal_backend, torchhal_foreach=torchhal_foreach)


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "meta")], ids=str)
def test_under_the_mode_torchs_functions_are_served_by_whom_the_user_chose_and_left_alone_otherwise(
    install: Install, devices: tuple[str, ...]
) -> None:
    install("fuser", fuser(*devices))
    with torchhal.enable():
        torch._foreach_add([torch.zeros(2)], 1.0)
    assert not torchhal.routes()
    with torchhal.enable("fuser"):
        torch._foreach_add([torch.zeros(2)], 1.0)
    assert sum(route.count for route in torchhal.routes() if route.chosen == "fuser") == 1
