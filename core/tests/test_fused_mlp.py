"""Gated MLPs: found by what they compute, fused, and left alone where that would change anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_models import MLP, REF
from torch import nn

import torchhal
from torchhal.nn import FusedMLP, optimize_linear


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


def test_a_compiled_mlp_calls_its_activation_whatever_form_it_has() -> None:
    torch._dynamo.reset()
    for activation in (lambda v: F.gelu(v, approximate="tanh"), lambda v: v.relu(), nn.SiLU()):
        ours = nn.Sequential(MLP(activation)).eval()
        optimize_linear(ours, **REF)
        x = torch.randn(2, 3, 32)
        torch.testing.assert_close(torch.compile(ours[0], fullgraph=True, backend="aot_eager")(x), ours(x))
