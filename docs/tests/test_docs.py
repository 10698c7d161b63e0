"""The documentation can not rot: what exists is described, and what is described exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import typer

import torchhal
from torchhal import environment, errors, hookspecs, problems
from torchhal.problems import PROBLEMS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SITE = ROOT / "site"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
SOURCES = [
    *ROOT.glob("core/src/**/*.py"),
    *ROOT.glob("backends/*/src/**/*.py"),
    *ROOT.glob("backends/*/native/**/*.[ch]*"),
]

HOOKS = [name for name in vars(hookspecs) if name.startswith("torchhal_")]


def site(page: str) -> str:
    path = SITE / page
    assert path.is_file(), f"{path} is not there; build the site first: sphinx-build -W -b html docs site"
    return path.read_text(encoding="utf-8")


def read_variables() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    return set(re.findall(r"\"(TORCHHAL_[A-Z0-9_]*[A-Z0-9])\"", text))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_on_the_hooks_page_with_its_sections(hook: str) -> None:
    assert f'id="torchhal.hookspecs.{hook}"' in site("hooks.html")
    docstring = getattr(hookspecs, hook).__doc__
    for section in ("When called", "Must", "Reference", "Checked by"):
        assert re.search(rf"^\s*{section}$", docstring, re.MULTILINE), (
            f"the docstring of {hook} has no section {section!r}"
        )


def test_every_claim_is_on_the_hooks_page() -> None:
    page = site("hooks.html")
    claims = {name: kind for name, kind in vars(problems).items() if name.endswith("Claims")}
    assert len(claims) == len(PROBLEMS)
    for name, kind in claims.items():
        for field in dataclasses.fields(kind):
            assert f'id="torchhal.problems.{name}.{field.name}"' in page, (
                f"{name}.{field.name} is not documented"
            )


@pytest.mark.parametrize("name", sorted(environment.VARIABLES))
def test_every_variable_of_the_core_is_on_the_selection_page(name: str) -> None:
    assert name in site("selection.html")


def test_every_variable_that_sources_read_is_documented() -> None:
    text = (
        site("selection.html")
        + "".join(PAGES.values())
        + "".join(p.read_text() for p in ROOT.glob("backends/*/README.md"))
    )
    missing = {name for name in read_variables() if name not in text}
    assert not missing, f"described nowhere: {', '.join(sorted(missing))}"


def test_every_variable_in_the_documentation_is_read_by_something() -> None:
    described = {name for text in PAGES.values() for name in re.findall(r"\bTORCHHAL_[A-Z0-9_]+\b", text)}
    prefix_alone = {"TORCHHAL_"}
    assert described - read_variables() - set(environment.VARIABLES) - prefix_alone == set()


@pytest.mark.parametrize("name", sorted(n for n in torchhal.__all__ if callable(getattr(torchhal, n))))
def test_every_public_name_is_on_the_api_page(name: str) -> None:
    assert f'id="torchhal.{name}"' in site("api.html")
    assert getattr(torchhal, name).__doc__, f"torchhal.{name} has no docstring"


def test_every_error_is_explained() -> None:
    raised = {
        n
        for n, e in vars(errors).items()
        if isinstance(e, type) and issubclass(e, Exception) and e.__module__ == errors.__name__
    }
    page = site("api.html")
    assert {name for name in raised if f'id="torchhal.errors.{name}"' not in page} == set()


CODES = {
    "core": ROOT / "core/src/torchhal",
    "reference": ROOT / "core/src/torchhal/reference",
    **{name: ROOT / "backends" / name / "src" for name in ("cpu_x86", "cuda128", "xpu")},
}


@pytest.mark.parametrize("origin", CODES)
def test_every_code_of_a_decline_is_explained(origin: str) -> None:
    files = [p for p in CODES[origin].rglob("*.py") if origin != "core" or "reference" not in p.parts]
    codes = set(re.findall(r"Decline\(\s*\"(\w+)\"", "".join(p.read_text() for p in files)))
    core, *others = PAGES["troubleshooting.md"].split("\nFrom `")
    own = next((text for text in others if text.startswith(f"{origin}`")), "")
    assert codes
    assert {code for code in codes if f"`{code}`" not in core + own} == set()


def test_every_command_in_the_documentation_exists() -> None:
    from torchhal.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = "".join(
        [*PAGES.values(), *((ROOT / name).read_text() for name in ("README.md", "core/README.md"))]
    )
    used = set(re.findall(r"^ *torchhal (\w+)|`torchhal (\w+)", text, re.MULTILINE))
    assert {first or second for first, second in used} - set(commands) == set()
    assert len(used) >= 5


def test_every_link_between_files_leads_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}, which does not exist"


def test_every_decision_is_in_the_index() -> None:
    for path in (DOCS / "decisions").glob("0*.md"):
        assert path.stem in PAGES["decisions/index.md"]
