"""``torchhal run``: a program as it stands, served, with its output and its end left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_support import invoke
from installed_backends import Site

import torchhal
from torchhal.cli import program


def python(site: Site, folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in ``folder``."""
    source = str(Path(torchhal.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(site.folder)])}
    command = [sys.executable, "-m", "torchhal.cli", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


FOREACH = """
import threading
import torch

def add():
    torch._foreach_add([torch.zeros(2)], 1.0)

add()
thread = threading.Thread(target=add, name="helper")
thread.start()
thread.join()
"""


PROGRAM = """
import sys, threading
import torch
import torch.nn.functional as F

def attend(causal=False):
    x = torch.zeros(1, 2, 4, 8)
    return F.scaled_dot_product_attention(x, x, x, is_causal=causal)

attend(), attend(), attend(True)
thread = threading.Thread(target=attend, name="helper")
thread.start()
thread.join()
print(__name__, sys.argv, sys.path[0], __file__)
if "--fail" in sys.argv:
    raise KeyError("boom")
sys.exit(7)
"""


def test_run_leaves_a_programs_output_arguments_and_exit_code_alone_and_routes_its_calls(
    site: Site, tmp_path: Path
) -> None:
    site.add("fast")
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "prog.py").write_text(PROGRAM)
    done = python(
        site,
        tmp_path,
        "run",
        "--routes",
        "routes.json",
        "with space/prog.py",
        "--json",
        "-m",
        "--backend",
        code=7,
    )
    script = "with space/prog.py"
    assert done.stdout == f"__main__ {[script, '--json', '-m', '--backend']} {folder} {script}\n"
    found = json.loads((tmp_path / "routes.json").read_text())
    # three calls in two threads, one of another kind
    assert [(r["chosen"], r["count"]) for r in found["routes"]] == [("fast", 3), ("fast", 1)]
    assert found["threads"] == []
    assert "by preference 50 for cpu (sleeps 0.0 s)" in done.stderr
    assert "thread" not in done.stderr


def test_run_serves_foreach_functions_where_a_backend_is_chosen_for_them_and_says_that_threads_go_without(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHHAL_FOREACH_BACKEND", "reference")
    (tmp_path / "prog.py").write_text(FOREACH)
    done = python(site, tmp_path, "run", "--routes", "routes.json", "prog.py")
    found = json.loads((tmp_path / "routes.json").read_text())
    assert [(r["problem"]["family"], r["count"]) for r in found["routes"]] == [("foreach", 1)]
    assert found["threads"] == ["helper"]
    assert "started a thread (helper)" in done.stderr


def test_run_shows_a_programs_own_traceback_and_none_of_ours(site: Site, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAM)
    done = python(site, tmp_path, "run", "-m", "prog", "--fail", code=1)
    assert (
        done.stdout == f"__main__ {[str(tmp_path / 'prog.py'), '--fail']} {tmp_path} {tmp_path / 'prog.py'}\n"
    )
    trace = done.stderr[done.stderr.index("Traceback") :]
    assert trace.rstrip().endswith("KeyError: 'boom'") and "prog.py" in trace
    assert "torchhal" not in trace and "runpy" not in trace
    assert "torch's own implementation" in done.stderr, "without a better backend torch keeps its calls"


@pytest.mark.usefixtures("restored")
def test_run_with_a_backend_fails_where_it_can_not_serve(site: Site, tmp_path: Path) -> None:
    site.add("picky")
    script = tmp_path / "prog.py"
    script.write_text(
        "import torch, torch.nn.functional as F; x = torch.zeros(1, 1, 2, 13); F.scaled_dot_product_attention(x, x, x)"
    )
    outcome = program.run_program(program.Program(str(script)), _with_mode("picky"))
    assert isinstance(outcome.error, torchhal.errors.Unsupported)
    assert "does not like 13 [unlucky]" in str(outcome.error)


def _with_mode(backend: str) -> Any:
    def around(execute: Any) -> None:
        with torchhal.enable(backend):
            execute()

    return around


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("import sys; sys.exit(3)", 3),
        ("raise SystemExit('sorry')", "sorry"),
        ("1/0", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_a_program_ends_this_process_as_it_would_end_its_own(
    tmp_path: Path, text: str, code: object, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "prog.py"
    script.write_text(text)
    outcome = program.run_program(program.Program(str(script)), lambda execute: execute())
    with pytest.raises(SystemExit) as ended:
        outcome.leave()
    assert ended.value.code == code


@pytest.mark.usefixtures("restored")
def test_a_program_that_comes_to_its_end_lets_this_one_go_on(tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text("")
    program.run_program(program.Program(str(tmp_path / "prog.py")), lambda execute: execute()).leave()


@pytest.mark.usefixtures("restored")
def test_run_refuses_what_is_not_there(site: Site, tmp_path: Path) -> None:
    missing = invoke("run", str(tmp_path / "nothing.py"))
    assert missing.exit_code == 2 and "there is no script" in missing.stderr and missing.stdout == ""
    module = invoke("run", "-m", "no_such_package.module")
    assert module.exit_code == 2 and "there is no module 'no_such_package.module' to run" in module.stderr
    (tmp_path / "prog.py").write_text("")
    backend = invoke("run", "--backend", "nobody", str(tmp_path / "prog.py"))
    assert backend.exit_code == 1 and "no backend is called 'nobody'. Installed: reference." in backend.stderr
    folder = invoke("run", "--routes", str(tmp_path / "no" / "routes.json"), str(tmp_path / "prog.py"))
    assert folder.exit_code == 2 and "there is no folder" in folder.stderr
    assert invoke("run", "--backnd", "x", str(tmp_path / "prog.py")).exit_code == 2
