"""What tox.ini can not say by itself; tox loads this file by its name.

- An environment whose hardware or interpreter is missing ends as "not run: <reason>", never green: it says
  what it needs with ``hardware = NAME``, the reasons are repeated after tox's own summary, and a run in which
  nothing could run fails.
- The last line adds up the tests of all environments, as pytest would say it.
- ``tox --here`` runs the commands in the environment tox itself is installed in, where everything is installed
  already (``tools/dev.py`` does): one torch on the disk instead of one for each environment.
"""

from __future__ import annotations

import atexit
import collections
import platform
import re
import sys
from pathlib import Path
from typing import Any

from tox.config.loader.memory import MemoryLoader
from tox.execute.local_sub_process import LocalSubProcessExecutor
from tox.plugin import impl
from tox.tox_env.errors import Fail, Skip
from tox.tox_env.python.api import PythonInfo, PythonSpec, VersionInfo
from tox.tox_env.python.runner import PythonRun

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import hardware

_not_run: dict[str, str] = {}
_tests: collections.Counter[str] = collections.Counter()
_seconds: list[float] = []

LAST_LINE = re.compile(r"^=+ (?P<counts>\d+ [a-z].*) in (?P<seconds>[\d.]+)s\b.*=+$", re.MULTILINE)
"""How pytest ends: ``===== 2 failed, 31 passed, 1 warning in 4.20s =====``."""
COLOUR = re.compile(r"\x1b\[[\d;]*m")


@impl
def tox_add_option(parser: Any) -> None:
    parser.add_argument("--here", action="store_true", help="run in the environment tox is installed in")


@impl
def tox_register_tox_env(register: Any) -> None:
    register.add_run_env(Here)


@impl
def tox_add_core_config(core_conf: Any, state: Any) -> None:
    if state.conf.options.here:
        state.conf.options.default_runner = Here.id()


@impl
def tox_add_env_config(env_conf: Any, state: Any) -> None:
    env_conf.add_config("hardware", str, "", "backend whose hardware the environment needs")
    if state.conf.options.here:
        env_conf.loaders.insert(0, MemoryLoader(pass_env=["*"], commands_pre=[]))


@impl
def tox_on_install(tox_env: Any, arguments: Any, section: str, of_type: str) -> None:
    if "hardware" in tox_env.conf:  # tox's own environments have no such key
        _require(tox_env)


@impl
def tox_before_run_commands(tox_env: Any) -> None:
    _require(tox_env)


@impl
def tox_after_run_commands(tox_env: Any, exit_code: int, outcomes: list[Any]) -> None:
    """Adds up what pytest said last in each command."""
    for outcome in outcomes:
        for line in LAST_LINE.finditer(COLOUR.sub("", outcome.out)):
            _seconds.append(float(line["seconds"]))
            for count in line["counts"].split(", "):
                number, _, what = count.partition(" ")
                _tests[what.rstrip("s") if what in ("errors", "warnings") else what] += int(number)


@impl
def tox_env_teardown(tox_env: Any) -> None:
    """Notes an environment that was skipped for want of its interpreter."""
    try:
        tox_env.base_python  # noqa: B018
    except (Skip, Fail):
        wanted = ", ".join(tox_env.conf["base_python"])
        _not_run.setdefault(tox_env.conf.name, f"the interpreter {wanted} is not installed")


def _require(tox_env: Any) -> None:
    wanted = tox_env.conf["hardware"]
    reason = hardware.missing(wanted) if wanted else None
    if reason:
        _not_run[tox_env.conf.name] = reason
        raise Skip(f"not run: {reason}")


@atexit.register
def _report() -> None:
    for name, reason in _not_run.items():
        print(f"  {name}: not run: {reason}")
    if _seconds:
        counts = ", ".join(f"{number} {what}" for what, number in sorted(_tests.items()))
        print("  the tests of all environments together:")
        print(f" {counts} in {sum(_seconds):.2f}s ".center(80, "="))


class _NoInstaller:
    def install(self, *arguments: Any, **options: Any) -> None:
        """Everything is installed already."""

    def installed(self) -> list[str]:
        """Nothing that tox installed."""
        return []


class Here(PythonRun):
    """A tox environment that is the environment tox runs in."""

    _executor: LocalSubProcessExecutor | None = None

    @staticmethod
    def id() -> str:
        return "here"

    @property
    def executor(self) -> LocalSubProcessExecutor:
        self._executor = self._executor or LocalSubProcessExecutor(self.options.is_colored)
        return self._executor

    @property
    def installer(self) -> _NoInstaller:
        return _NoInstaller()

    @property
    def _package_tox_env_type(self) -> None:
        return None

    @property
    def _external_pkg_tox_env_type(self) -> None:
        return None

    @property
    def runs_on_platform(self) -> str:
        return sys.platform

    def _get_python(self, base_python: list[str]) -> PythonInfo | None:
        wanted = PythonSpec.from_string_spec(base_python[0])
        if wanted.path is None and (wanted.major, wanted.minor) != sys.version_info[:2]:
            return None
        version = VersionInfo(*sys.version_info)
        return PythonInfo(
            sys.implementation.name, version, sys.version, sys.maxsize > 2**32, platform.platform(), {}
        )

    @classmethod
    def python_spec_for_path(cls, path: Path) -> PythonSpec:
        return PythonSpec.from_string_spec(f"cpython{sys.version_info.major}.{sys.version_info.minor}")

    def create_python_env(self) -> None:
        """There is one already."""

    def env_bin_dir(self) -> Path:
        return Path(sys.executable).parent

    def env_python(self) -> Path:
        return Path(sys.executable)

    def env_site_package_dir(self) -> Path:
        return Path(sys.prefix)

    def prepend_env_var_path(self) -> list[Path]:
        return [self.env_bin_dir()]
