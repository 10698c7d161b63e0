"""Discovery: what is loaded, what is refused, and what a refusal says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_backends import Install, backend, constant_plan

import torchhal
from torchhal import hookimpl
from torchhal.errors import BackendLoadError, BackendNotFound
from torchhal.registry import registry

QUERY = torch.randn(1, 2, 3, 4)


def failure_of(name: str) -> str:
    return str(registry().failures[name])


def test_the_reference_is_there_with_no_backend_installed() -> None:
    assert list(registry().backends) == ["reference"]


def test_a_plugin_that_fails_to_import_is_kept_and_quoted(install: Install) -> None:
    install(
        "broken", error=AttributeError("module 'os' has no attribute 'exit'"), distribution="legacy-extension"
    )
    assert "reference" in registry().backends
    with pytest.raises(BackendLoadError, match="'broken' is installed and can not be used") as caught:
        torchhal.attention(QUERY, QUERY, QUERY, backend="broken")
    assert "legacy-extension" in str(caught.value)
    assert "has no attribute 'exit'" in str(caught.value)


def test_a_plugin_that_exits_the_interpreter_on_import_does_not_take_us_along(install: Install) -> None:
    install("quitter", error=SystemExit(127))
    assert "SystemExit: 127" in failure_of("quitter")


def test_an_unknown_backend_is_answered_with_what_is_installed_what_failed_and_how_to_install(
    install: Install,
) -> None:
    install("mine", backend("mine"))
    install("broken", error=ImportError("libfoo.so.3: cannot open"))
    with pytest.raises(BackendNotFound) as caught:
        torchhal.attention(QUERY, QUERY, QUERY, backend="mlne")
    text = str(caught.value)
    assert "no backend is called 'mlne'" in text
    assert "Installed: mine, reference." in text
    assert "libfoo.so.3: cannot open" in text
    assert 'pip install "torchhal[' in text


def test_a_hook_the_specification_does_not_know_is_refused_by_plugin_and_hook_name(install: Install) -> None:
    plugin = backend("mine")
    plugin.torchhal_convolution = hookimpl(lambda problem: None)
    plugin.torchhal_convolution.__name__ = "torchhal_convolution"
    install("mine", plugin)
    assert "mine" in failure_of("mine")
    assert "unknown hook 'torchhal_convolution'" in failure_of("mine")


def test_a_hook_argument_the_specification_does_not_know_is_refused_by_plugin_and_hook_name(
    install: Install,
) -> None:
    plugin = backend("mine")

    @hookimpl
    def torchhal_attention(problem: Any, stream: Any) -> None:
        return None

    plugin.torchhal_attention = torchhal_attention
    install("mine", plugin)
    text = failure_of("mine")
    assert "torchhal_attention" in text
    assert "stream" in text


def test_a_hook_that_was_not_marked_is_refused_instead_of_never_called(install: Install) -> None:
    plugin = backend("mine")
    plugin.torchhal_matmul = lambda problem: None
    install("mine", plugin)
    assert "'torchhal_matmul' is not marked with @torchhal.hookimpl" in failure_of("mine")


@pytest.mark.parametrize(
    ("plugin", "text"),
    [
        (backend("other"), "it calls itself 'other' and its entry point 'mine'"),
        (backend("mine", spec=">=2"), "written for hook specification >=2 and this core has 1.0"),
        (backend("mine", spec="one"), "specification range 'one' is not of the form"),
        (SimpleNamespace(), "must return a torchhal.BackendInfo and returned nothing"),
    ],
    ids=["another name", "newer specification", "malformed range", "no identity"],
)
def test_an_identity_that_does_not_fit_says_what_is_wrong(
    install: Install, plugin: object, text: str
) -> None:
    install("mine", plugin)
    assert text in failure_of("mine")


def test_an_identity_hook_that_raises_is_named(install: Install) -> None:
    def explode() -> Any:
        raise RuntimeError("driver query failed")

    explode.__name__ = "torchhal_backend"
    install("mine", SimpleNamespace(torchhal_backend=hookimpl(explode)))
    assert "its hook torchhal_backend raised RuntimeError: driver query failed" in failure_of("mine")


def test_a_claim_newer_than_this_core_fails_by_its_name() -> None:
    with pytest.raises(TypeError, match="quaternions"):
        torchhal.problems.AttentionClaims(quaternions=True)  # type: ignore[call-arg]


def test_two_distributions_with_one_name_are_told_apart(install: Install) -> None:
    install("mine", backend("mine"), distribution="first")
    install("mine", backend("mine"), distribution="second")
    assert "the name is taken by first" in failure_of("mine")


def test_torchhal_plugins_loads_only_what_it_names(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("one", backend("one"))
    install("two", error=ImportError("never tried"))
    monkeypatch.setenv("TORCHHAL_PLUGINS", "one")
    torchhal.selection.reset()
    assert set(registry().backends) == {"reference", "one"}
    assert registry().failures == {}
    with pytest.raises(BackendNotFound, match="Left out by TORCHHAL_PLUGINS: two"):
        registry().get("two")


def test_an_empty_torchhal_plugins_loads_none(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("one", backend("one"))
    monkeypatch.setenv("TORCHHAL_PLUGINS", "")
    torchhal.selection.reset()
    assert set(registry().backends) == {"reference"}


def test_a_plugin_named_by_torchhal_plugins_and_not_installed_is_a_load_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHHAL_PLUGINS", "ghost")
    torchhal.selection.reset()
    assert "no installed entry point in torchhal.backends is called so" in failure_of("ghost")


def test_loading_many_plugins_keeps_the_good_ones(install: Install) -> None:
    install("good", backend("good", lambda problem: constant_plan(7.0), preference={"cpu": 10}))
    for i in range(5):
        install(f"bad{i}", error=OSError(f"number {i}"))
    assert torchhal.attention(QUERY, QUERY, QUERY).unique().tolist() == [7.0]
    assert len(registry().failures) == 5
