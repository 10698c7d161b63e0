"""A run: which cases, in which order, through workers, into a report."""

from __future__ import annotations

import hashlib
import math
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from torchhal.hookspecs import FAMILIES
from torchhal.problems import SPEC_VERSION, Capabilities
from torchhal_conformance import claims, corpus, explore, judge, records, waivers
from torchhal_conformance.child import StartFailed
from torchhal_conformance.model import Case, in_profile
from torchhal_conformance.pool import Examiners, Judge, Worker

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

    def command(self, case: str) -> str:
        """What examines one case again, in one line."""
        words = ["torchhal-conformance", "run"]
        words += ["--plugin", self.plugin] if self.plugin else ["--backend", self.backend]
        words += ["--profile", self.profile] if self.profile != "inference" else []
        words += ["--seed", str(self.seed)] if self.seed else []
        return shlex.join([*words, "--case", case])


Progress = Callable[[int, int, dict[str, Any]], None]
"""Called after each case with how many are done, of how many, and its result."""


def run(
    options: Options, path: Path, resume: bool = False, progress: Progress | None = None
) -> records.Report:
    """Run and write the report.

    The backend is loaded in the workers alone: what is decided and written is decided here, and in a judge where it
    never was.

    Raises:
        StartFailed: no worker comes up, since there is no such backend or it does not load.
        ReportError: ``resume`` with a report of something else.
        WaiverError: a waiver is about no case of a whole run.
    """
    with _examiners(options) as examiners:
        header = make_header(options, examiners.start())
        capabilities, facilities = claims.read(header["claims"]), facilities_by_header(header)
        wanted = selected(options, capabilities, facilities)
        if options.whole:
            waivers.require_cases(options.waivers, [case.id for _, case in wanted])
        report = _begin(path, header, resume)
        done = {result["case"] for result in report.results}
        pending = [placed for placed in wanted if placed[1].id not in done]
        with path.open("a", encoding="utf-8") as file:
            for result in _results(options, pending, examiners):
                report.results.append(result)
                file.write(records.line(result))
                file.flush()
                if progress is not None:
                    progress(len(report.results), len(wanted), result)
    with path.open("a", encoding="utf-8") as file:
        required = corpus.required(options.profile, capabilities, corpus.EDITION, facilities)
        report.footer = records.footer(header, report.results, required, options.whole)
        file.write(records.line(report.footer))
    return report


Placed = tuple[int, Case]
"""A case and its place in the whole of which a shard is a part."""


def selected(
    options: Options, capabilities: Capabilities, facilities: frozenset[str] = frozenset()
) -> list[Placed]:
    """The cases of a run, in order.

    Args:
        options: what the run is asked for.
        capabilities: what the backend claims.
        facilities: what its device has, out of :data:`~torchhal_conformance.model.FACILITIES`.

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
        and corpus.applies(case, capabilities, facilities)
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


def _examiners(options: Options) -> Examiners:
    """Workers, and half as many judges, which have less to do."""
    threads = threads_of(options)
    workers = [
        Worker(options.backend, options.plugin, options.seed, options.timeout, threads)
        for _ in range(options.jobs)
    ]
    return Examiners(workers, options.seed, threads, max(1, options.jobs // 2), Judge)


def _results(options: Options, pending: list[Placed], examiners: Examiners) -> Iterator[dict[str, Any]]:
    """Results in the order of the cases, whichever worker had them."""
    end = None if options.time_budget is None else time.monotonic() + options.time_budget
    late = {"status": "not-run", "error": {"class": "Budget", "message": "out of time"}}

    def one(placed: Placed) -> dict[str, Any]:
        order, case = placed
        is_late = end is not None and time.monotonic() > end
        outcome = late if is_late else examiners.run(case.id, judge.is_recorded(case.check.name))
        return _record(order, case, outcome, options)

    # One thread more for each judge: while it judges a case, its worker has the next.
    with ThreadPoolExecutor(options.jobs + max(1, options.jobs // 2)) as executor:
        try:
            yield from executor.map(one, pending)
        except BaseException:
            examiners.__exit__()  # what the other threads wait for ends now
            raise


def _record(order: int, case: Case, outcome: dict[str, Any], options: Options) -> dict[str, Any]:
    needs = case.sample.needs
    empty = dict.fromkeys(("ratio", "error", "expected", "got", "note", "waiver", "seconds", "judged"))
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


def make_header(options: Options, told: dict[str, Any]) -> dict[str, Any]:
    """What is tested, with what, where; ``told`` is what a worker says of its backend.

    Raises:
        StartFailed: that is no description of a backend.
    """
    from importlib import metadata

    try:
        claimed = claims.written(claims.read(told["claims"]))
        names = {key: _text(told[key]) for key in ("name", "version", "distribution")}
        facilities = " ".join(sorted(map(_text, told["facilities"])))
        device = _text(told["device"])
    except (KeyError, TypeError, AttributeError) as error:
        raise StartFailed(f"a worker's description of its backend is none: {error!r}") from error
    return {
        "record": "header", "format": records.FORMAT, "suite": metadata.version("torchhal-conformance"),
        "spec": SPEC_VERSION, "edition": corpus.EDITION, "profile": options.profile, "seed": options.seed,
        "shard": f"{options.shard[0]}/{options.shard[1]}", "whole": options.family is None and options.case is None,
        "backend": names, "claims": claimed, "environment": {
            "device": device, "facilities": facilities, "torch": torch.__version__, "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}", "threads": str(threads_of(options)),
        },
        "corpus": corpus.digest(case.id for case in corpus.cases()),
        "waivers": [waiver.record() for waiver in options.waivers],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text and got {value!r}")
    return value


def threads_of(options: Options) -> int:
    """Threads of each worker: those of torch, shared out among the workers."""
    return max(1, torch.get_num_threads() // options.jobs)


def _begin(path: Path, header: dict[str, Any], resume: bool) -> records.Report:
    if resume and path.exists():
        report = records.read(path, interrupted=True)
        for key in sorted(set(header) - {"started"}):
            if report.header.get(key) != header[key]:
                raise records.ReportError(
                    f"{path} is of another run: {key} differs; leave out --resume to begin anew"
                )
        report.footer = None
        report.results = [result for result in report.results if not _is_open(result)]
        records.write(path, report)
        return report
    report = records.Report(header)
    records.write(path, report)
    return report


def _is_open(result: dict[str, Any]) -> bool:
    """Whether a case was not examined: the time was up, or there was no process to do it."""
    kind = (result["error"] or {}).get("class")
    return result["status"] == "not-run" or (
        result["status"] == "error" and kind in ("StartFailed", "JudgeFailed", "JudgeTimeout")
    )


# ---------------------------------------------------------------------------- reading reports again


def expected_by_header(header: dict[str, Any]) -> frozenset[str]:
    """The ids that a whole run of what a header describes has results for."""
    claimed = claims.read(header["claims"])
    return frozenset(
        c.id
        for c in corpus.cases(header["seed"])
        if in_profile(c, header["profile"]) and corpus.applies(c, claimed, facilities_by_header(header))
    )


def required_by_header(header: dict[str, Any]) -> frozenset[str]:
    """The ids that the header's profile requires of its claims."""
    claimed, facilities = claims.read(header["claims"]), facilities_by_header(header)
    return corpus.required(header["profile"], claimed, header["edition"], facilities)


def facilities_by_header(header: dict[str, Any]) -> frozenset[str]:
    """What the device had on which a report was made."""
    return frozenset(header["environment"].get("facilities", "").split())


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
    found += waivers.faults(header, report.results, whole)
    again = records.footer(header, report.results, required_ids, whole)
    found += [
        f"the footer's {key} is {footer.get(key)!r} and should be {again[key]!r}"
        for key in again
        if footer.get(key) != again[key]
    ]
    return found
