"""torchhal.optim against torch.optim, step by step; checkpoints both ways; and rules of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchhal import optim
from torchhal.errors import InvalidProblem
from torchhal.selection import routes

SHAPES = [(5, 7), (33,), (1,), (0,)]
CASES: list[tuple[type, type, dict[str, Any]]] = [
    (optim.AdamW, torch.optim.AdamW, {}),
    (optim.AdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "eps": 1e-6}),
    (optim.AdamW, torch.optim.AdamW, {"lr": torch.tensor(3e-3, dtype=torch.float64), "betas": (0.5, 0.9)}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
]
ULPS = {torch.float32: 6, torch.float64: 6}


class Twins:
    """The same parameters twice, ours and torch's, and gradients for both."""

    def __init__(self, ours: type, theirs: type, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=self.generator).to(dtype) for shape in SHAPES]
        self.mine = [torch.nn.Parameter(t.clone()) for t in start]
        self.torchs = [torch.nn.Parameter(t.clone()) for t in start]
        self.ours = ours(self.mine, **copy.deepcopy(options))
        self.theirs = theirs(self.torchs, **copy.deepcopy(options))

    def step(self, number: int) -> None:
        for index, (a, b) in enumerate(zip(self.mine, self.torchs, strict=True)):
            grad = torch.randn(a.shape, generator=self.generator).to(a.dtype)
            absent = index == 1 and number % 3 == 0
            a.grad, b.grad = (None, None) if absent else (grad, grad.clone())
        self.ours.step()
        self.theirs.step()

    def check(self, steps: int) -> None:
        """Parameters agree to a few units in the last place for each step that may have added one."""
        for a, b in zip(self.mine, self.torchs, strict=True):
            spacing = torch.finfo(a.dtype).eps * b.abs().clamp_min(2.0)
            assert ((a - b).abs() <= ULPS[a.dtype] * steps**0.5 * spacing).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_steps_are_torchs_and_checkpoints_load_either_way(
    ours: type, theirs: type, options: dict[str, Any], dtype: torch.dtype
) -> None:
    twins = Twins(ours, theirs, dtype, options)
    for number in range(20):
        twins.step(number)
    twins.check(20)
    mine, torchs = copy.deepcopy(twins.ours.state_dict()), copy.deepcopy(twins.theirs.state_dict())
    assert mine["param_groups"][0].keys() == torchs["param_groups"][0].keys()
    assert {k: v.keys() for k, v in mine["state"].items()} == {
        k: v.keys() for k, v in torchs["state"].items()
    }
    twins.ours.load_state_dict(torchs)
    twins.theirs.load_state_dict(mine)
    for number in range(20, 40):
        twins.step(number)
    twins.check(40)


def test_counts_are_each_parameters_own() -> None:
    twins = Twins(optim.AdamW, torch.optim.AdamW, torch.float32, {})
    for number in range(7):
        twins.step(number)
    steps = [float(twins.ours.state[p]["step"]) for p in twins.mine]
    assert steps == [float(twins.theirs.state[p]["step"]) for p in twins.torchs] == [7.0, 4.0, 7.0, 7.0]
    saved = [state["step"] for state in twins.ours.state_dict()["state"].values()]
    assert len({t.data_ptr() for t in saved}) == len(saved)


def test_a_parameter_without_a_gradient_keeps_the_count_it_shared() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = optim.AdamW([p, q])
    for absent in (False, True, False):
        p.grad, q.grad = torch.ones(3), None if absent else torch.ones(3)
        ours.step()
    assert [float(ours.state[t]["step"]) for t in (p, q)] == [3.0, 2.0]


def test_counts_are_float32_whatever_the_default() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    ours = optim.AdamW([p])
    p.grad = torch.ones(3)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        for _ in range(2):
            ours.step()
            assert ours.state[p]["step"].dtype is torch.float32
    finally:
        torch.set_default_dtype(before)


def test_a_checkpoint_of_a_capturable_fused_optimizer_goes_on_in_one_pass() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    theirs = torch.optim.AdamW([p], fused=True)
    p.grad = torch.ones(3)
    theirs.step()
    ours = optim.AdamW([q])
    ours.load_state_dict(theirs.state_dict())
    q.data.copy_(p.data)
    q.grad = p.grad
    theirs.step()
    ours.step()
    assert torch.allclose(p, q, rtol=1e-6) and ours.param_groups[0]["fused"] is None


class Pair:
    """The same parameters under a rule of ours with and without ``capturable``."""

    def __init__(self) -> None:
        self.params = [[torch.nn.Parameter(torch.ones(n)) for n in (3, 5, 2)] for _ in range(2)]
        self.rules = [optim.AdamW(p, capturable=c) for p, c in zip(self.params, (False, True), strict=True)]

    def step(self, absent: tuple[int, ...] = ()) -> None:
        for params, rule in zip(self.params, self.rules, strict=True):
            for number, param in enumerate(params):
                param.grad = None if number in absent else torch.full_like(param, 0.5 + number)
            rule.step()

    def counts(self, which: int) -> list[float]:
        return [float(self.rules[which].state[p]["step"]) for p in self.params[which]]

    def check(self) -> None:
        assert self.counts(0) == self.counts(1)
        for mine, other in zip(*self.params, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


def test_steps_that_count_on_the_device_are_those_that_count_on_the_host() -> None:
    pair = Pair()
    for absent in ((), (), (1,), (), (0, 2), (), (), ()):
        pair.step(absent)
        pair.check()


def test_counts_on_the_device_stay_where_they_are_so_that_graphs_count_on() -> None:
    pair = Pair()
    pair.step()
    counts = [pair.rules[1].state[p]["step"] for p in pair.params[1]]
    pair.step()
    assert [pair.rules[1].state[p]["step"] for p in pair.params[1]] == counts == [counts[0]] * 3
    assert float(counts[0]) == 2.0


def test_equal_counts_of_a_checkpoint_are_shared_again() -> None:
    pair = Pair()
    for absent in ((), (1,)):
        pair.step(absent)
    for rule in pair.rules:
        rule.load_state_dict(copy.deepcopy(rule.state_dict()))
    states = [pair.rules[1].state[p]["step"] for p in pair.params[1]]
    assert states[0] is states[2] is not states[1]
    for absent in ((), (2,), ()):
        pair.step(absent)
        pair.check()


def test_a_rate_on_the_host_is_read_at_every_step() -> None:
    p, rate = torch.nn.Parameter(torch.ones(3)), torch.tensor(0.0)
    rule = optim.AdamW([p], lr=rate, capturable=True)
    p.grad = torch.ones(3)
    rule.step()
    assert torch.equal(p, torch.ones(3))
    rate.fill_(0.5)
    rule.step()
    assert (p < 0.6).all()


def test_a_step_that_a_graph_would_repeat_with_the_same_count_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchhal.optim.rule.is_capturing", lambda device: True)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(InvalidProblem, match=r"AdamW is being captured .* same step count.*capturable=True"):
        optim.AdamW([p]).step()
    optim.AdamW([p], capturable=True).step()
    optim.SGD([p]).step()


def test_what_is_put_in_place_of_state_gradients_or_parameters_is_used() -> None:
    pair = Pair()
    for _ in range(3):
        pair.step()
    for params, rule in zip(pair.params, pair.rules, strict=True):
        rule.state[params[0]]["exp_avg"] = torch.ones(3)
        rule.state[params[1]] = {**rule.state[params[1]], "exp_avg": torch.ones(5)}
        rule.state[params[2]]["step"] = torch.tensor(40.0)
        for param in params:
            param.grad = torch.zeros_like(param)
        before = [p.detach().clone() for p in params]
        rule.step()
        assert all((p < b).all() for p, b in zip(params[:2], before, strict=False))
        assert rule.state[params[2]]["step"] == 41.0 and rule.state[params[0]]["step"] == 4.0
        params.append(torch.nn.Parameter(torch.ones(4)))
        params[3].grad = torch.ones(4)
        rule.add_param_group({"params": [params[3]]})
        rule.step()
        assert rule.state[params[3]]["step"] == 1.0 and (params[3] < 1).all()
        del rule.state[params[0]]
        rule.step()
        assert rule.state[params[0]]["step"] == 1.0
    pair.check()


def test_sparse_gradients_are_refused_after_dense_ones_too() -> None:
    p = param()[0]
    rule = optim.AdamW([p])
    p.grad = torch.ones(2, 2)
    for _ in range(2):
        rule.step()
    p.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(InvalidProblem, match="dense gradients"):
        rule.step()


def test_half_types_are_rounded_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.nn.Parameter(torch.randn(50).to(dtype))
        wide = torch.nn.Parameter(p.detach().float())
        p.grad = torch.randn(50).to(dtype)
        wide.grad = p.grad.float()
        optim.AdamW([p]).step()
        torch.optim.AdamW([wide]).step()
        assert torch.equal(p.detach(), wide.detach().to(dtype))


def test_lion_is_its_paper() -> None:
    p = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))
    x, m = p.detach().clone(), torch.zeros(9, dtype=torch.float64)
    lion = optim.Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    for _ in range(5):
        p.grad = torch.randn(9, dtype=torch.float64)
        g = p.grad
        x = x * (1 - 0.1 * 0.01) - 0.1 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        lion.step()
    assert torch.allclose(p.detach(), x, rtol=1e-14, atol=1e-14)


class Momentum(optim.Rule):
    """The rule of the documentation."""

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("velocity",)

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        return float(group["lr"]), group["momentum"]

    @staticmethod
    def update(param: Any, grad: Any, velocity: Any, lr: Any, momentum: Any) -> Any:
        velocity = velocity * momentum + grad
        return param - lr * velocity, velocity


def test_a_rule_of_ones_own_has_groups_schedulers_and_closures() -> None:
    a, b = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    rule = Momentum([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.25)
    schedule = torch.optim.lr_scheduler.StepLR(rule, 1, 0.5)

    def closure() -> Tensor:
        rule.zero_grad()
        loss = (a * 2 + b).sum()
        loss.backward()
        return loss

    assert rule.step(closure).item() == 12.0
    schedule.step()
    rule.step(closure)
    assert torch.allclose(a.detach(), 1 - torch.full((4,), 0.5 * 2 + 0.25 * 3.8))
    assert torch.allclose(b.detach(), 1 - torch.full((4,), 0.25 + 0.125 * 1.9))


def test_another_learning_rate_or_step_makes_no_other_plan() -> None:
    p = torch.nn.Parameter(torch.randn(17))
    p.grad = torch.randn(17)
    rule = optim.AdamW([p])
    rule.step()
    before = len(routes())
    for rate in (0.1, 0.2, torch.tensor(0.3)):
        rule.param_groups[0]["lr"] = rate
        rule.step()
    assert len(routes()) == before


def test_a_gradient_scaler_skips_steps_that_overflow() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    rule, scaler = optim.SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, wanted in ((float("inf"), 1.0), (1.0, 0.0)):
        rule.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(rule)
        scaler.update()
        assert torch.equal(p.detach(), torch.full((3,), wanted))


def param() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 2))]


def stepped(make: Callable[[], torch.nn.Parameter]) -> Callable[[], None]:
    def call() -> None:
        optim.AdamW([make()]).step()

    return call


def sparse() -> torch.nn.Parameter:
    p = param()[0]
    p.grad = torch.ones(2, 2).to_sparse()
    return p


def complex_valued() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    return p


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: optim.AdamW(param(), lr=-1.0), "lr must be 0 or more, got -1.0"),
        (lambda: optim.AdamW(param(), lr=torch.ones(2)), "one element"),
        (lambda: optim.AdamW(param(), betas=(0.9, 1.0)), "betas must be two of"),
        (lambda: optim.SGD(param(), nesterov=True), "with a momentum and without dampening"),
        (lambda: optim.AdamW(param(), differentiable=True), "does not have differentiable=True"),
        (lambda: optim.AdamW(param(), fused=False), "does not have fused=False.*no other"),
        (lambda: optim.SGD(param(), foreach=False), "does not have foreach=False"),
        (stepped(sparse), "dense gradients.*SparseAdam"),
        (stepped(complex_valued), "real parameters.*view_as_real"),
    ],
)
def test_what_can_not_be_honoured_is_refused_in_words(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InvalidProblem, match=words):
        call()
