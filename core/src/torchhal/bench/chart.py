"""The chart of ``torchhal bench attention --plot``; needs matplotlib, which nothing else here does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchhal.bench.attention import CaseResult
from torchhal.errors import Unsupported

_COLOURS = ("#1b6ca8", "#e07a1f", "#2f9e63", "#8e5bb5", "#b23a48")


def require_matplotlib() -> Any:
    """matplotlib, drawing to files.

    Raises:
        Unsupported: it is not installed; says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        message = 'drawing a chart needs matplotlib, which is not installed: pip install "torchhal[bench]"'
        raise Unsupported(message) from error
    matplotlib.use("Agg")
    return matplotlib


def draw(results: Sequence[CaseResult], title: str, path: Path) -> None:
    """Draw how many times faster than torch's nearest equivalent each candidate is, case by case.

    Args:
        results: what was measured; cases without a time for their baseline, and the calls that backends
            are held against themselves, are left out.
        title: says what machine and versions the chart is of.
        path: the file to write; its suffix chooses the format.

    Raises:
        Unsupported: matplotlib is not installed, or does not know the format.
    """
    require_matplotlib()
    from matplotlib import pyplot

    shown = [result for result in results if _compared([result]) and result.timing(result.case.baseline)]
    names = _compared(shown)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.28 * max(1, len(shown) * max(2, len(names)))))
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        _bars(axes, shown, name, height, index * height, _COLOURS[index % len(_COLOURS)])
    axes.margins(x=0.1)
    axes.axvline(1.0, color="black", linewidth=1, zorder=0)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(shown))], [_label(r) for r in shown])
    axes.invert_yaxis()
    axes.set_xlabel(
        "times faster than torch's nearest equivalent, named under each case\n(longer is better; the line is torch itself)"
    )
    axes.set_title(title, fontsize=9)
    if names:
        axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise Unsupported(f"can not draw {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _compared(results: Sequence[CaseResult]) -> list[str]:
    """The candidates that have bars: all that are in some case neither its baseline nor a yardstick."""
    names = (
        row.candidate
        for result in results
        for row in result.rows
        if not row.yardstick and row.candidate != result.case.baseline and row.timing is not None
    )
    return list(dict.fromkeys(names))


def _label(result: CaseResult) -> str:
    return f"{result.case.name}\n{result.case.baseline}"


def _bars(
    axes: Any, results: Sequence[CaseResult], name: str, height: float, offset: float, colour: str
) -> None:
    values = {
        i: speedup
        for i, result in enumerate(results)
        for row in result.rows
        if row.candidate == name != result.case.baseline and (speedup := result.speedup(row)) is not None
    }
    bars = axes.barh(
        [i + offset for i in values], list(values.values()), height=height * 0.92, label=name, color=colour
    )
    axes.bar_label(bars, fmt="%.2fx", fontsize=7, padding=2)
