"""The native library as torch and Python see it: operators, errors, threads, choice of instruction sets."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, LIBRARY, OPS, SETS, Tensor, inputs, respread
from torch._subclasses.fake_tensor import FakeTensorMode

from torchhal_cpu_x86 import native, operators


@pytest.mark.parametrize("lse", ["", "_lse"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_operators_pass_opcheck(masked: bool, swapped: bool, lse: str) -> None:
    tensors = inputs(2, 4, 2, 5, 7, 16, 8, torch.float32)
    if swapped:
        tensors = tuple(respread(x, "swapped") for x in tensors)  # type: ignore[assignment]
    mask = (torch.ones(1, 1, 5, 7, dtype=torch.bool),) if masked else ()
    name = ("masked_" if masked else "") + "attention" + lse
    torch.library.opcheck(getattr(OPS, name).default, (*tensors, *mask, True, 0.25))


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 2, 5, 7, 16, 8),
        (1, 1, 1, 1, 1, 1, 1),
        (0, 4, 2, 5, 7, 16, 8),
        (2, 4, 2, 0, 7, 16, 8),
        (2, 0, 0, 5, 7, 16, 8),
        (2, 4, 2, 5, 7, 16, 0),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_output_strides_follow_the_query_and_the_fake_agrees(shape: tuple[int, ...], swapped: bool) -> None:
    batch, heads, kv_heads, length, keys, e, ev = shape
    tensors = inputs(batch, heads, kv_heads, length, keys, e, ev, torch.bfloat16)
    if swapped:
        tensors = tuple(respread(x, "swapped") for x in tensors)  # type: ignore[assignment]
    real = OPS.attention_lse(*tensors, False, 1.0)
    with FakeTensorMode() as mode:
        fake = OPS.attention_lse(*(mode.from_tensor(x) for x in tensors), False, 1.0)
    for a, b in zip(real, fake):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    """A query whose dimensions lie in memory in any order, maybe cut out of a larger one or expanded."""
    size = [draw(st.integers(1, 3)) for _ in range(3)] + [draw(st.integers(2, 4))]
    order = draw(st.permutations(range(4)))
    cut = [draw(st.sampled_from([0, 0, 0, 1])) for _ in range(4)]
    base = torch.randn([size[i] + cut[i] for i in order])
    found = base.permute([order.index(i) for i in range(4)])[: size[0], : size[1], : size[2], : size[3]]
    for i in range(3):
        if draw(st.integers(0, 5)) == 0:
            found = found.narrow(i, 0, 1).expand(*[size[i] if j == i else -1 for j in range(4)])
    return found


@given(layouts(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_outputs_lie_in_memory_as_torchs_do_and_the_fake_says_so(
    query: torch.Tensor, other_size: bool
) -> None:
    value = torch.randn(*query.shape[:3], query.shape[3] + other_size)
    key = torch.randn(query.shape)
    found = OPS.attention(query, key, value, False, 0.5)
    with FakeTensorMode() as mode:
        fake = OPS.attention(*(mode.from_tensor(x) for x in (query, key, value)), False, 0.5)
    torchs = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)
    # Where rows of torch's output are not contiguous, 2.13 returns wrong numbers, which nobody can want to view.
    assert found.stride() == torchs.stride() or torchs.stride(3) != 1
    # Fake tensors have it their own way in dimensions of one element, for torch's operators too.
    assert found.squeeze().stride() == fake.squeeze().stride()
    weights = torch.softmax(query.double() @ key.double().mT * 0.5, -1)
    torch.testing.assert_close(found.double(), weights @ value.double(), atol=1e-5, rtol=1e-5)


def test_dynamic_lengths_compile_once() -> None:
    compiled = torch.compile(
        lambda q, k, v: OPS.attention(q, k, v, True, 0.5) + 1, backend="eager", dynamic=True, fullgraph=True
    )
    for length in (5, 9, 17):
        tensors = inputs(1, 2, 1, length, length + 2, 8, 8, torch.float32)
        torch.testing.assert_close(compiled(*tensors), OPS.attention(*tensors, True, 0.5) + 1)


BAD: list[tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], str]] = [
    (lambda q, k, v: (q[0], k, v), "query must have 4 dimensions, got 3"),
    (lambda q, k, v: (q[:1], k, v), r"batch sizes differ: query \(1, 4, 5, 16\)"),
    (lambda q, k, v: (q[..., :8], k, v), "query and key have different head sizes"),
    (lambda q, k, v: (q, k, v[:, :, :3]), "key and value have different lengths"),
    (lambda q, k, v: (q[:, :3], k, v), "query heads must be a multiple of key heads"),
    (lambda q, k, v: (q, k[:, :1], v), "key and value have different numbers of heads"),
    (lambda q, k, v: (q.int(), k, v), "dtype must be float32, bfloat16, float16 or float64"),
    (lambda q, k, v: (q, k.bfloat16(), v), "query, key and value must have the same dtype"),
    (lambda q, k, v: (q, k[:, :0], v[:, :0]), "query heads must be a multiple of key heads"),
    (lambda q, k, v: (q.to("meta"), k, v), "must be on one device, got meta, cpu, cpu"),
    (lambda q, k, v: (q, k.to("meta"), v), "must be on one device, got cpu, meta, cpu"),
    (lambda q, k, v: (q, k, v.to("meta")), "must be on one device, got cpu, cpu, meta"),
    (lambda q, k, v: (q[..., :0], k[..., :0], v), "the head size of query and key must be at least 1"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD, ids=[f"{number} {text}" for number, (_, text) in enumerate(BAD)]
)
def test_bad_input_raises_and_says_what_arrived(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], message: str
) -> None:
    tensors = change(*inputs(2, 4, 2, 5, 7, 16, 8, torch.float32))
    with pytest.raises(RuntimeError, match=message):
        OPS.attention(*tensors, False, 1.0)


def test_bad_masks_raise() -> None:
    tensors = inputs(2, 4, 2, 5, 7, 16, 8, torch.float32)
    with pytest.raises(
        RuntimeError, match=r"mask \(5, 6\) does not broadcast to \(B, Hq, L, S\) = \(2, 4, 5, 7\)"
    ):
        OPS.masked_attention(*tensors, torch.zeros(5, 6), False, 1.0)
    with pytest.raises(RuntimeError, match="mask must be boolean, float32, bfloat16 or float16"):
        OPS.masked_attention(*tensors, torch.zeros(5, 7, dtype=torch.int32), False, 1.0)
    with pytest.raises(RuntimeError, match="mask must have 0 to 4 dimensions, got 5"):
        OPS.masked_attention(*tensors, torch.zeros(1, 1, 1, 5, 7), False, 1.0)
    with pytest.raises(RuntimeError, match="must be on one device, got cpu, cpu, cpu, meta"):
        OPS.masked_attention(*tensors, torch.zeros(5, 7, device="meta"), False, 1.0)


def test_a_tensor_without_memory_is_refused() -> None:
    query, key, value = inputs(2, 4, 2, 5, 7, 16, 8, torch.float32)
    key.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"key \(2, 2, 7, 16\) has elements and no memory"):
        OPS.attention(query, key, value, False, 1.0)


# ---------------------------------------------------------------------------- derivatives

OPERATORS = {name: getattr(OPS, name).default for name in operators.OPERATORS}
NO_GRADIENT = "derivative for torchhal_cpu_x86::.*(attention|products).* is not implemented|has no gradient"
NO_FORWARD = "forward AD|forward mode AD"


FLEX = "0 0 1 1 0 0 1 1 -1 -1 0 0 0 0 0"
"""Dense attention with an LSE and a mask."""
CHAIN = "1 0 1 0 4 3 4 0 -1 -1 0 0 0 0 0"
"""One product with an int8 weight (4, 3) and a bias."""


def arguments_of(name: str) -> list[Tensor]:
    if name == "products":
        return [torch.ones(2, 4), torch.ones(1, 3), torch.ones(3)]
    tensors = list(inputs(2, 4, 2, 5, 7, 16, 8, torch.float32))
    if name.startswith(("masked", "flex", "attention_backward")):
        tensors.append(torch.zeros(5, 7))
    if name == "attention_backward":
        out, lse, _ = OPS.flex_attention(*tensors[:3], tensors[3:], FLEX, 1.0)
        tensors += [torch.ones_like(out), torch.ones_like(lse), out, lse]
    return tensors


def output(name: str, tensors: list[Tensor]) -> Tensor:
    if name == "products":
        (result,) = OPERATORS[name](tensors[0], [torch.ones(4, 3, dtype=torch.int8), *tensors[1:]], CHAIN)
    elif name == "flex_attention":
        result = OPERATORS[name](*tensors[:3], tensors[3:], FLEX, 1.0)
    elif name == "attention_backward":
        result = OPERATORS[name](*tensors[:3], tensors[3:4], FLEX, 1.0, "1 0 0", *tensors[4:])
    else:
        result = OPERATORS[name](*tensors, False, 1.0)
    return result[-1] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", OPERATORS)
def test_a_gradient_is_refused_and_never_lost(name: str) -> None:
    for position in range(len(arguments_of(name))):
        tensors = arguments_of(name)
        tensors[position].requires_grad_()
        with pytest.raises((RuntimeError, NotImplementedError), match=NO_GRADIENT):
            output(name, tensors).sum().backward()
        with torch.no_grad():
            assert not output(name, tensors).requires_grad


def test_a_gradient_by_torch_func_is_refused() -> None:
    query, key, value = arguments_of("attention")
    with pytest.raises((RuntimeError, NotImplementedError), match=NO_GRADIENT):
        torch.func.grad(lambda x: output("attention", [x, key, value]).sum())(query)


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", OPERATORS)
def test_a_forward_derivative_is_refused_and_never_zero(name: str) -> None:
    query, *others = arguments_of(name)
    with pytest.raises(NotImplementedError, match=NO_FORWARD):
        torch.func.jvp(lambda x: output(name, [x, *others]), (query,), (query,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NO_FORWARD):
        output(name, [forward_ad.make_dual(query, query), *others])


def test_a_compiled_gradient_is_refused() -> None:
    query, key, value = arguments_of("attention")
    run = torch.compile(lambda x: output("attention", [x, key, value]) + 1, backend="aot_eager")
    with pytest.raises(Exception, match=NO_GRADIENT):
        run(query.requires_grad_()).sum().backward()
    with torch.no_grad():
        assert torch.equal(run(query), output("attention", [query, key, value]) + 1)


WITHOUT_TORCHS_KERNEL = """
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torchhal_cpu_x86 import native

find = native._address
native._address = lambda library, name: None if name.startswith("_Z") else find(library, name)
native.load()
q = torch.randn(1, 2, 3, 4)

def run(x):
    return torch.ops.torchhal_cpu_x86.attention(x, q, q, False, 1.0)

def dual(x):
    with forward_ad.dual_level():
        run(forward_ad.make_dual(x, x))

def no_grad(x):
    with torch.no_grad():
        run(x)

assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(q), run(q))
no_grad(q.clone().requires_grad_())
torch.func.jvp(lambda x: run(q) + x, (q,), (q,))
for wrong in (
    lambda: run(q.clone().requires_grad_()),
    lambda: torch.func.grad(lambda x: run(x).sum())(q),
    lambda: torch.func.jvp(run, (q,), (q,)),
    lambda: dual(q),
):
    try:
        wrong()
    except NotImplementedError as error:
        print(error)
"""


def test_a_torch_without_the_refusing_kernel_still_refuses_derivatives() -> None:
    result = python(WITHOUT_TORCHS_KERNEL)
    assert result.returncode == 0, result.stderr
    refusal = "torchhal_cpu_x86.attention.default has no gradient and does not support forward AD"
    assert result.stdout.count(refusal) == 4


def _child(
    queue: multiprocessing.Queue[bool], tensors: tuple[Tensor, Tensor, Tensor], expected: Tensor
) -> None:
    torch.set_num_threads(1)
    queue.put(torch.equal(OPS.attention(*tensors, True, 0.2), expected))


def test_the_operators_work_after_fork() -> None:
    torch.set_num_threads(2)
    tensors = inputs(1, 4, 4, 200, 200, 32, 32, torch.float32)
    expected = OPS.attention(*tensors, True, 0.2)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[bool] = context.Queue()
    child = context.Process(target=_child, args=(queue, tensors, expected))
    child.start()
    assert queue.get(timeout=30)
    child.join(timeout=10)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_an_unsupported_instruction_set_is_refused_by_name() -> None:
    result = python("from torchhal_cpu_x86 import native; native.load()", TORCHHAL_CPU_X86_ISA="sse9")
    assert result.returncode != 0
    assert "TORCHHAL_CPU_X86_ISA=sse9 is not available here; expected one of: avx2" in result.stderr


def test_a_forced_instruction_set_serves_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "avx2")
    before = {dtype: LIBRARY.get_isa(dtype) for dtype in DTYPES}
    try:
        assert [LIBRARY.choose(dtype) for dtype in DTYPES] == ["avx2"] * len(DTYPES)
        assert [LIBRARY.get_isa(dtype) for dtype in DTYPES] == ["avx2"] * len(DTYPES)
    finally:
        for dtype, name in before.items():
            LIBRARY.set_isa(dtype, name)


def test_a_missing_library_is_explained() -> None:
    result = python(
        "from torchhal_cpu_x86 import native; native.load()", TORCHHAL_CPU_X86_LIBRARY="/nowhere/x.so"
    )
    assert "NativeUnavailable: the native library /nowhere/x.so does not exist" in result.stderr


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(native.platformdirs, "user_cache_dir", lambda _: str(tmp_path / "sub"))
    return tmp_path / "sub" / "cpu_x86_isa.json"


def test_choices_are_measured_once_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = LIBRARY.choose(torch.bfloat16)
    assert json.loads(cache.read_text())["choices"] == {"bfloat16": first}
    monkeypatch.setattr(native.Native, "attention_rate", lambda *_: pytest.fail("measured again"))
    assert LIBRARY.choose(torch.bfloat16) == first


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"fingerprint": "x", "choices": {"bfloat16": "avx2"}}', '{"choices": 3}']
)
def test_a_damaged_or_foreign_cache_is_measured_again(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    chosen = LIBRARY.choose(torch.bfloat16)
    assert json.loads(cache.read_text())["choices"]["bfloat16"] == chosen


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert LIBRARY.choose(torch.float32) in SETS


def test_measurements_are_plausible() -> None:
    measured = LIBRARY.measure(bandwidth_bytes=8 << 20)
    assert set(measured.attention) == set(measured.fma) == set(SETS)
    for isa in SETS:
        for rate in measured.attention[isa].values():
            assert (
                0.1 < rate < 4.2 * max(one for one, _ in measured.fma.values())
            )  # pairs can do twice the work
    assert measured.bandwidth > 0.1
    with pytest.raises(native.InstructionSetError, match="'mmx' is not available here"):
        LIBRARY.fma_rate("mmx")
