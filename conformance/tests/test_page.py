"""The page tells what reports say, shows hostile words as words, and proves nothing that a report does not."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from torchhal_conformance.page import embedded, page, verdict
from torchhal_conformance.records import Report, ReportError, read

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=\"document.title='owned'\"> @@DATA@@"
FAILING = "attention.numbers/dense-float32-causal-b2-h4-l9-s13-e16"


def result(case: str, status: str = "pass", **changes: Any) -> dict[str, Any]:
    check, sample = case.split("/", 1)
    words = sample.split("-")
    record = {
        "record": "result",
        "case": case,
        "check": check,
        "family": check.split(".")[0],
        "features": [word for word in words if word in ("causal", "lse", "dropout")],
        "dtypes": [word for word in words if word.startswith(("float", "bfloat"))],
        "choice": words[0],
        "kind": "corpus",
        "profile": "inference",
        "status": status,
        "ratio": 0.41 if status == "pass" else None,
        "error": None,
        "expected": None,
        "got": None,
        "waiver": None,
        "seconds": 0.012,
    }
    return {**record, **changes}


def header(name: str, **claims: Any) -> dict[str, Any]:
    attention = {"dtypes": ["float32"], "layouts": ["dense"], "causal": True, "lse": False, **claims}
    return {
        "record": "header",
        "suite": "0.1.0",
        "spec": "1.0",
        "profile": "inference",
        "backend": {"name": name, "version": "0.1.0", "distribution": "torchhal"},
        "claims": {"attention": attention, "matmul": None},
        "environment": {"torch": "2.13.0+cpu", "device": "AMD EPYC"},
        "seed": 0,
        "shard": "1/1",
        "corpus": "0" * 64,
    }


def footer(results: list[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(record["status"] for record in results)
    required = len(results) - counts["unsupported-verified"]
    word = "CONFORMANT" if counts["pass"] == required else "NOT CONFORMANT"
    return {
        "record": "footer",
        "counts": dict(counts),
        "required": required,
        "passed": counts["pass"],
        "verdict": word,
        "sentence": f"{word} ({counts['pass']} of {required} required; 0 waived)",
        "digest": "f" * 64,
    }


def document(name: str, *results: dict[str, Any], **claims: Any) -> Report:
    return Report(header(name, **claims), list(results), footer(list(results)))


def honest(name: str = "reference") -> Report:
    return document(
        name,
        result("attention.numbers/dense-float32-b2-h4-l9-s13-e16"),
        result(FAILING, ratio=0.7),
        result("attention.numbers/dense-float32-lse-b2-h4-l9-s13-e16", "unsupported-verified"),
    )


def failing(name: str = "cpu_x86", message: str = "expected errors within the bound") -> Report:
    return document(
        name,
        result("attention.numbers/dense-float32-b2-h4-l9-s13-e16"),
        result(
            FAILING,
            "fail",
            ratio=31.5,
            error={"class": "CheckFailed", "message": message},
            expected="within its bound",
            got="31.5 times the bound",
        ),
    )


def write(path: Path, report: Report, ending: str = "") -> Path:
    records = [report.header, *report.results, *([report.footer] if report.footer else [])]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + ending, encoding="utf-8")
    return path


class Scripts(HTMLParser):
    """The script elements of a page as a browser would tell them apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str | None, str]] = []
        self.others: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.found.append((dict(attrs).get("type"), ""))
        self.others += [name for name, _ in attrs if name.startswith("on") or name == "src"]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.found:
            kind, before = self.found[-1]
            self.found[-1] = (kind, before + data)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read(write(tmp_path / "report.jsonl", honest())) == honest()


def test_a_report_cut_short_is_read_without_a_footer(tmp_path: Path) -> None:
    cut = Report(honest().header, honest().results, None)
    assert read(write(tmp_path / "report.jsonl", cut, '{"record": "res'), interrupted=True) == cut


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "is empty: expected a header first"),
        ('{"record": "result"}\n', "line 1: a result record has no place here"),
        ('{"record": "header"}\n{"record": "header"}\n', "line 2: a header record has no place here"),
        (
            '{"record": "header"}\n{"record": "footer"}\n{"record": "result"}\n',
            "line 3: a record after the footer",
        ),
        (
            '{"record": "header"}\n{"record": \n{"record": "footer"}\n',
            "line 2: not a record: Expecting value",
        ),
        ("[]\n", "line 1: not a record: list indices"),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "report.jsonl"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(ReportError, match=words):
        read(path)


def test_hostile_words_stay_data() -> None:
    text = page([failing(HOSTILE, HOSTILE), honest(HOSTILE)])
    parsed = Scripts(text)
    assert [kind for kind, _ in parsed.found] == ["application/json", None]
    assert not parsed.others, "no handler, nothing loaded"
    data = json.loads(parsed.found[0][1])
    assert data[0]["header"]["backend"]["name"] == HOSTILE
    assert data[0]["results"][1]["error"]["message"] == HOSTILE
    assert text.count("<script") == 2


def test_embedded_json_holds_no_character_of_markup() -> None:
    assert not re.search("[<>&]|[^ -~]", embedded({HOSTILE: ["&", "\u2028", HOSTILE]}))


def test_numbers_that_json_has_no_word_for_are_kept_as_words() -> None:
    numbers = [math.nan, math.inf, -math.inf, 0.5, (1, None)]
    assert json.loads(embedded(numbers)) == ["NaN", "Infinity", "-Infinity", 0.5, [1, None]]


def test_the_page_needs_nothing_beside_it() -> None:
    text = page([honest()])
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(|fetch\(|XMLHttpRequest|@@""", text)
    assert "default-src 'none'" in text


def test_the_verdict_always_says_how_many_of_how_many() -> None:
    assert verdict(honest()) == "reference 0.1.0: CONFORMANT, 2 / 2 required passed"
    assert verdict(failing()) == "cpu_x86 0.1.0: NOT CONFORMANT, 1 / 2 required passed"


def test_a_report_without_a_footer_proves_nothing() -> None:
    cut = Report(honest().header, honest().results, None)
    assert verdict(cut) == "reference 0.1.0: incomplete report, proves nothing"
    assert "incomplete report, proves nothing" in page([cut])


# In a browser.


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser to render the page with: none of {', '.join(names)} is on PATH")
    return found


class Rendered:
    """What a browser made of a page."""

    def __init__(self, browser: str, folder: Path, reports: list[Report], fragment: str = "") -> None:
        file = folder / "page.html"
        file.write_text(page(reports), encoding="utf-8")
        options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
        options += " --disable-background-networking --disable-component-update --disable-dev-shm-usage"
        options += f" --user-data-dir={folder / 'profile'} --virtual-time-budget=3000 --dump-dom"
        address = file.as_uri() + fragment
        done = subprocess.run(
            [browser, *options.split(), address], capture_output=True, check=True, timeout=120
        )
        # What the reports say stands in the data too: only what was drawn is looked at.
        self.dom = re.sub(
            r"<script.*?</script>|<noscript>.*?</noscript>", "", done.stdout.decode(), flags=re.S
        )

    def part(self, pattern: str) -> list[str]:
        """Texts of the elements whose markup matches, without tags."""
        return [re.sub("<[^>]*>", " ", each) for each in re.findall(pattern, self.dom, flags=re.S)]

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Class and text of each cell of the matrix."""
        found = re.findall(
            r'class="cell (\w+)"[^>]*>(.*?)</(?:a|span)></td>', self.dom.replace("<td", "\n<td")
        )
        return [(kind, " ".join(re.sub("<[^>]*>", " ", text).split())) for kind, text in found]

    @property
    def rows(self) -> list[str]:
        """Texts of the rows of the list."""
        (body,) = re.findall(r'<tbody id="rows">(.*?)</tbody>', self.dom, flags=re.S)
        return [re.sub("<[^>]*>", " ", row) for row in re.findall(r"<tr.*?</tr>", body, flags=re.S)]


def test_backends_stand_side_by_side(browser: str, tmp_path: Path) -> None:
    seen = Rendered(browser, tmp_path, [honest(), failing()])
    reference, other = seen.part(r'<li class="verdict .*?class="score".*?</li>')
    assert "CONFORMANT" in reference and "2 / 2" in reference and "✓" in reference
    assert "NOT CONFORMANT" in other and "1 / 2" in other and "✗" in other
    assert ("ok", "✓ 1/1 passed") in seen.cells
    assert ("bad", "✗ 0/1 1 failed") in seen.cells
    assert len(seen.rows) == 5
    assert seen.dom.count('class="cross"') == 1, "what is over the bound is marked by shape too"
    assert seen.dom.count('class="bound"') == 2


def test_what_is_not_claimed_is_never_green(browser: str, tmp_path: Path) -> None:
    served = result("attention.numbers/dense-float32-dropout-b2-h4-l9-s13-e16")
    seen = Rendered(browser, tmp_path, [honest(), document("eager", served, dropout=False)])
    unclaimed = [kind for kind, text in seen.cells if text.startswith("not claimed")]
    assert unclaimed and set(unclaimed) == {"none"}
    assert ("none", "not claimed 1 refused") in seen.cells


def test_a_claim_without_a_case_is_not_green(browser: str, tmp_path: Path) -> None:
    seen = Rendered(browser, tmp_path, [document("eager", *honest().results, dropout=True)])
    assert ("part", "? untested no case") in seen.cells


def test_an_incomplete_report_and_one_that_does_not_add_up_are_not_green(
    browser: str, tmp_path: Path
) -> None:
    cut = Report(honest().header, honest().results, None)
    forged = Report(honest("forged").header, failing().results, honest().footer)
    seen = Rendered(browser, tmp_path, [cut, forged])
    assert seen.dom.count('class="verdict ok"') == 0
    assert "ok" not in {kind for kind, _ in seen.cells}
    assert ("part", "… 1/1 proves nothing") in seen.cells
    incomplete, contradicted = seen.part(r'<li class="verdict .*?class="score".*?</li>')
    assert "incomplete report, proves nothing" in incomplete
    assert "do not add up" in contradicted


def test_waivers_and_want_of_a_verdict_are_not_green(browser: str, tmp_path: Path) -> None:
    waived, undecided = (
        document("waiving", honest().results[0], result(FAILING, "waived", waiver="#41, until 0.2")),
        document("undecided", honest().results[0], result(FAILING, "error")),
    )
    for report, words in ((waived, "CONFORMANT WITH WAIVERS"), (undecided, "NO VERDICT: the suite failed")):
        assert report.footer is not None
        report.footer["verdict"] = words
    seen = Rendered(browser, tmp_path, [waived, undecided])
    assert seen.dom.count('class="verdict part"') == 2
    assert ("part", "~ 0/1 1 waived") in seen.cells
    assert ("part", "… 0/1 1 not judged") in seen.cells


def test_the_address_filters_the_list(browser: str, tmp_path: Path) -> None:
    (row,) = Rendered(browser, tmp_path, [honest(), failing()], "#feature=causal&status=fail").rows
    assert FAILING in row and "cpu_x86" in row and "31.5" in row


def test_the_address_opens_a_case(browser: str, tmp_path: Path) -> None:
    seen = Rendered(browser, tmp_path, [honest(), failing()], f"#case={FAILING}")
    (command,) = seen.part(r'<pre id="command">(.*?)</pre>')
    assert command == f"torchhal-conformance run --backend cpu_x86 --case '{FAILING}'"
    (opened,) = seen.part(r"<dialog.*?</dialog>")
    for words in (
        "within its bound",
        "31.5 times the bound",
        "CheckFailed",
        "AMD EPYC",
        "reference",
        "0.012",
    ):
        assert words in opened


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, "--backend cpu_x86 --seed 7 --case"),
        ({"seed": 7, "profile": "training"}, "--backend cpu_x86 --profile training --seed 7 --case"),
        ({"distribution": "plugin mine:a.b"}, "--plugin mine:a.b --case"),
        ({"distribution": "plugin it's mine"}, "--plugin 'it'\\''s mine' --case"),
    ],
    ids=lambda value: "",
)
def test_the_command_that_reproduces_a_case_names_all_that_decides_it(
    browser: str, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    report = failing()
    report.header["backend"]["distribution"] = changes.pop("distribution", "torchhal")
    report.header.update(changes)
    (command,) = Rendered(browser, tmp_path, [report], f"#case={FAILING}").part(
        r'<pre id="command">(.*?)</pre>'
    )
    assert command == f"torchhal-conformance run {words} '{FAILING}'"


def test_hostile_words_are_shown_and_not_run(browser: str, tmp_path: Path) -> None:
    seen = Rendered(browser, tmp_path, [failing(HOSTILE, HOSTILE)], f"#case={FAILING}")
    assert "<title>torchhal conformance: &lt;/script&gt;" in seen.dom
    assert "<img" not in seen.dom and "alert(1)</script" not in seen.dom
    (opened,) = re.findall(r"<dialog.*?</dialog>", seen.dom, flags=re.S)
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in opened
    (command,) = seen.part(r'<pre id="command">(.*?)</pre>')
    assert "--backend '&lt;/script&gt;" in command and "document.title='\\''owned" in command


def test_thousands_of_cases_are_listed_by_the_page(browser: str, tmp_path: Path) -> None:
    many = [result(f"attention.numbers/dense-float32-b2-h4-l9-s{i}-e16", ratio=i / 5000) for i in range(5000)]
    seen = Rendered(browser, tmp_path, [document("reference", *many)], "#page=50")
    assert len(seen.rows) == 100
    assert "4901 to 5000 of 5000 cases" in seen.dom
