"""Measured choices: the fastest right backend is locked in, honoured here and refused elsewhere."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backends import backend
from hypothesis import given, settings
from hypothesis import strategies as st
from installed_backends import Site

import torchhal
from torchhal import lock, selection, tuning
from torchhal.bench.cases import Shape, random_inputs
from torchhal.bench.timing import Effort, Timing
from torchhal.errors import BackendWarning, ConfigurationError
from torchhal.pointwise import capture
from torchhal.problems import AttentionProblem, MatmulProblem, Plan, Problem
from torchhal.reference import attention as reference
from torchhal.registry import registry

CPU = torch.device("cpu")
PLAIN = AttentionProblem(CPU, query_heads=2, key_heads=2, head_size=8, value_head_size=8)
CAUSAL = dataclasses.replace(PLAIN, is_causal=True, features=frozenset({"causal"}))
SMALL = [Shape(1, 4, 6)]
BRIEF = Effort(repetitions=3, budget=0.0, most=3, floor=1e-5)


def tuned(problem: Problem = PLAIN, shapes: list[Shape] | None = SMALL) -> tuning.Tuned:
    return tuning.tune(problem, registry(), shapes, BRIEF)


def route(problem: AttentionProblem = PLAIN) -> selection.Route:
    tensor = torch.zeros(1, problem.query_heads, 3, problem.head_size)
    return torchhal.explain(torchhal.attention, tensor, tensor, tensor, is_causal=problem.is_causal)


# ---------------------------------------------------------------------------- choosing


def test_the_fastest_backend_is_chosen_and_all_with_a_plan_are_timed(site: Site) -> None:
    site.add("slow", delay=0.02, preference=90)
    site.add("fast", preference=10)
    result = tuned()
    assert set(result.seconds) == {"slow", "fast", "reference"}
    assert result.chosen != "slow"
    assert result.seconds["slow"] >= 0.02


def test_a_backend_that_gives_a_wrong_result_is_reported_and_never_chosen(site: Site) -> None:
    site.add("wrong", factor=1.01)
    result = tuned()
    assert result.chosen == "reference"
    assert "wrong" not in result.seconds
    assert result.measurements[0].wrong["wrong"].startswith("is wrong by")


def test_a_backend_that_raises_is_reported_and_never_chosen(site: Site) -> None:
    site.add("crash", causal="1/0")
    result = tuned()
    assert result.measurements[0].wrong == {"crash": "raised ZeroDivisionError: division by zero"}
    assert result.chosen == "reference"


def test_a_backend_that_declines_is_not_timed_and_its_reason_is_kept(site: Site) -> None:
    site.add("picky")
    result = tuned(dataclasses.replace(PLAIN, head_size=13))
    assert set(result.seconds) == {"reference"}
    assert result.declined["picky"].code == "unlucky"


def test_each_variant_of_a_plan_is_measured_and_the_lock_file_chooses_one(
    install: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(problem: AttentionProblem) -> Plan:
        right = reference.plan(problem).run

        def late(*arguments: Any) -> Any:
            time.sleep(0.01)
            return right(*arguments)

        def wrong(*arguments: Any) -> Any:
            return right(*arguments) * 2

        return Plan(late, "late by itself", variants={"late": late, "prompt": right, "wrong": wrong})

    install("many", backend("many", answer, preference={"cpu": 50}))
    result = tuned()
    assert set(result.seconds) == {"many:late", "many:prompt", "reference"}
    assert "many:wrong" in result.measurements[0].wrong
    prompt = dataclasses.replace(
        result, measurements=(tuning.Measurement(SMALL[0], {"many:prompt": Timing((1.0,))}),)
    )
    assert (prompt.entry()["backend"], prompt.entry()["variant"]) == ("many", "prompt")
    path = tmp_path / "lock.json"
    monkeypatch.setenv("TORCHHAL_LOCK", str(path))
    tuning.write_lock([prompt], registry(), path)
    selection.reset()
    found = route()
    assert (found.chosen, found.description) == ("many", "late by itself; prompt, as measured")
    lock.write(registry(), {PLAIN.text: {"backend": "many", "variant": "gone"}}, path)
    selection.reset()
    assert route().rule.endswith("without the variant 'gone', which many does not offer any more")
    assert route().description == "late by itself"


def test_gradients_are_part_of_the_call_where_the_problem_asks_for_them(site: Site) -> None:
    site.add("fast")
    result = tuned(dataclasses.replace(PLAIN, features=frozenset({"backward"})))
    assert set(result.seconds) == {"fast", "reference"} and not result.measurements[0].wrong


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_masked_problems_get_a_mask_in_which_every_row_sees_a_key(mask_dtype: torch.dtype) -> None:
    made = random_inputs(dataclasses.replace(PLAIN, mask_dtype=mask_dtype), Shape(2, 7, 3)).attn_mask
    assert made is not None and made.dtype is mask_dtype and made.shape == (7, 3)
    seen = made if mask_dtype is torch.bool else made > -torch.inf
    assert bool(seen.any(-1).all()) and not bool(seen.all())


def test_random_inputs_have_the_shapes_and_types_of_the_problem() -> None:
    problem = AttentionProblem(
        CPU, query_dtype=torch.bfloat16, key_dtype=torch.float16, value_dtype=torch.float32, query_heads=6, key_heads=2,
        head_size=5, value_head_size=7,
    )  # fmt: skip
    query, key, value, mask = random_inputs(problem, Shape(3, 4, 9))
    assert (query.shape, query.dtype) == ((3, 6, 4, 5), torch.bfloat16)
    assert (key.shape, key.dtype) == ((3, 2, 9, 5), torch.float16)
    assert (value.shape, value.dtype) == ((3, 2, 9, 7), torch.float32)
    assert mask is None


times = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=2)


@given(a=times, b=times, factor=st.floats(0.01, 100.0))
@settings(max_examples=25, deadline=None)
def test_no_single_length_decides(a: list[float], b: list[float], factor: float) -> None:
    """Making one shape longer for everybody changes no choice."""

    def choice(scale: float) -> str | None:
        pairs = zip(SMALL * 2, zip(a, b), (1.0, scale))
        made = (
            tuning.Measurement(s, {"a": Timing((x * f,)), "b": Timing((y * f,))}) for s, (x, y), f in pairs
        )
        return tuning.Tuned(PLAIN, tuple(made)).chosen

    if abs(a[0] * a[1] / (b[0] * b[1]) - 1) > 1e-6:
        assert choice(factor) == choice(1.0) == ("a" if a[0] * a[1] < b[0] * b[1] else "b")


def test_a_backend_that_is_wrong_at_one_length_is_not_chosen_for_its_speed_at_another() -> None:
    both = {"a": Timing((1.0,)), "b": Timing((2.0,))}
    measurements = (
        tuning.Measurement(SMALL[0], both),
        tuning.Measurement(SMALL[0], {"b": Timing((2.0,))}, {"a": "is wrong"}),
    )
    assert tuning.Tuned(PLAIN, measurements).chosen == "b"


def test_decoding_and_a_prompt_are_measured_and_for_causal_calls_a_prompt_alone() -> None:
    assert [s.length for s in tuning.default_shapes(PLAIN)] == [1, 512]
    assert [s.length for s in tuning.default_shapes(CAUSAL)] == [512]


def _captured() -> Any:
    inputs = [("score", torch.float32), *((n, torch.int32) for n in ("b", "h", "q_idx", "kv_idx"))]
    return capture(lambda score, b, h, q_idx, kv_idx: score * 2, inputs, what="score_mod").graph


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (MatmulProblem(CPU), "only attention can be measured, not matmul"),
        (dataclasses.replace(PLAIN, layout="varlen"), "only the dense layout can be measured, not varlen"),
        (dataclasses.replace(PLAIN, score_mod=_captured()), "calls with a score_mod can not be measured"),
        (dataclasses.replace(PLAIN, block_size=(128, 128)), "calls with a BlockMask can not be measured"),
        (dataclasses.replace(PLAIN, dropout=True), "calls with dropout can not be measured"),
        (dataclasses.replace(PLAIN, device=torch.device("cuda", 77)), "torch sees no device cuda:77 here"),
    ],
)
def test_what_can_not_be_measured_is_returned_with_the_reason(
    site: Site, problem: Problem, reason: str
) -> None:
    result = tuned(problem)
    assert result.not_measured.startswith(reason)
    assert result.chosen is None and result.measurements == ()


def test_default_problems_are_valid_and_distinct(site: Site) -> None:
    problems = tuning.default_problems(CPU)
    assert len(set(problems)) == len(problems) == 12
    for problem in problems:
        assert Problem.from_text(problem.text) == problem


# ---------------------------------------------------------------------------- the lock file


def test_selection_honours_the_lock_file_and_says_so(site: Site, tmp_path: Path) -> None:
    site.add("preferred", delay=0.01, preference=90)
    site.add("fast", preference=10)
    assert route().chosen == "preferred"
    path = tmp_path / "selection.lock.json"
    chosen = tuned().chosen
    assert chosen in ("fast", "reference")
    tuning.write_lock([tuned()], registry(), path)
    selection.reset()
    found = route()
    assert found.chosen != "preferred" and found.rule == f"the lock file {path}"
    assert route(CAUSAL).chosen == "preferred", "a problem that was not measured goes by preference"


def test_an_entry_holds_backend_seconds_and_the_shape_used(site: Site, tmp_path: Path) -> None:
    written = tuning.write_lock([tuned()], registry(), tmp_path / "selection.lock.json")
    entry = json.loads(written.path.read_text())["entries"][PLAIN.text]
    assert entry["backend"] == "reference"
    assert entry["seconds"]["reference"] > 0
    assert entry["measurements"][0]["shape"] == {"batch": 1, "length": 4, "keys": 6}


def test_a_lock_file_of_another_environment_is_reported_once_and_not_used(site: Site, tmp_path: Path) -> None:
    site.add("preferred", delay=0.01)
    path = tmp_path / "selection.lock.json"
    tuning.write_lock([tuned()], registry(), path)
    content = json.loads(path.read_text())
    content["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    selection.reset()
    with pytest.warns(
        BackendWarning, match=rf"is not used: torch was '1\.0', is '{torch.__version__.replace('+', '.')}'"
    ):
        found = torchhal.selection.select(PLAIN).route
    assert found.chosen == "preferred" and "lock" not in found.rule
    selection.select(CAUSAL)  # a second warning would be an error here


def test_a_corrupt_lock_file_is_an_error_that_says_what_to_do(site: Site, tmp_path: Path) -> None:
    (tmp_path / "selection.lock.json").write_text('{"format": 1, "entries"')
    with pytest.raises(
        ConfigurationError, match=r"is not a selection lock file .* run `torchhal tune` to write it again"
    ):
        selection.select(PLAIN)


def test_tuning_again_keeps_choices_of_this_environment_and_drops_stale_ones(
    site: Site, tmp_path: Path
) -> None:
    path = tmp_path / "selection.lock.json"
    tuning.write_lock([tuned(PLAIN)], registry(), path)
    assert set(tuning.write_lock([tuned(CAUSAL)], registry(), path).entries) == {PLAIN.text, CAUSAL.text}
    site.add("newcomer")
    assert set(tuning.write_lock([tuned(CAUSAL)], registry(), path).entries) == {CAUSAL.text}


def test_a_corrupt_lock_file_in_its_own_place_is_written_again(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "selection.lock.json"
    path.write_text("half a fi")
    tuning.write_lock([tuned()], registry(), path)
    read = lock.read(registry(), path)
    assert read is not None and not read.stale


def test_a_file_elsewhere_that_is_no_lock_file_is_not_overwritten(site: Site, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.json"
    thesis.write_text("years of work")
    with pytest.raises(ConfigurationError, match="is not a selection lock file"):
        tuning.write_lock([tuned()], registry(), thesis)
    assert thesis.read_text() == "years of work"


def test_a_place_that_can_not_be_written_is_a_configuration_error(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigurationError, match="can not write the lock file .* choose another with --output"
    ):
        tuning.write_lock([tuned()], registry(), tmp_path / "file" / "selection.lock.json")


# ---------------------------------------------------------------------------- routes


def test_problems_are_read_from_routes_each_once(tmp_path: Path) -> None:
    file = tmp_path / "routes.json"
    entries = [{"problem": json.loads(p.text)} for p in (PLAIN, CAUSAL, PLAIN)]
    file.write_text(json.dumps({"routes": entries}))
    assert tuning.read_routes(file) == [PLAIN, CAUSAL]


@pytest.mark.parametrize("text", ["", "[]", '{"routes": [{}]}', '{"routes": 3}'])
def test_a_file_that_holds_no_routes_says_how_to_write_one(tmp_path: Path, text: str) -> None:
    file = tmp_path / "routes.json"
    file.write_text(text)
    with pytest.raises(
        ConfigurationError, match=r"is not a file of routes .* `torchhal run --routes FILE SCRIPT`"
    ):
        tuning.read_routes(file)
