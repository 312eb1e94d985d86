"""report.md and report.html of a comparison.

Everything that came out of a run folder is somebody else's text: control characters are stripped, `escape` (HTML) and
`escape_md` (Markdown) are applied where markup is written, and the page forbids scripts and outside resources besides.
"""

from __future__ import annotations

import base64
import html
from typing import Any

from openrlhf_sd.report_about import Section, run_sections
from openrlhf_sd.report_arms import Arm
from openrlhf_sd.report_cells import (
    MISSING,
    RATIO,
    between_runs,
    controlled,
    difference,
    ratio,
    text,
    with_interval,
)
from openrlhf_sd.report_plots import Plot
from openrlhf_sd.report_stats import Comparison, Versus
from openrlhf_sd.report_tables import all_warnings, paired, reading_notes, summary_sections

CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escape(value: Any) -> str:
    return html.escape(text(value))


def escape_md(value: Any) -> str:
    line = html.escape(text(value), quote=False)
    return "".join("\\" + char if char in "\\|`*_[]" else char for char in line)


def markdown(comparison: Comparison, arms: list[Arm]) -> str:
    lines = ["# Rollout comparison", ""]
    for warning in all_warnings(comparison):
        lines += [f"> **Warning:** {escape_md(warning)}", ""]
    labels = [arm.label for arm in comparison.arms]
    for title, rows in summary_sections(comparison) + run_sections(arms):
        if rows:
            lines += [f"## {escape_md(title)}", "", _md_row(["", *labels]), "|---" * (len(labels) + 1) + "|"]
            lines += [_md_row([name, *cells]) for name, cells in rows] + [""]
    lines += ["## How to read this", ""] + [f"- {note}" for note in reading_notes(comparison)]
    return "\n".join(lines) + "\n"


def _md_row(cells: list[str]) -> str:
    return "| " + " | ".join(escape_md(cell) for cell in cells) + " |"


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #ffffff; --page: #f6f8fa;
  --warn: #fff3cd; --warn-ink: #533f03; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3b434b; --card: #161b22;
  --page: #0d1117; --warn: #3d2f00; --warn-ink: #f5dc92; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 8px 0; } h2 { font-size: 1.15rem; margin: 28px 0 8px; }
.soft { color: var(--soft); }
.warn { background: var(--warn); color: var(--warn-ink); border-left: 4px solid #E69F00; padding: 8px 12px;
  margin: 8px 0; }
.cards, .plots { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); align-items: start; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  margin: 0; }
.card h3 { margin: 0 0 4px; font-size: 1rem; } .card .big { font-size: 1.6rem; font-weight: 600; line-height: 1.2; }
.card dl { margin: 8px 0 0; } .card dt { color: var(--soft); font-size: .85rem; margin-top: 6px; }
.card dd { margin: 0; }
figure img { width: 100%; height: auto; background: #ffffff; border-radius: 4px; display: block; }
figure h3 { margin: 0 0 6px; font-size: 1rem; } figcaption { color: var(--soft); font-size: .85rem; margin-top: 6px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px; border-top: 1px solid var(--line); min-width: 120px;
  max-width: 420px; }
th[scope=row] { font-weight: 400; color: var(--soft); position: sticky; left: 0; background: var(--card);
  min-width: 118px; }
thead th { border-top: 0; } tr.section th { background: var(--page); font-weight: 600; }
summary { cursor: pointer; margin: 20px 0 8px; font-weight: 600; }
@media (max-width: 600px) { body { padding: 10px; font-size: 14px; } th, td { padding: 5px 7px; } }
"""


def page(comparison: Comparison, arms: list[Arm], plots: list[Plot]) -> str:
    """One self-contained HTML document; figures are data URIs, so their markup cannot act on the page."""
    labels = [arm.label for arm in comparison.arms]
    about = run_sections(arms)
    body = ["<h1>Rollout comparison</h1>", f"<p class=soft>{escape(' · '.join(labels))}</p>"]
    body.append(f"<p class=soft>{escape(reading_notes(comparison)[0])}</p>")
    body += [f"<p class=warn><b>Warning.</b> {escape(warning)}</p>" for warning in all_warnings(comparison)]
    if comparison.versus:
        body += ["<div class=cards>", *(_card(versus, comparison) for versus in comparison.versus), "</div>"]
    numbers = summary_sections(comparison)
    body += [
        "<h2>Numbers</h2>",
        _table(numbers[1:] if comparison.versus else numbers, labels),
    ]  # the cards show numbers[0]
    body += ["<h2>Plots</h2>", "<div class=plots>", *map(_figure, plots), "</div>"]
    body += [
        "<h2>How to read this</h2>",
        "<ul>",
        *(f"<li>{escape(note)}</li>" for note in reading_notes(comparison)[1:]),
        "</ul>",
    ]
    body += ["<h2>Settings, machine and versions</h2>", _table(about[:3], labels)]
    body += ["<details><summary>All OpenRLHF flags</summary>", _table(about[3:], labels), "</details>"]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\n"
        "<meta name=viewport content='width=device-width, initial-scale=1'>\n"
        f'<meta http-equiv=Content-Security-Policy content="{CONTENT_POLICY}">\n'
        f"<title>Rollout comparison: {escape(', '.join(labels))}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _card(versus: Versus, comparison: Comparison) -> str:
    rows = [
        ("Rollout, per generated token", ratio(versus.per_token_speedup)),
        ("Rollout, length-controlled", controlled(versus.length_controlled)),
        ("Whole step", ratio(versus.step_speedup)),
        ("Reward, last half, difference", difference(versus.reward_difference)),
        ("Runs compared", paired(versus)),
        ("Baseline's settings", comparison.baseline_settings),
    ]
    speedup = versus.rollout_speedup
    big = MISSING if speedup.value is None else with_interval(speedup, RATIO, "×")
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(cell)}</dd>" for name, cell in rows)
    return (
        f"<div class=card><h3>{escape(versus.label)} against {escape(comparison.baseline)}</h3>"
        f"<div class=big>{escape(big)}</div>"
        f"<div>rollout speed-up: {escape(speedup.verdict + between_runs(speedup, RATIO, '×'))}</div>"
        f"<div class=soft>above 1 is faster than the baseline</div><dl>{items}</dl></div>"
    )


def _table(sections: list[Section], labels: list[str]) -> str:
    head = "".join(f"<th scope=col>{escape(label)}</th>" for label in labels)
    rows = []
    for title, section in sections:
        if section:
            rows.append(f"<tr class=section><th colspan={len(labels) + 1} scope=rowgroup>{escape(title)}</th></tr>")
        for name, cells in section:
            rows.append(f"<tr><th scope=row>{escape(name)}</th>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    return f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.svg).decode()
    return (
        f"<figure><h3>{escape(plot.title)}</h3><img alt='{escape(plot.title)}' src='data:image/svg+xml;base64,{data}'>"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )
