"""The plots of evaluations: each method's score with its interval, or its curve."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from influence.evaluation.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST, OTHERS, CEILING = "#b2182b", "#4d6d8a", "#666666"
LINES = (FIRST, OTHERS, "#8a7a4d", "#4d8a6a", "#7a4d8a", "#999999")


def line_plot(lines: Mapping[str, Mapping[int, Estimate]], *, title: str, across: str, up: str) -> bytes:
    """A PNG image: a line a method, its points with their intervals, at places on a logarithmic axis."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#cccccc", linewidth=1, zorder=0)
    places = sorted({place for line in lines.values() for place in line})
    for number, (name, line) in enumerate(lines.items()):
        colour = LINES[number % len(LINES)]
        apart = 1.04 ** (number - (len(lines) - 1) / 2)  # lest intervals of one place hide one another
        shown = [place * apart for place in line]
        axes.plot(shown, [one.value for one in line.values()], marker="o", markersize=6, color=colour, label=name)
        for place, one in zip(shown, line.values(), strict=True):
            axes.plot([place, place], one.ends, color=colour, linewidth=2.5, alpha=0.55, solid_capstyle="butt")
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_xlim(places[0] / 1.5, places[-1] * 1.5)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside lower right", frameon=False, fontsize=9, ncols=min(4, len(lines)))
    return _png(figure)


def _png(figure: "Figure") -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def score_plot(scores: Mapping[str, Estimate], ceiling: float | None, *, title: str, axis: str) -> bytes:
    """A PNG image: one point a method with its interval, in the given order from the top, the first in its own colour."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(7.5, 1.7 + 0.42 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for place, score in enumerate(scores.values()):
        colour = FIRST if place == 0 else OTHERS
        axes.plot(score.ends, [place, place], color=colour, linewidth=2.5, solid_capstyle="butt", alpha=0.55)
        axes.plot([score.value], [place], marker="o", markersize=7, color=colour)
        axes.annotate(f"{score.value:.3f}", (score.value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
    ends = [end for score in scores.values() for end in score.ends] + [0.0] + ([] if ceiling is None else [ceiling])
    axes.axvline(0, color="#cccccc", linewidth=1, zorder=0)
    if ceiling is not None:
        axes.axvline(ceiling, color=CEILING, linestyle="--", linewidth=1.2, label=f"noise ceiling {ceiling:.3f}")
        figure.legend(loc="outside lower right", frameon=False, fontsize=9)
    axes.set_xlim(min(ends) - 0.05, max(ends) + 0.05)
    axes.set_ylim(len(scores) - 0.5, -0.7)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(axis, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    return _png(figure)
