"""`report.html` of a run: one self-contained page with its curves, its pictures and its numbers."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from mamo.training.run_folder import CURVES, replace_text

REPORT = "report.html"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
img { image-rendering: auto; vertical-align: top } img.hit { outline: 4px solid #2c9f4b } .curves { width: 100% }
.row { display: flex; flex-wrap: wrap; gap: 14px; margin: 10px 0 } .row ol { margin: 0; max-width: 820px }
li.hit, b.hit { color: #1d7f38; font-weight: 600 } li.miss { color: #555 } b.miss { color: #c0392b }
figure { margin: 0; width: 200px } figcaption { font-size: 13px } figure.hit figcaption { color: #1d7f38 }
figure.miss figcaption { color: #c0392b } td { padding: 2px 14px 2px 0; text-align: left } td.n { text-align: right }
.columns { columns: 2 }
"""


def write_report(
    folder: Path,
    title: str,
    metrics: Mapping[str, float],
    sections: Sequence[tuple[str, str]],
    curves: Path | None = None,
) -> Path:
    """Write the page into `folder`.

    Args:
        folder: where `report.html` goes.
        title: its heading.
        metrics: percentages by name.
        sections: (title, HTML fragment), as `scene_pictures` makes them.
        curves: a run folder whose `curves.png` is shown; None for none.
    """
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{value:.1f}</td></tr>" for name, value in metrics.items()
    )
    parts = [("Numbers, in percent", f"<div class=columns><table>{rows}</table></div>"), *sections]
    if curves is not None and (curves / CURVES).is_file():
        data = base64.b64encode((curves / CURVES).read_bytes()).decode()
        picture = f'<img class="curves" alt="losses and metrics against the step" src="data:image/png;base64,{data}">'
        parts.append(("Losses and metrics", picture))
    body = "".join(f"<h2>{html.escape(name)}</h2>{content}" for name, content in parts)
    page = f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}"
    replace_text(folder / REPORT, f'<!doctype html><html lang="en"><meta charset="utf-8">{page}</html>\n')
    return folder / REPORT
