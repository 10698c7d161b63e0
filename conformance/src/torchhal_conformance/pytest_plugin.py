"""A backend's conformance as tests of its own, one for each case.

::

    from torchhal_conformance.pytest_plugin import ConformanceCase, conformance_cases

    @conformance_cases(backend="my_backend", family="attention")
    def test_conformance(case: ConformanceCase) -> None:
        case.check()

pytest imports this in every session, so that nothing else of the suite, and no torch, is imported before a test asks
for it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from torchhal_conformance.pool import Examiners
    from torchhal_conformance.run import Options

MARKER: Final = "torchhal_conformance"
GOOD: Final = ("pass", "unsupported-verified")
TIMEOUT: Final = 120.0
ERROR: Final = "torchhal_conformance_error"
"""Attribute of a pytest report: the suite failed and not the backend."""


class SuiteError(Exception):
    """The suite itself failed, or its worker did not start: counts neither for nor against the backend."""


def conformance_cases(
    backend: str, profile: str = "inference", family: str | None = None, seed: int = 0, plugin: str = ""
) -> pytest.MarkDecorator:
    """Parametrise a test over the cases that a backend is judged by; its argument ``case`` is a :class:`ConformanceCase`.

    Args:
        backend: name of the backend, which has to be installed unless there is a ``plugin``.
        profile: ``inference``, ``training`` or ``distributed``.
        family: cases of this family alone.
        seed: where the random numbers begin.
        plugin: ``module:attribute`` of a backend that is not installed.
    """
    mark: pytest.MarkDecorator = getattr(pytest.mark, MARKER)
    return mark(backend=backend, profile=profile, family=family, seed=seed, plugin=plugin)


@dataclass(frozen=True)
class ConformanceCase:
    """One case, examined in processes that the tests of a module share."""

    id: str
    shared: Shared

    def check(self) -> None:
        """Examine it.

        Raises:
            SuiteError: the suite failed, which pytest counts as an error.
            pytest.fail.Exception: the backend did, or could not be tested; says how to reproduce it.
        """
        __tracebackhide__ = True
        result = self.shared.examine(self.id)
        if result["status"] in GOOD:
            return
        error = result["error"] or {"class": "no error", "message": ""}
        said = (
            f"{result['status']}: {self.id}\n{error['class']}: {error['message']}\nreproduce: {self.command}"
        )
        if result["status"] == "error":
            raise SuiteError(said)
        pytest.fail(said, pytrace=False)

    @property
    def command(self) -> str:
        """What reproduces the case, in one line."""
        return self.shared.options.command(self.id)


class Shared:
    """Worker and judge of the cases of one test function, started by the first and ended when its module is done."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._examiners: Examiners | None = None

    def cases(self) -> list[ConformanceCase]:
        """The cases, in the order of a run.

        Raises:
            TorchhalError, ValueError: there is no such backend, profile or family.
        """
        from torchhal.registry import registry
        from torchhal_conformance import calls, examine, run
        from torchhal_conformance.model import PROFILES

        if self.options.profile not in PROFILES:
            raise ValueError(f"a profile is one of {', '.join(PROFILES)}, and not {self.options.profile!r}")
        name = examine.load_plugin(self.options.plugin) if self.options.plugin else self.options.backend
        claimed = registry().get(name).info.capabilities
        chosen = run.selected(self.options, claimed, calls.facilities(name))
        return [ConformanceCase(case.id, self) for _, case in chosen]

    def examine(self, case: str) -> dict[str, Any]:
        """The result of one case."""
        __tracebackhide__ = True
        from torchhal_conformance import judge
        from torchhal_conformance.child import StartFailed
        from torchhal_conformance.pool import Examiners, Worker

        options = self.options
        try:
            if self._examiners is None:
                worker = Worker(options.backend, options.plugin, options.seed, options.timeout, threads=1)
                self._examiners = Examiners([worker], options.seed, threads=1)
                self._examiners.start()
            return self._examiners.run(case, judge.is_recorded(case.partition("/")[0]))
        except StartFailed as error:
            raise SuiteError(str(error)) from None

    def stop(self) -> None:
        """End the processes; the next case would start others."""
        examiners, self._examiners = self._examiners, None
        if examiners is not None:
            examiners.__exit__()


# ---------------------------------------------------------------------------- what pytest calls


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--conformance-timeout``."""
    group = parser.getgroup("torchhal conformance")
    group.addoption(
        "--conformance-timeout", type=float, default=TIMEOUT, metavar="SECONDS",
        help=f"Seconds for one conformance case; {TIMEOUT:g} by default.",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", f"{MARKER}(backend, ...): what conformance_cases() puts on a test")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each case."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return
    from torchhal_conformance.run import Options

    shared = Shared(Options(**marker.kwargs, timeout=metafunc.config.getoption("--conformance-timeout")))
    metafunc.config.add_cleanup(shared.stop)
    found = shared.cases()
    metafunc.parametrize("case", found, ids=[case.id for case in found])


def _shared_of(item: pytest.Item | None) -> Shared | None:
    case = (
        item.callspec.params.get("case")
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else None
    )
    return case.shared if isinstance(case, ConformanceCase) else None


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the worker after the last of its cases."""
    shared = _shared_of(item)
    if shared is not None and _shared_of(nextitem) is not shared:
        shared.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Mark what is the suite's fault."""
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(SuiteError):
        setattr(report, ERROR, True)
    return report


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    """Count what is the suite's fault as an error, and not as a failure of the backend."""
    return ("error", "E", "ERROR") if getattr(report, ERROR, False) else None
