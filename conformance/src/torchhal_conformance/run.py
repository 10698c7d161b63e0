"""A run: which cases, in which order, through workers, into a report."""

from __future__ import annotations

import hashlib
import math
import platform
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from torchhal.hookspecs import FAMILIES
from torchhal.problems import SPEC_VERSION, Capabilities
from torchhal.registry import Backend, registry
from torchhal_conformance import calls, corpus, examine, explore, records, waivers
from torchhal_conformance.model import Case, in_profile
from torchhal_conformance.pool import Worker

TIMEOUT: Final = 120.0
"""Seconds for one case."""


@dataclass(frozen=True)
class Options:
    """What a run is asked for."""

    backend: str
    profile: str = "inference"
    family: str | None = None
    case: str | None = None
    shard: tuple[int, int] = (1, 1)
    seed: int = 0
    jobs: int = 1
    timeout: float = TIMEOUT
    time_budget: float | None = None
    explore: int = 0
    plugin: str = ""
    waivers: tuple[waivers.Waiver, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every case of the profile is asked for."""
        return self.family is None and self.case is None and self.shard == (1, 1)


Progress = Callable[[int, int, dict[str, Any]], None]
"""Called after each case with how many are done, of how many, and its result."""


def run(
    options: Options, path: Path, resume: bool = False, progress: Progress | None = None
) -> records.Report:
    """Run and write the report.

    Raises:
        BackendNotFound, BackendLoadError: there is no such backend.
        ReportError: ``resume`` with a report of something else.
    """
    with Workers(options) as workers:
        workers.first.start()  # what ends a process when it is imported does it there
        backend = loaded(options)
        header = make_header(options, backend)
        wanted = selected(options, backend.info.capabilities)
        report = _begin(path, header, resume)
        done = {result["case"] for result in report.results}
        pending = [placed for placed in wanted if placed[1].id not in done]
        with path.open("a", encoding="utf-8") as file:
            for result in _results(options, pending, workers):
                report.results.append(result)
                file.write(records.line(result))
                file.flush()
                if progress is not None:
                    progress(len(report.results), len(wanted), result)
    with path.open("a", encoding="utf-8") as file:
        report.footer = records.footer(
            header, report.results, corpus.required(options.profile, backend.info.capabilities), options.whole
        )
        file.write(records.line(report.footer))
    return report


def loaded(options: Options) -> Backend:
    """The backend that is examined, from its entry point or from ``plugin``."""
    name = examine.load_plugin(options.plugin) if options.plugin else options.backend
    return registry().get(name)


Placed = tuple[int, Case]
"""A case and its place in the whole of which a shard is a part."""


def selected(options: Options, capabilities: Capabilities) -> list[Placed]:
    """The cases of a run, in order.

    Raises:
        KeyError: there is no such case.
        ValueError: there is no such family.
    """
    if options.case is not None:
        named = explore.case_named if options.case.startswith("explore.") else corpus.case_named
        return [(0, named(options.case, options.seed))]
    if options.family not in (None, *FAMILIES):
        raise ValueError(f"there is no family {options.family!r}; there are {', '.join(FAMILIES)}")
    found = [
        case
        for case in corpus.cases(options.seed)
        if in_profile(case, options.profile)
        and corpus.applies(case, capabilities)
        and options.family in (None, case.sample.needs.family)
    ]
    found += [
        explore.random_case(name, options.seed) for name in explore.names(options.explore, options.seed)
    ]
    placed = [pair for pair in enumerate(found) if _in_shard(pair[1], options.shard)]
    return placed if options.time_budget is None else _spread(placed)


def _in_shard(case: Case, shard: tuple[int, int]) -> bool:
    number, count = shard
    return int(hashlib.sha256(case.id.encode()).hexdigest(), 16) % count == number - 1


def _spread(cases: Sequence[Placed]) -> list[Placed]:
    """One of each check, then the next of each: where time ends, everything has been looked at a little."""
    queues: dict[str, list[Placed]] = {}
    for order, case in cases:
        queues.setdefault(case.check.name, []).append((order, case))
    rounds = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(rounds) for queue in queues.values() if i < len(queue)]


# ---------------------------------------------------------------------------- results


class Workers:
    """The workers of a run, one for each job, ended with it."""

    def __init__(self, options: Options) -> None:
        threads = threads_of(options)
        self.all = [
            Worker(options.backend, options.plugin, options.seed, options.timeout, threads)
            for _ in range(options.jobs)
        ]
        self.first = self.all[0]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.all:
            self._idle.put(worker)

    def run(self, case: str) -> dict[str, Any]:
        """The result of a case, by whichever worker has nothing to do."""
        worker = self._idle.get()
        try:
            return worker.run(case)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.all:
            worker.close()


def _results(options: Options, pending: list[Placed], workers: Workers) -> Iterator[dict[str, Any]]:
    """Results in the order of the cases, whichever worker had them."""
    end = None if options.time_budget is None else time.monotonic() + options.time_budget
    late = {"status": "not-run", "error": {"class": "Budget", "message": "out of time"}}

    def one(placed: Placed) -> dict[str, Any]:
        order, case = placed
        outcome = late if end is not None and time.monotonic() > end else workers.run(case.id)
        return _record(order, case, outcome, options)

    with ThreadPoolExecutor(options.jobs) as executor:
        try:
            yield from executor.map(one, pending)
        except BaseException:
            workers.__exit__()  # what the other threads wait for ends now
            raise


def _record(order: int, case: Case, outcome: dict[str, Any], options: Options) -> dict[str, Any]:
    needs = case.sample.needs
    empty = dict.fromkeys(("ratio", "error", "expected", "got", "note", "waiver", "seconds"))
    described = {
        "record": "result", "order": order, "case": case.id,
        "check": case.check.name, "family": needs.family, "features": sorted(needs.features),
        "dtypes": sorted(str(t).removeprefix("torch.") for t in needs.dtypes), "choice": needs.choice,
        "kind": case.kind, "profile": case.profile,
    }  # fmt: skip
    record = {**empty, **outcome, **described}
    if record["ratio"] is not None and not math.isfinite(record["ratio"]):
        record["ratio"] = None
    return waivers.apply([record], options.waivers)[0]


# ---------------------------------------------------------------------------- header


def make_header(options: Options, backend: Backend) -> dict[str, Any]:
    """What was tested, with what, where."""
    from importlib import metadata

    return {
        "record": "header", "suite": metadata.version("torchhal-conformance"), "spec": SPEC_VERSION,
        "edition": corpus.EDITION, "profile": options.profile, "seed": options.seed,
        "shard": f"{options.shard[0]}/{options.shard[1]}", "whole": options.family is None and options.case is None,
        "backend": {"name": backend.name, "version": backend.version, "distribution": backend.distribution},
        "claims": claims(backend.info.capabilities), "environment": environment(backend, threads_of(options)),
        "corpus": corpus.digest(case.id for case in corpus.cases()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def threads_of(options: Options) -> int:
    """Threads of each worker: those of torch, shared out among the workers."""
    return max(1, torch.get_num_threads() // options.jobs)


def claims(capabilities: Capabilities) -> dict[str, Any]:
    """The claims as values that JSON holds."""

    def value(found: Any) -> Any:
        return (
            sorted(str(item).removeprefix("torch.") for item in found)
            if isinstance(found, frozenset)
            else found
        )

    families = {f.name: getattr(capabilities, f.name) for f in fields(capabilities)}
    return {
        name: {key: value(found) for key, found in vars(claimed).items()}
        for name, claimed in families.items()
        if claimed is not None
    }


def environment(backend: Backend, threads: int) -> dict[str, str]:
    """Versions and hardware."""
    device = calls.device_of(backend.name)
    name = (
        _processor()
        if device.type == "cpu"
        else f"{device.type} {getattr(torch, device.type).get_device_name(0)}"
    )
    return {
        "device": name, "torch": torch.__version__, "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}", "threads": str(threads),
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (text.split(":")[1].strip() for text in lines if text.startswith("model name")), platform.machine()
    )


def _begin(path: Path, header: dict[str, Any], resume: bool) -> records.Report:
    if resume and path.exists():
        report = records.read(path, interrupted=True)
        for key in sorted(set(header) - {"started"}):
            if report.header.get(key) != header[key]:
                raise records.ReportError(
                    f"{path} is of another run: {key} differs; leave out --resume to begin anew"
                )
        report.footer = None
        report.results = [result for result in report.results if result["status"] != "not-run"]
        records.write(path, report)
        return report
    report = records.Report(header)
    records.write(path, report)
    return report


# ---------------------------------------------------------------------------- reading reports again


def _capabilities(header: dict[str, Any]) -> Capabilities:
    """The claims of a header, as far as they decide which cases apply."""
    from torchhal.problems import PROBLEMS

    def value(name: str, found: Any) -> Any:
        if not isinstance(found, list):
            return found
        return frozenset(getattr(torch, item) for item in found) if name == "dtypes" else frozenset(found)

    kinds = {f.name: f.type for f in fields(Capabilities)}
    assert set(kinds) == set(PROBLEMS)
    made = {
        family: _claims_of(family)(**{name: value(name, found) for name, found in claimed.items()})
        for family, claimed in header["claims"].items()
    }
    return Capabilities(**made)


def _claims_of(family: str) -> Callable[..., Any]:
    from torchhal import problems

    return getattr(problems, "".join(part.title() for part in family.split("_")) + "Claims")  # type: ignore[no-any-return]


def expected_by_header(header: dict[str, Any]) -> frozenset[str]:
    """The ids that a whole run of what a header describes has results for."""
    claimed = _capabilities(header)
    return frozenset(
        c.id
        for c in corpus.cases(header["seed"])
        if in_profile(c, header["profile"]) and corpus.applies(c, claimed)
    )


def required_by_header(header: dict[str, Any]) -> frozenset[str]:
    """The ids that the header's profile requires of its claims."""
    return corpus.required(header["profile"], _capabilities(header), header["edition"])


def faults(path: Path) -> list[str]:
    """Everything that is wrong with a report; none: it says what it was made from."""
    try:
        report = records.read(path)
    except records.ReportError as error:
        return [str(error)]
    header, footer = report.header, report.footer
    if footer is None:
        return ["there is no footer: the run did not come to its end"]
    found = records.form_faults(report)
    if found:
        return found
    if header["corpus"] != corpus.digest(case.id for case in corpus.cases()):
        return [f"the corpus is another one: this suite can not judge it (made with {header['suite']})"]
    try:
        expected, required_ids = expected_by_header(header), required_by_header(header)
    except (AttributeError, TypeError, OSError, ValueError) as error:
        return [f"the header does not describe what this suite knows: {error}"]
    missing = sorted(expected - {r["case"] for r in report.results})
    if missing and header["whole"] and header["shard"] == "1/1":
        found.append(f"{len(missing)} cases are missing, {missing[0]} first")
    whole = header["whole"] and header["shard"] == "1/1"
    again = records.footer(header, report.results, required_ids, whole)
    found += [
        f"the footer's {key} is {footer.get(key)!r} and should be {again[key]!r}"
        for key in again
        if footer.get(key) != again[key]
    ]
    return found
