"""Saving and loading compile caches: what is verified before torch sees any of it, and what is reported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import torchhal
from torchhal import _cache_format as fmt
from torchhal import cache
from torchhal._cache_format import Artifact
from torchhal.cache import CacheStore, Fingerprint, explain, fingerprint, load_cache, save_cache
from torchhal.errors import CacheIntegrityError, InvalidProblem, Unsupported

ARTIFACTS = [
    Artifact("inductor", "fabc", b"graph one"),
    Artifact("inductor", "fdef", b""),
    Artifact("autotune", "ab/best_config", b"{}"),
]
SECTION = fmt.encode_section(fingerprint(), ARTIFACTS)


class FakeTorch:
    """Stands for ``torch.compiler``'s two functions: ``recorded`` is saved, what is loaded goes to ``taken``."""

    def __init__(self) -> None:
        self.recorded: list[Artifact] = []
        self.taken: list[Artifact] = []
        self.unknown: set[str] = set()

    def save(self) -> tuple[bytes, Any] | None:
        return (fmt.emit_torch(self.recorded), None) if self.recorded else None

    def load(self, data: bytes) -> Any:
        found = fmt.parse_torch(data)
        if self.unknown.intersection(a.kind for a in found):
            return None
        self.taken += found
        return object()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", fake.save)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", fake.load)
    return fake


@pytest.fixture
def store() -> Iterator[CacheStore]:
    store = cache.cache_store("memory://test-cache")
    yield store
    for key in store.list():
        store.delete(key)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fingerprint], None]:
    """Makes this process believe that it runs in another environment."""
    return lambda other: monkeypatch.setattr(cache, "fingerprint", lambda: other)


# ---------------------------------------------------------------------------- round trips


def test_what_is_saved_is_loaded(fake: FakeTorch, store: CacheStore) -> None:
    fake.recorded = ARTIFACTS
    entry = save_cache(store)
    assert entry.section is not None
    assert entry.section.startswith(f"{cache.default_key()}/")
    assert (entry.artifacts, entry.recorded) == (3, 3)
    report = load_cache(store)
    assert fake.taken == ARTIFACTS
    assert report.sections == (entry.section,)
    assert report.artifacts == {"inductor": 2, "autotune": 1}
    assert report.loaded == 3
    assert "loaded 2 inductor, 1 autotune from 1 sections" in str(report)
    assert not (report.skipped or report.refused or report.advice)


def test_saving_twice_keeps_both_and_stores_nothing_twice(fake: FakeTorch, store: CacheStore) -> None:
    fake.recorded = ARTIFACTS[:1]
    save_cache(store, "model")
    fake.recorded = ARTIFACTS  # torch's container repeats what it had saved before
    second = save_cache(store, "model")
    assert second.artifacts == 2
    third = save_cache(store, "model")
    assert third.section is None
    assert third.recorded == 3
    assert len(load_cache(store, "model").sections) == 2
    assert sorted(fake.taken, key=str) == sorted(ARTIFACTS, key=str)


def test_nothing_compiled_saves_nothing_and_nothing_stored_loads_nothing(
    fake: FakeTorch, store: CacheStore
) -> None:
    assert save_cache(store, "empty") == cache.CacheEntry("empty", None, 0, 0, 0)
    report = load_cache(store, "empty")
    assert (report.sections, report.loaded) == ((), 0)
    assert store.list() == []


def test_a_url_serves_as_a_store(fake: FakeTorch, tmp_path: Path) -> None:
    fake.recorded = ARTIFACTS
    save_cache((tmp_path / "cache").as_uri(), "model/llama")
    assert load_cache(str(tmp_path / "cache"), "model/llama").loaded == 3


def test_keys_under_a_key_are_not_its_sections(fake: FakeTorch, store: CacheStore) -> None:
    fake.recorded = ARTIFACTS
    save_cache(store, "model/one")
    assert load_cache(store, "model").sections == ()


def test_artifacts_of_a_type_torch_does_not_know_are_skipped_and_reported(
    fake: FakeTorch, store: CacheStore
) -> None:
    fake.recorded = ARTIFACTS
    fake.unknown = {"autotune"}
    save_cache(store)
    report = load_cache(store)
    assert report.skipped == {"autotune": 1}
    assert report.artifacts == {"inductor": 2}
    assert "skipped 1 of a type this torch does not know: autotune" in str(report)


@pytest.mark.parametrize("key", ["", "a/b/c/d", "x" * 100, "../up", "a b"])
def test_a_malformed_key_is_refused(store: CacheStore, key: str) -> None:
    with pytest.raises(InvalidProblem, match="key"):
        save_cache(store, key)


def test_something_else_than_a_store_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="expected a cache store or its URL and got 3"):
        load_cache(3)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- integrity


@pytest.mark.parametrize("name", ["a", "m", "z"])
def test_one_damaged_section_keeps_every_other_from_torch(
    fake: FakeTorch, store: CacheStore, name: str
) -> None:
    for key in ("a", "m", "z"):
        store.put(f"model/{key}", SECTION)
    store.put(f"model/{name}", SECTION[:-1])
    with pytest.raises(CacheIntegrityError, match=f"the cache section 'model/{name}' can not be trusted"):
        load_cache(store, "model")
    assert fake.taken == [], "torch was called before everything was verified"


def test_a_damaged_section_does_not_keep_from_saving(fake: FakeTorch, store: CacheStore) -> None:
    store.put("model/section", SECTION[:-1])
    fake.recorded = ARTIFACTS
    assert save_cache(store, "model").artifacts == 3


# ---------------------------------------------------------------------------- environments


@pytest.mark.parametrize("name", sorted(fingerprint().identity))
def test_a_changed_identity_is_refused_by_name(
    fake: FakeTorch, store: CacheStore, elsewhere: Callable[[Fingerprint], None], name: str
) -> None:
    here = fingerprint()
    fake.recorded = ARTIFACTS
    save_cache(store, "model")
    elsewhere(replace(here, identity={**here.identity, name: "something else"}))
    with pytest.raises(CacheIntegrityError) as caught:
        load_cache(store, "model")
    assert f"identity: {name} was {here.identity[name]!r} and is 'something else' here" in str(caught.value)
    assert "nothing was loaded" in str(caught.value)
    assert fake.taken == []


def test_an_identity_that_only_one_side_has_is_refused(
    fake: FakeTorch, store: CacheStore, elsewhere: Callable[[Fingerprint], None]
) -> None:
    here = fingerprint()
    fake.recorded = ARTIFACTS
    save_cache(store, "model")
    elsewhere(replace(here, identity={**here.identity, "new field": "x"}))
    with pytest.raises(CacheIntegrityError, match="identity: new field was 'absent' and is 'x' here"):
        load_cache(store, "model")
    elsewhere(replace(here, identity={k: v for k, v in here.identity.items() if k != "torch"}))
    with pytest.raises(CacheIntegrityError, match=r"identity: torch was .* and is 'absent' here"):
        load_cache(store, "model")


def test_a_machine_with_fewer_instructions_is_refused_and_one_with_more_is_not(
    fake: FakeTorch, store: CacheStore, elsewhere: Callable[[Fingerprint], None]
) -> None:
    here = replace(fingerprint(), capability={"cpu": ("a", "b")})
    elsewhere(here)
    fake.recorded = ARTIFACTS
    save_cache(store, "model")
    elsewhere(replace(here, capability={"cpu": ("a", "b", "c"), "other": ("z",)}))
    assert load_cache(store, "model").loaded == 3
    elsewhere(replace(here, capability={"cpu": ("a",)}))
    with pytest.raises(CacheIntegrityError, match="capability: cpu of this machine lacks b"):
        load_cache(store, "model")


def test_a_change_of_tuning_is_reported_and_loads(
    fake: FakeTorch, store: CacheStore, elsewhere: Callable[[Fingerprint], None]
) -> None:
    here = fingerprint()
    fake.recorded = ARTIFACTS
    save_cache(store, "model")
    elsewhere(replace(here, tuning={**here.tuning, "threads": "999"}))
    report = load_cache(store, "model")
    assert report.loaded == 3
    assert len(report.advice) == 1
    assert "tuning: threads was" in report.advice[0]
    assert "reported only" in str(report)


def test_sections_of_other_environments_are_listed_beside_those_that_load(
    fake: FakeTorch, store: CacheStore, elsewhere: Callable[[Fingerprint], None]
) -> None:
    here = fingerprint()
    fake.recorded = ARTIFACTS[:1]
    save_cache(store, "fleet")
    elsewhere(replace(here, identity={**here.identity, "torch": "9.9"}))
    fake.recorded = ARTIFACTS[:1]
    assert save_cache(store, "fleet").artifacts == 1, "another environment's artifact is not this one's"
    report = load_cache(store, "fleet")
    assert report.loaded == 1
    assert len(report.refused) == 1
    assert "identity: torch was" in report.refused[0]


def test_the_default_key_depends_on_identity_and_capability_and_not_on_tuning(
    elsewhere: Callable[[Fingerprint], None],
) -> None:
    here = fingerprint()
    keys = [cache.default_key()]
    for other in (
        replace(here, tuning={}),
        replace(here, capability={}),
        replace(here, identity={**here.identity, "torch": "9.9"}),
    ):
        elsewhere(other)
        keys.append(cache.default_key())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_explain_of_an_environment_with_itself_is_empty() -> None:
    assert explain(fingerprint(), fingerprint()) == []
    assert Fingerprint.from_dict(fingerprint().to_dict()) == fingerprint()


def test_a_class_of_fields_from_a_newer_version_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown classes of fingerprint fields: policy"):
        Fingerprint.from_dict({**fingerprint().to_dict(), "policy": {}})


def test_the_vector_level_of_generated_code_is_part_of_the_identity() -> None:
    program = "from torchhal.cache import fingerprint; print(fingerprint().identity['cpu vectors'])"
    levels = {_run(program, ATEN_CPU_CAPABILITY=level).strip() for level in ("default", "avx2")}
    assert len(levels) == (2 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 1)


# ---------------------------------------------------------------------------- stores by URL, and the real thing


def test_an_unknown_scheme_names_who_declined() -> None:
    with pytest.raises(Unsupported, match=r"reference: does not claim the scheme 's3' \[unclaimed_scheme\]"):
        torchhal.cache.cache_store("s3://bucket/prefix")


@pytest.mark.parametrize("url", ["", None, 3])
def test_a_store_needs_a_url(url: Any) -> None:
    with pytest.raises(InvalidProblem, match="expects a path or a URL"):
        cache.cache_store(url)


def _run(program: str, **environment: str) -> str:
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_FUNCTIONS = """
import sys, torch
from torch._dynamo.utils import counters
from torchhal.cache import load_cache, save_cache
def one(x): return (x.sin() * 2).sum(-1)
def two(x): return (x.cos() + 3).amax(-1)
x = torch.randn(8, 33)
"""


@pytest.mark.slow
def test_a_fresh_process_with_a_loaded_cache_compiles_nothing_of_two_saves(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    save = (
        f"torch.compile(one)(x); a = save_cache({store!r}); torch.compile(two)(x); b = save_cache({store!r})"
    )
    shown = _run(
        f"{_FUNCTIONS}\n{save}\nprint(a.artifacts, b.artifacts)", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "a")
    )
    assert shown.split() == ["2", "2"]
    load = f"""
report = load_cache({store!r})
for function in (one, two):
    torch.testing.assert_close(torch.compile(function)(x), function(x))
print(report.loaded, counters["inductor"]["fxgraph_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"])
"""
    shown = _run(_FUNCTIONS + load, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "b"))
    assert shown.split() == ["4", "0", "2"]
