"""Write `report.html` of a run: one self-contained page with pictures, curves, metrics and card."""

import base64
import html
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mamo.evaluation.results import remarks
from mamo.reports.curves import plot_evaluations
from mamo.training.checkpoint import run_folder
from mamo.training.run_dir import CURVES, TIMING, atomic_write_text, read_jsonl

REPORT = "report.html"
CHANCE = 50.0
"""Percent of a random choice between a probe's two candidates."""
_STYLE = """
:root { color-scheme: light } body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 2em auto;
  padding: 0 1em; color: #222; background: #fff }
h1 { font-size: 1.5em; overflow-wrap: anywhere }
h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
h3 { font-size: 1em } nav { font-size: 14px; columns: 3 } nav a { display: block; color: #1f4e79 }
img { vertical-align: top; border-radius: 2px } img.hit { outline: 4px solid #2c9f4b } .curves { width: 100% }
.row { display: flex; flex-wrap: wrap; gap: 14px; margin: 10px 0 } .row ol { margin: 0; max-width: 820px }
section > .row > img { flex: none } li.hit, b.hit { color: #1d7f38; font-weight: 600 } li.miss { color: #555 }
b.miss { color: #c0392b } figure { margin: 0; width: 150px } figcaption { font-size: 13px; margin-top: 4px }
figure.wide { width: auto } figure.wide figcaption { width: 0; min-width: 100% } figure.wide img { margin-right: 4px }
figure.hit figcaption { color: #1d7f38 } figure.miss figcaption { color: #c0392b }
table { border-collapse: collapse } td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top }
td.n, .confusion td { text-align: right; font-variant-numeric: tabular-nums }
.confusion td, .confusion th { padding: 3px 6px; min-width: 26px; max-width: 84px; font-size: 13px }
.confusion th { font-weight: 400; text-align: right; overflow-wrap: anywhere }
tr { break-inside: avoid } .columns { columns: 2 }
.bar { position: relative; width: 360px; height: 13px; background: #eee }
.bar i { position: absolute; inset: 0 auto 0 0;
  background: #5b93c4 } .bar u { position: absolute; top: -2px; bottom: -2px; width: 2px; background: #c0392b }
@media (max-width: 700px) { .columns, nav { columns: 1 } .bar { width: 160px } }
"""


def write_report(
    folder: Path,
    title: str,
    metrics: Mapping[str, float],
    sections: Sequence[tuple[str, str]],
    step_folder: Path | None = None,
    card: str = "",
    facts: Mapping[str, float] | None = None,
    files: Sequence[str] = (),
) -> Path:
    """Write the page into `folder` and return its path.

    Args:
        folder: the folder of `report.html`.
        title: the page's heading.
        metrics: percentages by name.
        sections: (title, HTML fragment), from `network_pictures`.
        step_folder: a checkpoint whose run's curves, evaluations and loading times are shown, or None.
        card: the card of that checkpoint (`model_card`).
        facts: the numbers that the metrics depend on, such as the size of the gallery (`Metrics.facts`).
        files: names of evaluation files with which those of metrics and facts begin; each has a table of its own.
    """
    whole = {name: value for name, value in metrics.items() if "/by/" not in name}  # groups are in the items' sections
    numbers = ""
    for file, own in _by_file(whole, files):
        numbers += f"<h3>{html.escape(file)}</h3>" if file else ""
        numbers += _metrics_table(own) + "".join(f"<p><b>{html.escape(line)}</b></p>" for line in remarks(own))
    if facts:
        numbers += f"<h3>They depend on (chance in percent, ties in queries)</h3>{_metrics_table(facts, '.4g')}"
    parts = [("Numbers, in percent", numbers), *sections, *_probes(metrics)]
    if step_folder is not None:
        run = run_folder(step_folder)
        parts += [*_curves(run), *_loading(run / TIMING)]
        parts.append(("The card of the checkpoint", as_html(card)))
    atomic_write_text(folder / REPORT, html_page(title, parts))
    return folder / REPORT


def html_page(title: str, sections: Sequence[tuple[str, str]], opening: str = "") -> str:
    """Return a self-contained HTML page.

    Args:
        title: the heading.
        sections: (title, HTML fragment) in order; the page begins with links to them.
        opening: HTML fragment between heading and links.
    """
    links = "".join(f'<a href="#s{k}">{html.escape(name)}</a>' for k, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{k}"><h2>{html.escape(name)}</h2>{content}</section>'
        for k, (name, content) in enumerate(sections)
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    page = f"<h1>{html.escape(title)}</h1>{opening}<nav>{links}</nav>{body}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{page}</body></html>\n'


def _by_file(metrics: Mapping[str, float], files: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
    """Return the metrics of no file, if any, then those of each file without its name, which is first."""
    starts = tuple(f"{file}/" for file in files)
    rest = {name: value for name, value in metrics.items() if not name.startswith(starts)}
    of_files = [
        (start[:-1], {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)})
        for start in starts
    ]
    return [*([("", rest)] if rest or not files else []), *of_files]


def _metrics_table(metrics: Mapping[str, float], form: str = ".1f") -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{value:{form}}</td></tr>" for name, value in metrics.items()
    )
    return f"<div class=columns><table>{rows}</table></div>"


def _probes(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Draw a bar per kind of probe and head, with a mark at chance."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in metrics.items():
        if match := re.fullmatch(r"probe/(\w+)/(\w+)", name):
            found[match[1]][match[2]] = value
    rows = "".join(
        f"<tr><td>{html.escape(kind.replace('_', ' '))}</td><td>{head.upper()}</td><td><div class=bar>"
        f'<i style="width:{value:.1f}%"></i><u style="left:{CHANCE}%"></u></div></td><td class=n>{value:.1f}</td></tr>'
        for kind, heads in found.items()
        for head, value in heads.items()
    )
    return [("Probes: caption against foil, by type (red: chance)", f"<table>{rows}</table>")] if rows else []


def _curves(run: Path) -> list[tuple[str, str]]:
    """Show the curves of a run's steps and, if it was evaluated more than once, of its evaluations."""
    steps = (run / CURVES).read_bytes() if (run / CURVES).is_file() else None
    pictures = [("Losses and metrics", steps), ("Evaluations", plot_evaluations(run))]
    return [
        (title, f'<img class="curves" alt="{title} against the step" src="data:image/png;base64,{encoded}">')
        for title, data in pictures
        if data is not None and (encoded := base64.b64encode(data).decode())
    ]


def _loading(timing: Path) -> list[tuple[str, str]]:
    """Show the speed of the steps and the share spent waiting for data, without the first step (workers start)."""
    rows = read_jsonl(timing)[1:] if timing.is_file() else []
    if not rows:
        return []
    share = 100 * statistics.median(row["data_wait_share"] for row in rows)
    worst = 100 * max(row["data_wait_share"] for row in rows)
    facts = {
        "samples a second, median": f"{statistics.median(row['samples_per_s'] for row in rows):.1f}",
        "share of a step spent waiting for data, median": f"{share:.1f} %",
        "the same, worst step": f"{worst:.1f} %",
        "peak memory": f"{max(row['peak_memory_mib'] for row in rows):,.0f} MiB",
    }
    cells = "".join(f"<tr><td>{name}</td><td class=n>{value}</td></tr>" for name, value in facts.items())
    bar = f'<div class=bar title="waiting for data"><i style="width:{share:.1f}%"></i></div>'
    return [("Speed, and the share of data loading", f"<table>{cells}</table>{bar}")]


def as_html(markdown: str) -> str:
    """Convert a card's Markdown (headings, tables, lists, paragraphs, code in backticks) to HTML."""
    found = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = [re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(line)) for line in block.splitlines()]
        if heading := re.match(r"#+ (.*)", lines[0]):
            found.append(f"<h3>{heading[1]}</h3>")
        elif lines[0].startswith("|"):
            cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|---" not in line]
            rows = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in cells if any(row))
            found.append(f"<table>{rows}</table>")
        elif lines[0].startswith("- "):
            found.append(f"<ul>{''.join(f'<li>{line[2:]}</li>' for line in lines)}</ul>")
        else:
            found.append(f"<p>{'<br>'.join(lines)}</p>")
    return "".join(found)
