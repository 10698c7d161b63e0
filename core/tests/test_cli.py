"""Every command as a person and as a program would use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from installed_backends import Site, clean_environment
from typer.testing import CliRunner, Result

import torchhal
from torchhal import lock, selection
from torchhal.bench import ceilings
from torchhal.cli import program
from torchhal.cli.app import app
from torchhal.problems import AttentionProblem
from torchhal.registry import registry


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    clean_environment(monkeypatch, tmp_path / "selection.lock.json")
    yield Site(tmp_path / "site", monkeypatch)
    selection.reset()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def document(*arguments: str, exit_code: int = 0) -> Any:
    """The JSON document on standard output, on which there must be nothing else."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


# ---------------------------------------------------------------------------- doctor


def test_doctor_shows_backends_with_what_their_probes_found(site: Site) -> None:
    site.add("fast")
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "fake-fast 1.5" in result.stdout and "answer: 42" in result.stdout
    found = document("doctor")["backends"]
    assert [b["name"] for b in found] == ["fast", "reference"]
    assert found[0]["probe"]["findings"] == {"status": "ready", "answer": 42, "fma_gflops": 1e9}


def test_doctor_fails_for_a_plugin_that_does_not_load_and_shows_the_traceback_when_asked(site: Site) -> None:
    site.add_module("broken", "raise OSError('undefined symbol')")
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "broken (from fake-broken) in stage 'import': OSError: undefined symbol" in result.stdout
    assert "Traceback" not in result.stdout
    assert "Traceback" in invoke("doctor", "--verbose").stdout
    assert document("doctor", exit_code=1)["failures"][0]["name"] == "broken"


def test_doctor_fails_for_a_probe_that_raises(site: Site) -> None:
    site.add("shy", probe="raise RuntimeError('no such bus')")
    assert (
        document("doctor", exit_code=1)["backends"][0]["probe"]["status"]
        == "probe raised RuntimeError: no such bus"
    )


def test_doctor_lists_the_variables_in_force_and_flags_misspelt_ones(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHHAL_STRICKT", "1")
    monkeypatch.setenv("TORCHHAL_STRICT", "1")
    found = document("doctor")["variables"]
    assert found["set"]["TORCHHAL_STRICT"] == "1"
    assert found["unknown"] == [
        "nothing reads the environment variable TORCHHAL_STRICKT; did you mean TORCHHAL_STRICT?"
    ]


def test_doctor_tells_the_states_of_the_lock_file_apart(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "selection.lock.json"
    states = [document("doctor")["lock"]["state"]]
    lock.write(registry(), {}, path)
    states.append(document("doctor")["lock"]["state"])
    content = json.loads(path.read_text())
    content["environment"]["threads"] = "1000"
    path.write_text(json.dumps(content))
    stale = document("doctor")["lock"]
    states.append(stale["state"])
    path.write_text("{")
    states.append(document("doctor")["lock"]["state"])
    monkeypatch.setenv("TORCHHAL_LOCK", "")
    states.append(document("doctor")["lock"]["state"])
    assert states == ["absent", "valid", "stale", "corrupt", "off"]
    assert stale["detail"] == f"threads was '1000', is '{torch.get_num_threads()}'"


# ---------------------------------------------------------------------------- run


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


@pytest.fixture
def restored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that run inside this process find, and leave, their own ``sys.argv`` and ``sys.path``."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", ["the script's folder comes here", *sys.path])


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


# ---------------------------------------------------------------------------- explain


def test_explain_gives_the_route_that_the_real_call_takes(site: Site) -> None:
    site.add("fast")
    told = document(
        "explain", "attention", "--heads", "4", "--kv-heads", "2", "--head-size", "8", "--causal", "--grad"
    )
    query, key = (torch.zeros(1, h, 3, 8, requires_grad=True) for h in (4, 2))
    real = torchhal.explain(torchhal.attention, query, key, key, is_causal=True, enable_gqa=True)
    assert told["chosen"] == real.chosen == "fast"
    assert told["problem"] == json.loads(real.problem.text)


def test_explain_says_who_declined_and_why(site: Site) -> None:
    site.add("picky")
    result = invoke("explain", "attention", "--mask", "bool", "--lse")
    assert result.exit_code == 0
    assert "chosen: reference" in result.stdout
    assert "picky: does not claim boolean_mask, lse [unclaimed_feature]" in result.stdout


def test_explain_fails_where_nobody_the_policy_allows_can_serve(site: Site) -> None:
    site.add("picky")
    told = document("explain", "attention", "--head-size", "13", "--backend", "picky", exit_code=1)
    assert told["chosen"] is None
    assert told["declined"] == [{"backend": "picky", "code": "unlucky", "reason": "does not like 13"}]


def test_explain_answers_for_devices_this_machine_does_not_have(site: Site) -> None:
    site.add("fast")
    told = document("explain", "attention", "--device", "xpu", "--dtype", "bfloat16")
    assert told["problem"]["device"] == {"device": "xpu:0"}
    assert {"backend": "fast", "code": "other_device", "reason": "computes on cpu, not on xpu"} in told[
        "declined"
    ]


def test_explain_tells_what_the_mode_leaves_to_torch(site: Site) -> None:
    assert document("explain", "attention")["chosen"] == "reference"
    assert document("explain", "attention", "--mode")["chosen"] == "torch"


def test_explain_reports_a_stale_lock_file_beside_the_route(site: Site, tmp_path: Path) -> None:
    lock.write(registry(), {}, tmp_path / "selection.lock.json")
    site.add("newcomer")
    (note,) = document("explain", "attention")["notes"]
    assert "is not used: backend newcomer was 'absent', is '1.5'" in note


@pytest.mark.parametrize(
    ("arguments", "features"),
    [
        (("matmul", "--epilogue", "relu", "--bias", "--batched"), {"batched", "bias", "epilogue"}),
        (("matmul", "--packed", "4", "--group", "32", "--dtype", "bfloat16"), {"packed_int4"}),
        (
            ("foreach", "--function", "mul", "--operands", "list,scalar", "--in-place"),
            {"in_place", "scalars"},
        ),
    ],
)
def test_explain_knows_the_other_families(site: Site, arguments: tuple[str, ...], features: set[str]) -> None:
    told = document("explain", *arguments)
    assert told["chosen"] == "reference"
    assert set(told["problem"]["features"]["set"]) == features


def test_explain_reads_a_problem_as_it_stands_in_routes_and_lock_files(site: Site) -> None:
    text = AttentionProblem(torch.device("cpu"), is_causal=True, features=frozenset({"causal"})).text
    assert document("explain", "problem", text)["problem"] == json.loads(text)
    result = invoke("explain", "problem", "{}")
    assert result.exit_code == 1 and "expected the text of a problem" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention", "--dtype", "float31"), "expected the name of a torch dtype"),
        (("attention", "--device", "gpu"), "--device expects a torch device such as cpu"),
        (("attention", "--mask", "block"), "--mask expects bool or float and got 'block'"),
        (("foreach", "--operands", "list,tuple"), "--operands expects list, scalars or scalar"),
        (("matmul", "--epilogue", "frobnicate"), "expected the name of a pointwise function of torch"),
    ],
)
def test_explain_ends_with_2_for_words_it_does_not_know(
    site: Site, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("explain", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in " ".join(result.stderr.split())


def test_errors_are_json_on_standard_output_when_json_is_asked_for(site: Site) -> None:
    told = document("explain", "attention", "--heads", "3", "--kv-heads", "2", exit_code=1)
    assert told["error"]["type"] == "InvalidProblem"
    assert "3 over 2" in told["error"]["message"]


# ---------------------------------------------------------------------------- tune


def routes_file(folder: Path) -> str:
    problem = AttentionProblem(
        torch.device("cpu"), query_heads=1, key_heads=1, head_size=8, value_head_size=8
    )
    (folder / "routes.json").write_text(json.dumps({"routes": [{"problem": json.loads(problem.text)}]}))
    return str(folder / "routes.json")


def test_tune_measures_the_problems_of_a_run_and_writes_the_lock_file(site: Site, tmp_path: Path) -> None:
    site.add("fast", preference=-1)
    site.add("slow", delay=0.05, preference=90)
    told = document("tune", "--routes", routes_file(tmp_path), "--length", "4")
    (found,) = told["problems"]
    assert found["backend"] != "slow" and set(found["seconds"]) == {"fast", "slow", "reference"}
    assert told["lock"] == str(tmp_path / "selection.lock.json")
    selection.reset()
    explained = document("explain", "attention", "--heads", "1", "--head-size", "8")
    assert explained["rule"].startswith("the lock file") and explained["chosen"] == found["backend"]


def test_tune_dry_run_shows_times_and_writes_nothing(site: Site, tmp_path: Path) -> None:
    result = invoke("tune", "--routes", routes_file(tmp_path), "--length", "4", "--dry-run")
    assert result.exit_code == 0
    assert "B=1 L=4 S=4: reference" in result.stdout and "Nothing was written." in result.stdout
    assert not (tmp_path / "selection.lock.json").exists()


def test_tune_fails_and_names_a_backend_that_is_wrong(site: Site, tmp_path: Path) -> None:
    site.add("wrong", factor=2.0)
    result = invoke("tune", "--routes", routes_file(tmp_path), "--length", "4")
    assert result.exit_code == 1
    assert "wrong is wrong by" in result.stdout


def test_tune_refuses_to_overwrite_a_file_that_is_no_lock_file_before_measuring(
    site: Site, tmp_path: Path
) -> None:
    site.add("slow", delay=5.0)
    (tmp_path / "thesis.json").write_text("years of work")
    result = invoke("tune", "--routes", routes_file(tmp_path), "--output", str(tmp_path / "thesis.json"))
    assert result.exit_code == 1 and "is not a selection lock file" in result.stderr


def test_tune_options_that_contradict_each_other_end_with_2(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("tune", "--keys", "8").exit_code == 2
    monkeypatch.setenv("TORCHHAL_LOCK", "")
    result = invoke("tune", "--length", "4")
    assert result.exit_code == 2 and "TORCHHAL_LOCK is empty" in result.stderr


# ---------------------------------------------------------------------------- bench


def test_bench_attention_reports_every_candidate_and_draws_the_chart(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(ceilings, "_SIDE", 64)
    monkeypatch.setattr(ceilings, "_BYTES", 1 << 16)
    site.add("fast")
    file = tmp_path / "chart.png"
    told = document(
        "bench", "attention", "--quick", "--cases", "small-decode-128-d64-f32", "--plot", str(file)
    )
    (case,) = told["cases"]
    assert [c["candidate"] for c in case["candidates"]] == ["fast", "torch sdpa"]
    assert all(c["passed"] and c["seconds"]["median"] > 0 for c in case["candidates"])
    assert told["ceilings"]["gflops_source"] == "probe of fast"
    assert file.exists()
    table = invoke("bench", "attention", "--quick", "--cases", "small-decode-128-d64-f32")
    assert table.exit_code == 0 and "limits in this run: 1000000000 GFLOP/s (probe of fast)" in table.stdout


def test_bench_attention_fails_for_a_backend_that_is_wrong(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_SIDE", 64)
    monkeypatch.setattr(ceilings, "_BYTES", 1 << 16)
    site.add("wrong", factor=2.0)
    told = document("bench", "attention", "--quick", "--cases", "small-decode-128-d64-f32", exit_code=1)
    assert told["cases"][0]["candidates"][0]["passed"] is False


def test_bench_ends_with_2_for_a_case_it_does_not_know(site: Site) -> None:
    result = invoke("bench", "attention", "--cases", "decoed")
    assert result.exit_code == 2 and "no attention case is called 'decoed'" in result.stderr


# ---------------------------------------------------------------------------- cache


@pytest.mark.usefixtures("restored")
def test_cache_commands_keep_check_and_explain_a_store(site: Site, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    (tmp_path / "prog.py").write_text("")
    assert document("cache", "list", store)["keys"] == []
    assert document("cache", "verify", store)["sections"] == []
    assert invoke("cache", "explain", store).exit_code == 1
    assert invoke("cache", "load", store).exit_code == 0
    kept = invoke("cache", "save", store, str(tmp_path / "prog.py"))
    assert kept.exit_code == 0 and kept.stdout == ""
    assert invoke("cache", "save", store).exit_code == 2


def _section(folder: Path) -> Path:
    from torchhal import _cache_format as fmt
    from torchhal._fingerprint import fingerprint

    opened = torchhal.cache.cache_store(str(folder))
    opened.put("compile-x/1", fmt.encode_section(fingerprint(), [fmt.Artifact("inductor", "k", b"content")]))
    return next(p for p in folder.rglob("*") if p.is_file() and p.name.startswith("entry-"))


def test_cache_verify_and_explain_tell_an_intact_section_from_a_damaged_one(
    site: Site, tmp_path: Path
) -> None:
    file = _section(tmp_path / "store")
    store = str(tmp_path / "store")
    (intact,) = document("cache", "verify", store)["sections"]
    assert intact == {"section": "compile-x/1", "artifacts": 1, "fault": ""}
    assert document("cache", "explain", store)["sections"] == [
        {"section": "compile-x/1", "loads": True, "reasons": []}
    ]
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    told = document("cache", "verify", store, exit_code=1)
    assert told["damaged"] == 1 and told["sections"][0]["fault"]
    assert document("cache", "explain", store, exit_code=1)["sections"][0]["loads"] is False


# ---------------------------------------------------------------------------- the whole


def test_importing_torchhal_brings_in_neither_the_command_line_nor_what_it_needs() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import torchhal; "
        "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in ('typer', 'rich', 'click', 'matplotlib') "
        "or m.startswith(('torchhal.cli', 'torchhal.bench'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_without_arguments_the_commands_are_listed() -> None:
    text = invoke("--help").stdout
    assert all(name in text for name in ("doctor", "run", "explain", "tune", "bench", "cache"))
    assert torch.__version__ in invoke("--version").stdout
