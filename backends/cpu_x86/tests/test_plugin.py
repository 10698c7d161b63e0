"""The backend as the core sees it: what it serves, what it declines and why, and how its plans travel."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import printed_by

import torchhal
import torchhal_cpu_x86
from torchhal import BackendInfo, Decline, Plan, registry, selection
from torchhal.errors import FallbackWarning, Unsupported
from torchhal.problems import AttentionProblem
from torchhal_cpu_x86 import hardware, native, plugin

PROBLEM = AttentionProblem(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    selection.reset()
    torch._dynamo.reset()
    yield
    selection.reset()


def qkv(
    *, dtype: torch.dtype = torch.float32, heads: int = 4, keys: int = 4, length: int = 33
) -> list[torch.Tensor]:
    return [torch.randn(2, h, length, 64, dtype=dtype) for h in (heads, keys, keys)]


def test_the_plugin_is_found_through_its_entry_point() -> None:
    assert registry.registry().get("cpu_x86").info.device_types == {"cpu"}
    assert isinstance(plugin.torchhal_backend(), BackendInfo)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_causal_and_masked_calls_are_served_without_being_asked_for(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype, keys=2)
    torchhal.attention(q, k, v, is_causal=True, enable_gqa=True)
    torchhal.attention(q, k, v, attn_mask=torch.rand(33, 33) > 0.5, enable_gqa=True, return_lse=True)
    torchhal.attention(q, k, v, attn_mask=torch.randn(2, 1, 33, 33, dtype=dtype), enable_gqa=True)
    assert {route.chosen for route in torchhal.routes()} == {"cpu_x86"}


REFUSED: list[tuple[str, Callable[[list[torch.Tensor]], Any], str]] = [
    (
        "mixed types",
        lambda t: torchhal.attention(t[0], t[1], t[2].bfloat16(), backend="cpu_x86"),
        "mixed_dtypes",
    ),
    (
        "float64 mask",
        lambda t: torchhal.attention(*t, attn_mask=torch.randn(33, 33).double(), backend="cpu_x86"),
        "a mask of torch.float64 is not served",
    ),
]


@pytest.mark.parametrize(("call", "reason"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_not_claimed_is_refused_with_the_reason(call: Callable[[Any], Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        call(qkv())


def test_what_is_not_claimed_falls_to_the_reference_with_a_warning() -> None:
    q, k, v = qkv()
    with pytest.warns(FallbackWarning, match="cpu_x86: does not claim mixed_dtypes"):
        assert torchhal.attention(q, k, v.bfloat16()).shape == q.shape  # type: ignore[union-attr]


def test_an_install_without_the_library_declines_with_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "gone.so"))
    answer = plugin.torchhal_attention(PROBLEM)
    assert isinstance(answer, Decline)
    assert answer.code == "no_native_library"
    assert "gone.so does not exist" in answer.reason


def test_a_mask_of_another_type_declines_by_name() -> None:
    answer = plugin.torchhal_attention(dataclasses.replace(PROBLEM, mask_dtype=torch.float64))
    assert isinstance(answer, Decline)
    assert answer.code == "mask_dtype"
    for served in (torch.bool, torch.float32, torch.bfloat16, torch.float16):
        assert isinstance(plugin.torchhal_attention(dataclasses.replace(PROBLEM, mask_dtype=served)), Plan)


def test_a_busy_machine_does_not_hide_what_one_thread_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native.Native, "fma_rate", lambda self, isa, threads=1: 104.0 if threads == 1 else 4.0
    )
    monkeypatch.setattr(native.Native, "bandwidth", lambda self, size, threads: 9.0 if threads == 1 else 2.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = hardware.probe()
    assert found["fma_gflops"] == 104.0
    assert found["read_gbps"] == 9.0


def test_another_architecture_declines_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.platform, "machine", lambda: "aarch64")
    answer = plugin.torchhal_attention(PROBLEM)
    assert isinstance(answer, Decline)
    assert answer.code == "not_x86_64"
    assert "aarch64" in answer.reason


def test_the_probe_never_raises_and_measures_the_ceilings() -> None:
    found = plugin.torchhal_backend().probe()
    assert found["status"] == "ready"
    assert found["fma_gflops"] > 1
    assert found["read_gbps"] > 0.1
    assert set(found["chosen"]) == {"float32", "bfloat16", "float16", "float64"}


def test_every_plan_promises_what_the_operators_keep() -> None:
    plan = plugin.torchhal_attention(PROBLEM)
    assert isinstance(plan, Plan)
    assert plan.deterministic
    assert plan.traceable
    assert not plan.differentiable


def test_extra_memory_does_not_grow_with_the_square_of_the_length() -> None:
    code = """
        import resource, torch, torchhal
        torch.set_num_threads(1)
        def peak(length):
            q = torch.randn(1, 1, length, 16)
            torchhal.attention(q, q, q, is_causal=True)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak(256)
        small = peak(1024)
        print(peak(16384) - small)
    """
    # Scores of 16384 x 16384 would take 1 GiB in float32; the tensors themselves take 4 MiB.
    assert printed_by(code) < 64 * 1024, "KiB"


def python_of_ours(call: Callable[[], Any]) -> set[str]:
    """Functions of torchhal and this backend that run during ``call``."""
    home = (str(Path(torchhal.__file__).parent), str(Path(torchhal_cpu_x86.__file__).parent))
    seen: set[str] = set()

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(home):
            seen.add(frame.f_code.co_qualname)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("form", ["public function", "mode inside"])
def test_a_compiled_call_runs_no_python_of_ours(form: str) -> None:
    q, k, v = qkv()
    mode = torchhal.enable()

    def program(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
        if form == "public function":
            return torchhal.attention(a, b, c, is_causal=True) + 1  # type: ignore[operator]
        with mode:
            return F.scaled_dot_product_attention(a, b, c, is_causal=True) + 1

    run = torch.compile(program, fullgraph=True)
    expected = program(q, k, v)
    run(q, k, v)
    assert python_of_ours(lambda: torch.testing.assert_close(run(q, k, v), expected)) == set()
    assert {route.chosen for route in torchhal.routes()} == {"cpu_x86"}


def test_a_mode_around_a_compiled_call_only_passes_torchs_own_calls_on() -> None:
    q, k, v = qkv()
    run = torch.compile(lambda a, b, c: F.scaled_dot_product_attention(a, b, c), fullgraph=True)
    with torchhal.enable():
        run(q, k, v)
        assert python_of_ours(lambda: run(q, k, v)) <= {"Mode.__torch_function__"}


class Program(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> Any:
        return torchhal.attention(q, k, k, is_causal=True, return_lse=True)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_an_exported_program_holds_the_native_operator_for_any_length() -> None:
    q, k, _ = qkv(length=20)
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(Program(), (q, k), dynamic_shapes={"q": {2: length}, "k": {2: length}})
    targets = {str(node.target) for node in program.graph.nodes}
    assert "torchhal_cpu_x86.attention_lse.default" in targets
    q, k, _ = qkv(length=51)
    for mine, eager in zip(program.module()(q, k), Program()(q, k), strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_an_aotinductor_package_calls_the_native_operator(tmp_path: Path) -> None:
    q, k, _ = qkv(length=20)
    with torch.no_grad():
        program = torch.export.export(Program(), (q, k))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        for mine, eager in zip(packaged(q, k), Program()(q, k), strict=True):
            assert torch.equal(mine, eager)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same_where_torchs_threads_would_hang() -> None:
    # A child of a process that has used OpenMP hangs in its first parallel region, torch's own included.
    q, k, v = qkv(length=300)
    expected = torchhal.attention(q, k, v, is_causal=True).numpy().copy()  # type: ignore[union-attr]
    child = os.fork()
    if child == 0:
        os._exit(0 if (torchhal.attention(q, k, v, is_causal=True).numpy() == expected).all() else 1)  # type: ignore[union-attr]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
