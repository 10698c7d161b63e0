"""Selection: the order of strength, fallbacks, ambiguity, and what a Route says."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from fake_backends import EVERYTHING, Install, backend, constant_plan

import torchhal
from torchhal import Decline, Plan, _caches, lock
from torchhal.errors import (
    AmbiguousBackends,
    BackendWarning,
    ConfigurationError,
    FallbackWarning,
    InvalidProblem,
    Unsupported,
)
from torchhal.problems import AttentionClaims, AttentionProblem, Problem
from torchhal.registry import registry
from torchhal.selection import reset, select

QUERY = torch.randn(1, 2, 3, 4)


def serve(value: float, install: Install, name: str, preference: int = 10, **info: object) -> None:
    install(name, backend(name, lambda problem: constant_plan(value), preference={"cpu": preference}, **info))  # type: ignore[arg-type]


def winner() -> float:
    return float(torchhal.attention(QUERY, QUERY, QUERY)[0, 0, 0, 0])  # type: ignore[index]


# ---------------------------------------------------------------------------- order of strength


def test_each_rule_beats_the_next_weaker_one(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    for value, name in enumerate(["argument", "scope", "family", "general", "locked", "preferred"], start=1):
        serve(float(value), install, name, preference=20 if name == "preferred" else 10 - value)
    assert winner() == 6.0
    path = tmp_path / "selection.lock.json"  # type: ignore[operator]
    problem = torchhal.explain(torchhal.attention, QUERY, QUERY, QUERY).problem
    lock.write(registry(), {problem.text: {"backend": "locked"}}, path)
    monkeypatch.setenv("TORCHHAL_LOCK", str(path))
    reset()
    assert winner() == 5.0
    monkeypatch.setenv("TORCHHAL_BACKEND", "general")
    reset()
    assert winner() == 4.0
    monkeypatch.setenv("TORCHHAL_ATTENTION_BACKEND", "family")
    reset()
    assert winner() == 3.0
    with torchhal.use("scope"):
        assert winner() == 2.0
        assert torchhal.attention(QUERY, QUERY, QUERY, backend="argument").unique().tolist() == [1.0]
    assert winner() == 3.0


def test_a_list_in_the_environment_is_tried_in_its_order(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("shy", backend("shy", lambda problem: Decline("busy", "is busy")))
    serve(2.0, install, "second")
    monkeypatch.setenv("TORCHHAL_BACKEND", "shy, second")
    reset()
    assert winner() == 2.0


def test_an_explicit_choice_that_declines_raises_with_its_reason(install: Install) -> None:
    install("shy", backend("shy", lambda problem: Decline("busy", "all its units are busy")))
    with pytest.raises(Unsupported, match=r"all its units are busy \[busy\]") as caught:
        torchhal.attention(QUERY, QUERY, QUERY, backend="shy")
    assert caught.value.route is not None
    assert caught.value.route.declined[0][1].code == "busy"


def test_what_a_backend_never_heard_of_is_declined_before_it_is_asked(install: Install) -> None:
    asked: list[AttentionProblem] = []

    def answer(problem: AttentionProblem) -> Plan:
        asked.append(problem)
        return constant_plan(1.0)

    old = AttentionClaims(dtypes=EVERYTHING.dtypes, layouts=EVERYTHING.layouts)
    install("old", backend("old", answer, claims=old))
    mask = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(Unsupported, match=r"does not claim boolean_mask, lse \[unclaimed_feature\]"):
        torchhal.attention(QUERY, QUERY, QUERY, attn_mask=mask, return_lse=True, backend="old")
    assert asked == []


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        (dataclasses.replace(EVERYTHING, dtypes=frozenset()), "does not claim torch.float32"),
        (dataclasses.replace(EVERYTHING, layouts=frozenset({"paged"})), "does not claim the layout 'dense'"),
        (None, "does not claim the attention family"),
    ],
)
def test_types_layouts_and_families_are_claims_too(
    install: Install, claims: AttentionClaims | None, reason: str
) -> None:
    install("narrow", backend("narrow", lambda problem: constant_plan(1.0), claims=claims))
    with pytest.raises(Unsupported, match=reason):
        torchhal.attention(QUERY, QUERY, QUERY, backend="narrow")


# ---------------------------------------------------------------------------- fallbacks


def test_a_fallback_warns_once_and_names_the_decline(install: Install) -> None:
    install("shy", backend("shy", lambda problem: Decline("busy", "is busy"), preference={"cpu": 50}))
    with pytest.warns(FallbackWarning, match=r"falls back to reference, because shy: is busy \[busy\]"):
        torchhal.attention(QUERY, QUERY, QUERY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchhal.attention(QUERY, QUERY, QUERY)


def test_strict_mode_makes_a_fallback_an_error(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("shy", backend("shy", lambda problem: Decline("busy", "is busy"), preference={"cpu": 50}))
    monkeypatch.setenv("TORCHHAL_STRICT", "1")
    reset()
    with pytest.raises(Unsupported, match="strict mode forbids the fallback"):
        torchhal.attention(QUERY, QUERY, QUERY)


def test_strict_mode_leaves_a_first_choice_alone(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(3.0, install, "good")
    monkeypatch.setenv("TORCHHAL_STRICT", "1")
    reset()
    assert winner() == 3.0


def test_a_strict_setting_nobody_understands_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHHAL_STRICT", "maybe")
    reset()
    with pytest.raises(ConfigurationError, match="TORCHHAL_STRICT expects 1 or 0 and is 'maybe'"):
        torchhal.attention(QUERY, QUERY, QUERY)


def test_a_load_failure_is_named_when_the_reference_has_to_serve(install: Install) -> None:
    install("broken", error=ImportError("libbar is missing"))
    with pytest.warns(FallbackWarning, match="libbar is missing"):
        torchhal.attention(QUERY, QUERY, QUERY)


def test_a_hook_that_raises_is_named_and_the_next_backend_serves(install: Install) -> None:
    def explode(problem: AttentionProblem) -> Plan:
        raise ZeroDivisionError("by design")

    install("bomb", backend("bomb", explode, preference={"cpu": 50}))
    serve(4.0, install, "calm")
    with pytest.warns(
        FallbackWarning, match="hook torchhal_attention of backend 'bomb' raised ZeroDivisionError: by design"
    ):
        assert winner() == 4.0


def test_a_hook_that_returns_nonsense_is_named(install: Install) -> None:
    install("odd", backend("odd", lambda problem: 42))  # type: ignore[arg-type, return-value]
    with pytest.raises(Unsupported, match="returned 42 instead of a Plan or a Decline"):
        torchhal.attention(QUERY, QUERY, QUERY, backend="odd")


def test_equal_claims_are_an_error_that_names_both(install: Install) -> None:
    serve(1.0, install, "left")
    serve(2.0, install, "right")
    with pytest.raises(AmbiguousBackends, match=r"'left' and 'right' claim .* with the same preference 10"):
        winner()
    with torchhal.use("right"):
        assert winner() == 2.0


def test_a_backend_for_another_device_does_not_count_as_passed_over(install: Install) -> None:
    serve(1.0, install, "elsewhere", device_types=frozenset({"meta"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchhal.attention(QUERY, QUERY, QUERY)
    declined = dict(torchhal.explain(torchhal.attention, QUERY, QUERY, QUERY).declined)
    assert declined["elsewhere"].code == "other_device"


# ---------------------------------------------------------------------------- environment


def test_a_misspelt_variable_is_reported_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHHAL_BAKEND", "reference")
    reset()
    with pytest.warns(BackendWarning, match="TORCHHAL_BAKEND; did you mean TORCHHAL_BACKEND"):
        torchhal.attention(QUERY, QUERY, QUERY)


def test_a_list_with_a_hole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHHAL_BACKEND", "reference,,")
    reset()
    with pytest.raises(
        ConfigurationError, match="TORCHHAL_BACKEND expects a backend or names separated by commas"
    ):
        torchhal.attention(QUERY, QUERY, QUERY)


# ---------------------------------------------------------------------------- lock file


def test_a_stale_lock_is_reported_with_what_differs_and_not_used(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    serve(1.0, install, "preferred", preference=50)
    serve(2.0, install, "locked")
    path = tmp_path / "lock.json"  # type: ignore[operator]
    problem = torchhal.explain(torchhal.attention, QUERY, QUERY, QUERY).problem
    lock.write(registry(), {problem.text: {"backend": "locked"}}, path)
    content = json.loads(path.read_text())
    content["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    monkeypatch.setenv("TORCHHAL_LOCK", str(path))
    reset()
    with pytest.warns(BackendWarning, match="measured elsewhere and is not used: torch was '1.0', is"):
        assert winner() == 1.0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 99}', '{"format": 1, "environment": {}, "entries": {"x": {}}}']
)
def test_a_damaged_lock_file_is_refused_by_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, content: str
) -> None:
    path = tmp_path / "lock.json"  # type: ignore[operator]
    path.write_text(content)
    monkeypatch.setenv("TORCHHAL_LOCK", str(path))
    reset()
    with pytest.raises(
        ConfigurationError, match=r"lock.json is not a selection lock file .*; run `torchhal tune`"
    ):
        torchhal.attention(QUERY, QUERY, QUERY)


# ---------------------------------------------------------------------------- routes


def test_explain_computes_nothing_and_says_everything(install: Install) -> None:
    def refuse_to_run(*arguments: object) -> torch.Tensor:
        raise AssertionError("explain() must not run the plan")

    install("mine", backend("mine", lambda problem: Plan(refuse_to_run, "never run"), preference={"cpu": 10}))
    route = torchhal.explain(torchhal.attention, QUERY, QUERY, QUERY, is_causal=True)
    assert route.chosen == "mine"
    assert "is_causal=True" in str(route)
    assert "never run" in str(route)
    content = json.loads(route.to_json())
    assert content["chosen"] == "mine"
    assert content["declined"][0]["backend"] == "reference"
    assert torchhal.routes() == []


def test_explain_of_an_impossible_explicit_choice_is_the_route_with_its_declines(install: Install) -> None:
    install("shy", backend("shy", lambda problem: Decline("busy", "is busy")))
    route = torchhal.explain(torchhal.attention, QUERY, QUERY, QUERY, backend="shy")
    assert route.chosen is None
    assert dict(route.declined)["shy"].reason == "is busy"


def test_explain_of_a_function_that_routes_nothing_says_so() -> None:
    with pytest.raises(InvalidProblem, match="found no call in neg that torchhal routes"):
        torchhal.explain(torch.neg, QUERY)


def test_routes_count_every_call() -> None:
    for _ in range(5):
        torchhal.attention(QUERY, QUERY, QUERY)
    assert [(route.chosen, route.count) for route in torchhal.routes()] == [("reference", 5)]


def test_problems_survive_their_text_form_and_lengths_are_not_in_it() -> None:
    short = torchhal.explain(
        torchhal.attention, QUERY, QUERY, QUERY, score_mod=lambda s, b, h, i, j: s + i
    ).problem
    long = torch.randn(1, 2, 300, 4)
    other = torchhal.explain(
        torchhal.attention, long, long, long, score_mod=lambda s, b, h, i, j: s + i
    ).problem
    assert short == other
    assert hash(short) == hash(other)
    assert Problem.from_text(short.text) == short


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"family": "cooking"}',
        '{"family": "attention", "device": {"device": "cpu"}, "taste": 1}',
    ],
)
def test_a_problem_text_of_another_specification_is_refused(text: str) -> None:
    with pytest.raises(InvalidProblem, match="expected the text of a problem of specification"):
        Problem.from_text(text)


def test_a_decline_without_a_reason_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="needs a code and a reason"):
        Decline("busy", "")


def test_selecting_again_gives_the_cached_choice(install: Install) -> None:
    asked: list[AttentionProblem] = []
    install(
        "mine",
        backend("mine", lambda problem: asked.append(problem) or constant_plan(1.0), preference={"cpu": 10}),
    )  # type: ignore[func-returns-value]
    problem = AttentionProblem(device=torch.device("cpu"))
    assert select(problem) is select(problem)
    assert len(asked) == 1


def test_a_cache_of_choices_keeps_the_latest_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_caches, "REMEMBERED", 3)
    cache = _caches.fast_cache()
    for key in (1, 2, 3, 1, 4):
        cache[key] = key
    assert list(cache) == [2, 3, 4]
