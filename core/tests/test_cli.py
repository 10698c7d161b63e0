"""Every command as a person and as a program would use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import document, invoke
from installed_backends import Site

import torchhal
from torchhal import lock, selection
from torchhal.bench import ceilings
from torchhal.problems import AttentionProblem
from torchhal.registry import registry

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


def test_doctor_ends_each_backend_with_what_to_mend_and_how(site: Site) -> None:
    fault = {"code": "no_fan", "reason": "the fan [left] is missing", "do": 'pip install "fan[left]>=2"'}
    site.add("warm", probe=f"return {{'status': 'ready', 'mend': [{fault!r}]}}")
    text = invoke("doctor").stdout
    assert "the fan [left] is missing [no_fan]" in text
    assert 'to mend it: pip install "fan[left]>=2"' in text
    assert document("doctor")["backends"][0]["probe"]["findings"]["mend"] == [fault]


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
    assert [c["candidate"] for c in case["candidates"]] == ["fast", "torch sdpa", "torch sum, same bytes"]
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
