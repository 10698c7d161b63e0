"""The native library: finding and loading it, its torch operators, and choosing instruction sets by measurement.

Environment:

- ``TORCHHAL_CPU_X86_ISA``: ``avx2``, ``avx512``, ``avx512_bf16`` or ``amx_bf16`` for every dtype, instead of measuring;
- ``TORCHHAL_CPU_X86_LIBRARY``: path of the library to load, for developers who build it by hand.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

from torchhal_cpu_x86 import operators

__all__ = ["DTYPES", "ISAS", "InstructionSetError", "Measurement", "Native", "NativeUnavailable", "load"]

INTERFACE_VERSION = 6
ISAS = {"avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx_bf16": 4}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
ISA_VARIABLE = "TORCHHAL_CPU_X86_ISA"
LIBRARY_VARIABLE = "TORCHHAL_CPU_X86_LIBRARY"


class NativeUnavailable(RuntimeError):
    """The native library cannot be used here; the text says why and what would help."""


class InstructionSetError(ValueError):
    """An instruction set was asked for that does not exist or that this machine lacks."""


@dataclass(frozen=True)
class Measurement:
    """What the kernels reach on this machine.

    ``attention``: GFLOP/s of one thread, by instruction set and dtype name; ``fma``: float32 multiply-add GFLOP/s by
    instruction set, as (one thread, all threads); ``bandwidth``: read GB/s, the better of one
    thread and all; ``threads``: how many those are.
    """

    attention: dict[str, dict[str, float]]
    fma: dict[str, tuple[float, float]]
    bandwidth: float
    threads: int


def _library_path() -> Path:
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        return Path(override)
    return Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")


def _torch_library() -> ctypes.CDLL:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name))


def _open(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise NativeUnavailable(
            f"the native library {path} does not exist: this package was installed without it ({platform.machine()}); "
            f"install a torchhal-cpu-x86 wheel built for this machine, or set {LIBRARY_VARIABLE}"
        )
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the native library {path} does not load: {error}") from error


_C_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "thal_interface_version": (ctypes.c_int32, []),
    "thal_supported_isas": (ctypes.c_uint32, []),
    "thal_error_text": (ctypes.c_char_p, [ctypes.c_int]),
    "thal_set_isa": (ctypes.c_int, [ctypes.c_int32, ctypes.c_int32]),
    "thal_get_isa": (ctypes.c_int32, [ctypes.c_int32]),
    "thal_primitive_count": (ctypes.c_int32, []),
    "thal_primitive_name": (ctypes.c_char_p, [ctypes.c_int32]),
    "thal_measure_fma": (
        ctypes.c_double,
        [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "thal_measure_attention": (ctypes.c_double, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "thal_measure_bandwidth": (
        ctypes.c_double,
        [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "thal_map_program_new": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p]),
    "thal_map_program_free": (None, [ctypes.c_int64]),
    "thal_map_run": (ctypes.c_int, [ctypes.c_void_p]),
    "thal_matmul_run": (ctypes.c_int, [ctypes.c_void_p]),
    "thal_torch_symbol_count": (ctypes.c_int32, []),
    "thal_torch_symbol_name": (ctypes.c_char_p, [ctypes.c_int32]),
    "thal_torch_register": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32]),
}


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in _C_FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise NativeUnavailable(
                f"the native library {library._name} has no {name}: reinstall torchhal-cpu-x86"
            )
        function.restype, function.argtypes = result, arguments
    found = library.thal_interface_version()
    if found != INTERFACE_VERSION:
        raise NativeUnavailable(
            f"the native library {library._name} has interface version {found}, this package needs "
            f"{INTERFACE_VERSION}: reinstall torchhal-cpu-x86"
        )


def _address(library: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None


def _register_with_torch(library: ctypes.CDLL) -> None:
    shim = _torch_library()
    names = [library.thal_torch_symbol_name(i).decode() for i in range(library.thal_torch_symbol_count())]
    addresses = (ctypes.c_void_p * len(names))(*(_address(shim, name) for name in names))
    message = ctypes.create_string_buffer(256)
    if library.thal_torch_register(addresses, len(names), message, len(message)):
        raise NativeUnavailable(
            f"torch {torch.__version__} cannot take the native operators: {message.value.decode()}; "
            "torch 2.10 or newer is needed"
        )


def _cpu_description() -> str:
    """Model and feature flags of the CPU, as far as the operating system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {platform.machine()}"
    wanted = ("model name", "model\t", "cpu family", "stepping", "flags")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _fingerprint(path: Path) -> str:
    stat = path.stat()
    text = f"{_cpu_description()}\n{INTERFACE_VERSION}\n{stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()


def _cache_file() -> Path:
    return Path(platformdirs.user_cache_dir("torchhal")) / "cpu_x86_isa.json"


def _read_choices(fingerprint: str) -> dict[str, str]:
    """Choices kept for this machine and library; none when the file is missing, damaged or made elsewhere."""
    try:
        data = json.loads(_cache_file().read_text())
        choices = data["choices"] if data["fingerprint"] == fingerprint else {}
        return {str(dtype): str(isa) for dtype, isa in choices.items() if isa in ISAS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_choices(fingerprint: str, choices: dict[str, str]) -> None:
    """Replaces the file in one step; a cache that cannot be written only costs the next process its measurement."""
    target = _cache_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
        with os.fdopen(handle, "w") as file:
            json.dump({"fingerprint": fingerprint, "choices": choices}, file)
        os.replace(name, target)
    except OSError:
        return


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Native:
    """The loaded library. Its operators are ``torch.ops.torchhal_cpu_x86.*``; get one with `load`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = _open(path)
        _declare(self.library)
        if not self.instruction_sets():
            raise NativeUnavailable(
                "this CPU or operating system lacks AVX2, FMA or F16C, which every kernel needs"
            )
        _register_with_torch(self.library)
        operators.register()
        self._fingerprint = _fingerprint(path)

    def instruction_sets(self) -> tuple[str, ...]:
        """Names of the instruction sets this CPU and operating system support, narrowest first."""
        bits = self.library.thal_supported_isas()
        return tuple(name for name, code in ISAS.items() if bits >> code & 1)

    def _checked(self, result: float) -> float:
        if result < 0:
            raise RuntimeError(f"measuring failed: {self.library.thal_error_text(int(-result)).decode()}")
        return result

    def attention_rate(self, isa: str, dtype: torch.dtype, repeats: int = 5) -> float:
        """GFLOP/s of one thread on an attention problem that fits in the L2 cache (a few milliseconds)."""
        code = self._code(isa)
        return self._checked(self.library.thal_measure_attention(code, DTYPES[dtype], repeats))

    def fma_rate(self, isa: str, threads: int = 1) -> float:
        """Peak float32 multiply-add GFLOP/s of `threads` of torch's threads."""
        return self._checked(
            self.library.thal_measure_fma(self._code(isa), 5, threads, *self._threads(threads))
        )

    def bandwidth(self, size: int = 256 << 20, threads: int | None = None) -> float:
        """Read GB/s over a buffer of `size` bytes, by all of torch's threads unless `threads` says otherwise."""
        count = threads or torch.get_num_threads()
        return self._checked(self.library.thal_measure_bandwidth(size, 3, count, *self._threads(count)))

    def prepare_map(self, description: ctypes.Structure) -> int:
        """The number of a function that is prepared from a ``thal_map_program``; `free_map` forgets it."""
        found = ctypes.c_int64()
        self._check_map(
            self.library.thal_map_program_new(ctypes.addressof(description), ctypes.addressof(found))
        )
        return found.value

    def free_map(self, program: int) -> None:
        """Forgets a prepared function."""
        self.library.thal_map_program_free(program)

    def map(self, call: ctypes.Structure) -> None:
        """Runs a ``thal_map``, in which ``parallel`` is what `parallel` gives."""
        self._check_map(self.library.thal_map_run(ctypes.addressof(call)))

    def _check_map(self, code: int) -> None:
        if code:
            raise RuntimeError(f"torchhal_cpu_x86 foreach: {self.library.thal_error_text(code).decode()}")

    def matmul(self, call: bytes) -> None:
        """Runs a ``thal_matmul``, in which ``parallel`` is what `parallel` gives."""
        code = self.library.thal_matmul_run(call)
        if code:
            raise RuntimeError(f"torchhal_cpu_x86 matmul: {self.library.thal_error_text(code).decode()}")

    @functools.cached_property
    def notes_writes(self) -> bool:
        """Whether the operator ``foreach`` tells autograd what it wrote to; Python has to where torch hides how."""
        return _address(_torch_library(), BUMP_VERSION) is not None

    @functools.cached_property
    def parallel(self) -> int:
        """Address of the callback that runs tasks on torch's threads."""
        return ctypes.cast(self.library.thal_torch_parallel, ctypes.c_void_p).value or 0

    def _threads(self, count: int) -> tuple[Any, None]:
        """The callback that runs tasks on torch's threads. More than torch has would share scratch, not cores."""
        if count > torch.get_num_threads():
            raise ValueError(f"torch has {torch.get_num_threads()} threads, {count} were asked for")
        return self.parallel, None

    def _code(self, isa: str) -> int:
        if isa not in self.instruction_sets():
            raise InstructionSetError(
                f"instruction set {isa!r} is not available here; expected one of: {', '.join(self.instruction_sets())}"
            )
        return ISAS[isa]

    def measure(self, bandwidth_bytes: int = 256 << 20) -> Measurement:
        """All measurements: about 0.2 s and, while it runs, `bandwidth_bytes` of memory."""
        threads = torch.get_num_threads()
        sets = self.instruction_sets()
        return Measurement(
            attention={isa: {_dtype_name(d): self.attention_rate(isa, d) for d in DTYPES} for isa in sets},
            fma={isa: (self.fma_rate(isa), self.fma_rate(isa, threads)) for isa in sets},
            bandwidth=max(self.bandwidth(bandwidth_bytes, count) for count in {1, threads}),
            threads=threads,
        )

    def choose(self, dtype: torch.dtype) -> str:
        """The instruction set for `dtype`: the environment's, else the fastest as measured here once and remembered."""
        if dtype not in DTYPES:
            raise ValueError(f"no kernels for {dtype}; expected one of: {', '.join(map(str, DTYPES))}")
        forced = os.environ.get(ISA_VARIABLE)
        isa = self._forced(forced) if forced else self._measured(dtype)
        self.set_isa(dtype, isa)
        return isa

    def _forced(self, isa: str) -> str:
        if isa not in self.instruction_sets():
            raise InstructionSetError(
                f"{ISA_VARIABLE}={isa} is not available here; expected one of: {', '.join(self.instruction_sets())}"
            )
        return isa

    def _measured(self, dtype: torch.dtype) -> str:
        choices = _read_choices(self._fingerprint)
        name = _dtype_name(dtype)
        if choices.get(name) not in self.instruction_sets():
            choices[name] = self._fastest(dtype)
            _write_choices(self._fingerprint, choices)
        return choices[name]

    def _fastest(self, dtype: torch.dtype) -> str:
        """The narrowest set within 3 % of the best: sets that share a kernel are not told apart by noise."""
        rates = {isa: self.attention_rate(isa, dtype) for isa in self.instruction_sets()}
        return next(isa for isa, rate in rates.items() if rate >= 0.97 * max(rates.values()))

    def set_isa(self, dtype: torch.dtype, isa: str) -> None:
        """Makes the operators use `isa` for `dtype` from now on, in every thread."""
        self.library.thal_set_isa(DTYPES[dtype], self._code(isa))

    def get_isa(self, dtype: torch.dtype) -> str:
        """The instruction set the operators use for `dtype` now."""
        code = self.library.thal_get_isa(DTYPES[dtype])
        return next(name for name, value in ISAS.items() if value == code)


_LOADING = threading.Lock()


@functools.cache
def _load(path: Path) -> Native:
    native = Native(path)
    for dtype in DTYPES:
        native.choose(dtype)
    return native


def load() -> Native:
    """The library, loaded and registered with torch once per process.

    Raises `NativeUnavailable` when it is absent, does not fit this CPU or this torch, and `InstructionSetError` when
    ``TORCHHAL_CPU_X86_ISA`` names a set this machine lacks.
    """
    with _LOADING:  # operators can be registered with torch only once
        return _load(_library_path().absolute())
