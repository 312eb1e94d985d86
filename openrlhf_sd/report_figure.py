"""How every figure of the report looks, and its way to an SVG document (bytes).

Matplotlib is imported inside and used without pyplot: no display, no global state. Arms keep one colour (Okabe-Ito),
marker and dash through all figures, so they stay apart in grey too.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

OKABE_ITO = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette without its yellow, which is too pale for lines on white. Black goes to the first run."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

SIZE_INCHES = (4.6, 3.2)  # narrow: scaled to a 390 px phone the letters stay readable
LEGEND_LETTERS = 38  # as many as fit beside a line sample in one column

STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.hashsalt": "openrlhf_sd",  # reproducible ids
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: bytes


def look(index: int) -> dict[str, str]:
    count = len(OKABE_ITO)
    return {
        "color": OKABE_ITO[index % count],
        "marker": MARKERS[index % count],
        "linestyle": DASHES[(index + index // count) % len(DASHES)],
    }


def legend_text(label: str) -> str:
    """Run folders are named by others: `$` would start matplotlib's math mode, a leading `_` would hide the entry."""
    text = "".join(c if c.isprintable() else "?" for c in label)
    if len(text) > LEGEND_LETTERS:
        text = text[: LEGEND_LETTERS // 2] + "…" + text[-LEGEND_LETTERS // 2 + 1 :]
    return ("…" + text[1:] if text.startswith("_") else text).replace("$", r"\$")


def new_figure(num_rows: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[1] * (1.0 if num_rows == 1 else 1.35)), layout="constrained")
    axes = figure.subplots(num_rows, 1, sharex=True, squeeze=False)[:, 0]
    return figure, axes


def step_axis(axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def finish(figure, axes, title: str, caption: str) -> Plot:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) > 1 and max(map(len, labels)) < LEGEND_LETTERS / 2 else 1
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)  # outside: covers no data
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Plot(title, caption, buffer.getvalue())
