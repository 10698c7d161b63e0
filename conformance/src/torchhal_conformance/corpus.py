"""The cases that decide, and those that a frozen profile requires."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from importlib import resources
from typing import Final

from torchhal.problems import Capabilities
from torchhal_conformance.checks import all_checks
from torchhal_conformance.model import PROFILES, Case, in_profile

EDITION: Final = "2026.11"
"""The frozen profiles that reports are judged by."""


@functools.cache
def cases(seed: int = 0) -> tuple[Case, ...]:
    """Every case of the corpus, in the order in which a run takes them."""
    return tuple(Case(check, sample, seed=seed) for check in all_checks() for sample in check.samples())


@functools.cache
def _by_id(seed: int) -> dict[str, Case]:
    return {case.id: case for case in cases(seed)}


def case_named(name: str, seed: int = 0) -> Case:
    """The case with an id.

    Raises:
        KeyError: there is none; says which come near.
    """
    found = _by_id(seed).get(name)
    if found is None:
        import difflib

        near = difflib.get_close_matches(name, _by_id(seed), n=3)
        hint = f"; near it: {', '.join(near)}" if near else "; `torchhal-conformance list` shows them all"
        raise KeyError(f"there is no case {name!r}{hint}")
    return found


def applies(case: Case, capabilities: Capabilities, facilities: frozenset[str] = frozenset()) -> bool:
    """Whether a backend is asked: about what it claims, and once about each sample that it must refuse.

    Args:
        case: the question.
        capabilities: what the backend claims.
        facilities: what its device has, out of :data:`~torchhal_conformance.model.FACILITIES`.
    """
    if not case.check.facilities <= facilities:
        return False
    if case.sample.needs.unclaimed(capabilities):
        return case.check.refuses and "asks_nobody" not in case.sample.tags
    return True


def digest(ids: Iterable[str]) -> str:
    """Digest of a set of case ids."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def frozen(profile: str, edition: str = EDITION) -> frozenset[str]:
    """The ids that a profile of an edition requires; ids that came later run and are not scored.

    Raises:
        ValueError: the file of the edition was changed after it was frozen.
    """
    text = resources.files("torchhal_conformance").joinpath(f"profiles/{edition}.json").read_text("utf-8")
    document = json.loads(text)
    parts = ("inference", "training") if profile == "training" else (profile,)
    ids = frozenset(
        f"{check}/{name}"
        for part in parts
        for check, names in document["cases"][part].items()
        for name in names
    )
    if digest(ids) != document["digests"][profile]:
        raise ValueError(f"profile {profile} of {edition} is not what was frozen: its digest differs")
    return ids


def required(
    profile: str,
    capabilities: Capabilities,
    edition: str = EDITION,
    facilities: frozenset[str] = frozenset(),
) -> frozenset[str]:
    """The ids that a profile of an edition requires of what is claimed, on a device with such facilities.

    None at all where nothing of the profile's own is claimed: who computes no gradients is not fit for training by
    passing what inference asks for.
    """
    known = frozen(profile, edition)
    asked = [
        case
        for case in cases()
        if case.id in known
        and case.check.facilities <= facilities
        and not case.sample.needs.unclaimed(capabilities)
    ]
    own = any(case.profile == profile for case in asked)
    return frozenset(case.id for case in asked) if own else frozenset()


def freeze(seed: int = 0) -> dict[str, object]:
    """The document of an edition as of now: the names of each check's samples, those of training apart."""
    listed: dict[str, dict[str, list[str]]] = {profile: {} for profile in PROFILES}
    for case in cases(seed):
        listed[case.profile].setdefault(case.check.name, []).append(case.sample.name)
    digests = {name: digest(c.id for c in cases(seed) if in_profile(c, name)) for name in PROFILES}
    return {"digests": digests, "cases": listed}
