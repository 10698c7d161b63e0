"""What a plan does not fuse is named, and refused where the caller requires fusion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_support import invoke
from fake_backends import Install

import torchhal
from torchhal import BackendInfo, Capabilities, Plan, hookimpl
from torchhal.cli.run import show_routes
from torchhal.errors import FallbackWarning, InvalidProblem, Unsupported
from torchhal.matmul import Call, build_problem, capture_functions, matmul, pack_weight
from torchhal.problems import FUSIONS, Decline, MatmulClaims, MatmulProblem
from torchhal.reference import matmul as reference

X = torch.randn(3, 4)
PACKED = pack_weight(torch.randn(4, 3))
CLAIMS = MatmulClaims(
    dtypes=frozenset({torch.float32}),
    **{name: True for name, kind in MatmulClaims.__annotations__.items() if kind == "bool"},
)


def backend(
    name: str, unfused: Mapping[str, str] | Callable[[MatmulProblem], Plan], preference: int
) -> SimpleNamespace:
    """The reference's arithmetic under another name, which says of itself that it leaves ``unfused`` unfused."""

    @hookimpl
    def torchhal_backend() -> BackendInfo:
        capabilities = Capabilities(matmul=CLAIMS)
        return BackendInfo(name, "tests", frozenset({"cpu"}), ">=1.0,<2", capabilities, {"cpu": preference})

    @hookimpl
    def torchhal_matmul(problem: MatmulProblem) -> Plan | Decline | None:
        if callable(unfused):
            return unfused(problem)
        run = reference.plan(problem).run
        return Plan(run, unfused={k: v for k, v in unfused.items() if k in problem.features})

    return SimpleNamespace(torchhal_backend=torchhal_backend, torchhal_matmul=torchhal_matmul)


@pytest.fixture
def two(install: Install) -> None:
    """``part`` is preferred and does not fuse epilogues; ``whole`` fuses everything."""
    install("part", backend("part", {"epilogue": "its kernel has no room for one"}, 20))
    install("whole", backend("whole", {}, 10))


def chosen(**options: Any) -> torchhal.Route:
    return torchhal.explain(matmul, X, X.mT, **options)


def test_by_default_the_preferred_backend_serves_and_the_route_names_what_it_leaves_unfused(
    two: None,
) -> None:
    route = chosen(epilogue=torch.relu)
    assert route.chosen == "part"
    assert route.unfused == {"epilogue": "its kernel has no room for one"}
    assert "\n  unfused epilogue: its kernel has no room for one\n" in str(route)
    assert json.loads(route.to_json())["unfused"] == dict(route.unfused)
    assert chosen(bias=torch.randn(3)).unfused == {}


def test_required_fusion_goes_to_the_next_backend_and_says_why_not_to_the_first(two: None) -> None:
    with pytest.warns(
        FallbackWarning, match=r"part: does not fuse epilogue: its kernel .*\[unfused_epilogue\]"
    ):
        matmul(X, X.mT, epilogue=torch.relu, fusion="require")
    route = chosen(epilogue=torch.relu, fusion="require")
    assert route.chosen == "whole" and route.unfused == {}
    assert dict(route.declined)["part"].code == "unfused_epilogue"


def test_required_fusion_changes_nothing_where_everything_is_fused(two: None) -> None:
    assert chosen(fusion="require").chosen == chosen(bias=torch.randn(3), fusion="require").chosen == "part"


def test_the_two_answers_do_not_mix_in_the_plan_cache(two: None) -> None:
    taken = []
    for fusion in ("report", "require", "report", "require"):
        before = {id(r): r.count for r in torchhal.routes()}
        with pytest.warns(FallbackWarning) if fusion == "require" and len(taken) < 2 else _quiet():
            matmul(X, X.mT, epilogue=torch.relu, fusion=fusion)
        taken += [r.chosen for r in torchhal.routes() if r.count > before.get(id(r), 0)]
    assert taken == ["part", "whole", "part", "whole"]


def test_a_backend_chosen_by_name_that_does_not_fuse_is_refused(two: None) -> None:
    with pytest.raises(Unsupported, match=r"backend='part'(.|\n)*\[unfused_epilogue\]") as caught:
        matmul(X, X.mT, epilogue=torch.relu, backend="part", fusion="require")
    assert caught.value.route is not None and caught.value.route.chosen is None


def test_strict_mode_forbids_the_fallback_that_required_fusion_asks_for(
    two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHHAL_STRICT", "1")
    with pytest.raises(Unsupported, match=r"strict mode forbids the fallback(.|\n)*unfused_epilogue"):
        matmul(X, X.mT, epilogue=torch.relu, fusion="require")


def test_the_reference_fuses_nothing_and_says_what_it_does_instead() -> None:
    scale = torch.randn(3)
    options: dict[str, Any] = {
        "bias": torch.randn(3),
        "a_prologue": torch.relu,
        "b_prologue": torch.relu,
        "epilogue": lambda v, b, m, n: v * scale[n],
    }
    assert set(chosen(**options).unfused) == {"a_prologue", "b_prologue", "bias", "epilogue"}
    assert chosen().unfused == {}
    with pytest.raises(
        Unsupported,
        match=r"reference: does not fuse a_prologue: the whole of a is rewritten first; .*\[unfused_a_prologue\]",
    ):
        matmul(X, X.mT, fusion="require", **options)
    with pytest.raises(Unsupported, match=r"the whole weight is dequantised first \[unfused_packed_int8\]"):
        matmul(X, PACKED, fusion="require")
    assert matmul(X, X.mT, fusion="require").shape == (3, 3), "a bare product has nothing to fuse"


@pytest.mark.parametrize("value", ["required", "", True, None, ["require"]])
def test_another_value_of_fusion_is_refused(value: Any) -> None:
    with pytest.raises(InvalidProblem, match=r'fusion expects "report" or "require" and got '):
        matmul(X, X.mT, fusion=value)


@pytest.mark.parametrize(
    ("unfused", "message"),
    [
        ({"softmax": "no"}, r"a reason for each of a_prologue, .* got 'softmax': 'no'"),
        ({"epilogue": ""}, r"got 'epilogue': ''"),
    ],
)
def test_a_plan_takes_reasons_for_known_fusions_alone(unfused: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        Plan(print, unfused=unfused)


def test_every_fusion_is_a_feature_that_backends_claim() -> None:
    known = set(vars(CLAIMS))
    assert set(FUSIONS) <= known


def test_a_plan_that_leaves_unfused_what_nobody_asked_for_is_a_fault_of_its_backend(install: Install) -> None:
    install("odd", backend("odd", lambda problem: Plan(print, unfused={"b_prologue": "no"}), 20))
    route = chosen(epilogue=torch.relu)
    assert route.chosen == "reference"
    reason = dict(route.declined)["odd"]
    assert reason.code == "hook_error" and "leaves b_prologue unfused, which this problem has not" in str(
        reason
    )


def test_a_plan_with_unfused_parts_stays_hashable() -> None:
    functions = capture_functions(torch.float32, None, None, torch.relu)
    assert hash(reference.plan(build_problem(Call(X, X.mT, functions=functions))))


def test_the_table_of_torchhal_run_names_what_is_unfused(
    two: None, capsys: pytest.CaptureFixture[str]
) -> None:
    matmul(X, X.mT, epilogue=torch.relu)
    show_routes(torchhal.routes(), SimpleNamespace(threads=[]))  # type: ignore[arg-type]
    assert "unfused epilogue" in " ".join(capsys.readouterr().err.split())


def test_the_command_line_asks_what_is_fused() -> None:
    asked = ["explain", "matmul", "--epilogue", "relu", "--json"]
    answer = invoke(*asked)
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["unfused"] == {"epilogue": "it is applied to the finished product"}
    refused = invoke(*asked, "--fused")
    assert refused.exit_code != 0
    assert json.loads(refused.stdout)["declined"][-1]["code"] == "unfused_epilogue"


def test_a_compiled_call_requires_fusion_as_an_eager_one_does(two: None) -> None:
    torch._dynamo.reset()

    def step(x: torch.Tensor) -> Any:
        return matmul(x, x.mT, epilogue=torch.relu, fusion="require")

    with pytest.warns(FallbackWarning, match="unfused_epilogue"):
        out = torch.compile(step, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(out, (X @ X.mT).relu())
    (route,) = torchhal.routes()
    assert route.chosen == "whole"


def test_a_compiled_call_that_nobody_fuses_fails_with_the_reasons() -> None:
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: matmul(x, x.mT, epilogue=torch.relu, fusion="require"), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"applied to the finished product \[unfused_epilogue\]"):
        run(X)


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings()
