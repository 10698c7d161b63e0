"""The corpus, what is frozen of it, and the arithmetic by which results are judged."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from torchhal.hookspecs import FAMILIES
from torchhal.problems import Capabilities
from torchhal.reference.dropout import dropout_keep
from torchhal_conformance import corpus, kills, oracle, philox, tolerance
from torchhal_conformance.checks import all_checks
from torchhal_conformance.families import samples
from torchhal_conformance.model import PROFILES, CheckFailed
from torchhal_conformance.mutants import all_mutants


def test_every_case_has_a_name_of_its_own() -> None:
    ids = [case.id for case in corpus.cases()]
    assert len(ids) == len(set(ids)) > 4000


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_frozen_is_still_there(profile: str) -> None:
    assert corpus.frozen(profile) <= {case.id for case in corpus.cases()}


def test_training_asks_for_all_that_inference_asks_for() -> None:
    assert corpus.frozen("inference") < corpus.frozen("training")


def test_a_frozen_profile_that_was_changed_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = resources.files("torchhal_conformance").joinpath(f"profiles/{corpus.EDITION}.json")
    document = json.loads(path.read_text("utf-8"))
    document["cases"]["inference"]["attention.numbers"].pop()
    (tmp_path / "profiles").mkdir()
    (tmp_path / f"profiles/{corpus.EDITION}.json").write_text(json.dumps(document))
    monkeypatch.setattr(corpus.resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="its digest differs"):
        corpus.frozen("inference")


def test_every_check_says_what_it_tests_why_and_how_to_debug_it() -> None:
    for check in all_checks():
        texts = (check.explanation.tests, check.explanation.why, check.explanation.debug)
        assert all(len(text) > 30 for text in texts), check.name


def test_every_check_is_proved_by_a_planted_fault_and_every_fault_has_a_check() -> None:
    assert kills.unproven() == []
    names = {check.name for check in all_checks()}
    assert all(set(mutant.killers) <= names and mutant.killers for mutant in all_mutants())
    assert len(all_mutants()) >= 60


def test_every_family_has_checks() -> None:
    covered = {sample.needs.family for check in all_checks() for sample in check.samples()}
    assert covered == set(FAMILIES)


def test_who_claims_nothing_is_required_nothing() -> None:
    assert all(not corpus.required(profile, Capabilities()) for profile in PROFILES)


def test_an_unknown_case_is_answered_with_those_that_come_near() -> None:
    with pytest.raises(KeyError, match="near it: attention.numbers/dense-float32-causal"):
        corpus.case_named("attention.numbers/dense-float32-causa-b2-h4-l9-s13-e16")


def test_the_data_of_a_case_do_not_depend_on_other_cases() -> None:
    case = corpus.cases()[5]
    assert case.data_seed == corpus.case_named(case.id).data_seed
    assert case.data_seed != corpus.case_named(case.id, seed=1).data_seed


# ---------------------------------------------------------------------------- the oracle


def test_the_oracle_knows_the_answer_of_one_key_of_equal_scores_and_of_none() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    value = torch.randn(1, 2, 1, 5)
    out, lse, largest = oracle.attention(query, key, value, dtype=torch.float64, scale=0.5)
    torch.testing.assert_close(out, value.double().expand(1, 2, 3, 5))
    torch.testing.assert_close(lse, (query.double() @ key.double().mT).squeeze(-1) * 0.5)
    assert torch.equal(largest, lse), "one key is the largest"
    values = torch.randn(1, 2, 7, 5)
    out, lse, largest = oracle.attention(
        query, torch.zeros(1, 2, 7, 4), values, dtype=torch.float64, scale=1.0
    )
    torch.testing.assert_close(out, values.double().mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(7)))
    assert largest.eq(0).all()
    out, lse, largest = oracle.attention(
        query, key[:, :, :0], value[:, :, :0], dtype=torch.float64, scale=1.0
    )
    assert out.eq(0).all() and torch.isneginf(lse).all() and torch.isneginf(largest).all()


def test_the_oracle_agrees_with_itself_in_another_order_of_the_sums() -> None:
    query, key, value = (torch.randn(2, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    one = oracle.attention(query, key, value, dtype=torch.float64, scale=0.3, is_causal=False)
    other = oracle.attention(query, key.flip(2), value.flip(2), dtype=torch.float64, scale=0.3)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
def test_both_implementations_of_the_generator_agree(p: float) -> None:
    seed = 0x1234_5678_9ABC_DEF0 % 2**62
    places = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 5, 7)), indexing="ij")
    expected = dropout_keep(torch.tensor(seed), *places, p)
    assert torch.equal(philox.kept(seed, (2, 3, 5, 7), p), expected)
    assert abs(philox.kept(seed, (2, 3, 50, 70), p).double().mean().item() - (1 - p)) < 0.02


# ---------------------------------------------------------------------------- the error rule

EXACT = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
PLAIN = EXACT.float()


def test_a_result_as_good_as_plain_arithmetic_is_within_half_the_bound() -> None:
    noisy = (EXACT * (1 + 1e-6 * torch.randn(1000, dtype=torch.float64))).float()
    assert tolerance.ratio(noisy, EXACT, noisy) <= 0.5


@pytest.mark.parametrize("wrong", [0, 999])
def test_one_wrong_element_is_found_by_the_largest_error(wrong: int) -> None:
    found = PLAIN.clone()
    found[wrong] += 1e-4
    assert tolerance.ratio(found, EXACT, PLAIN) > 1


def test_a_loss_spread_over_everything_is_found_by_the_root_mean_square() -> None:
    plain = PLAIN.clone()
    plain[0] += 1e-3  # plain arithmetic has one bad element, which raises the bound of the largest error
    found = PLAIN + 2e-4
    assert tolerance.ratio(found, EXACT, plain) > 1


@pytest.mark.parametrize(
    ("found", "exact"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (-math.inf, math.inf)]
)
def test_what_is_not_finite_has_to_be_so_in_both(found: float, exact: float) -> None:
    truth = torch.tensor([2.0, exact], dtype=torch.float64)
    assert tolerance.ratio(torch.tensor([2.0, found]), truth, truth.float()) == math.inf
    assert tolerance.ratio(truth.float(), truth, truth.float()) <= 1


def test_a_narrow_result_does_not_earn_a_wider_bound() -> None:
    narrow = PLAIN.bfloat16()
    assert tolerance.ratio(narrow, EXACT, PLAIN) > 100


def test_results_of_another_shape_or_count_are_told_apart() -> None:
    names = ["out"]
    with pytest.raises(CheckFailed, match=r"out of shape \(1000,\)"):
        tolerance.judge([PLAIN[:3]], [EXACT], [PLAIN], 2.0, names)
    with pytest.raises(CheckFailed, match="1 results, got 2"):
        tolerance.judge([PLAIN, PLAIN], [EXACT], [PLAIN], 2.0, names)


def test_a_failure_names_the_worst_element() -> None:
    found = PLAIN.clone()
    found[17] = 9.0
    with pytest.raises(CheckFailed, match=r"got 9 instead of .* at \(17,\)"):
        tolerance.judge([found], [EXACT], [PLAIN], 2.0, ["out"])


def test_equal_samples_are_made_of_equal_data() -> None:
    sample: Any = samples("attention")[0]
    one, other = (sample.make(torch.Generator().manual_seed(5), torch.device("cpu")) for _ in range(2))
    assert torch.equal(one["query"], other["query"])
