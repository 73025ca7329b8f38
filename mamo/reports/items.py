"""Section of a report about fine-grained items: accuracy by group against chance, and the worst items with pictures."""

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamo.config.schema import ItemScore
from mamo.data.files import parse_json
from mamo.data.images import BadSampleError
from mamo.data.items import Item, read_items, right_and_wrong
from mamo.data.pairs_reader import read_lines
from mamo.evaluation.items import load_crop
from mamo.evaluation.metrics.items import Scores, item_chances, judge
from mamo.reports.pictures import img_tag

WORST = 10
_GROUPS = 40
"""Groups that are shown: the largest."""


def items_section(file: Path, scores_file: Path, is_official: bool, worst: int = WORST) -> tuple[str, str]:
    """Build the (title, HTML fragment) of one file of items.

    Args:
        file: the items.
        scores_file: scores of each item that was scored, by name.
        is_official: see `read_items`.
        worst: number of items to show.
    """
    by_id = {item.id: item for item in read_items(file, is_official).items}
    rows = [parse_json(line) for line in read_lines(scores_file)]
    items = [by_id[row["id"]] for row in rows]
    scores = {name: [np.array(row["scores"][name]) for row in rows] for name in rows[0]["scores"]}
    names: list[ItemScore] = [name for name in ("itm", "itc", "itm+itc") if name in scores]
    parts = [f"<p>{len(items)} of {len(by_id)} items were scored; a tie is wrong.</p>"]
    parts += [_groups(items, scores[name], name) for name in names]
    parts.append(_worst(items, scores, names[0], worst))
    return f"Fine-grained items: {file.stem}", "".join(parts)


def _groups(items: Sequence[Item], scores: Sequence[Scores], name: ItemScore) -> str:
    """Draw a bar for all items and one for each group, with a mark at chance."""
    own = [(item, score) for item, score in zip(items, scores) if name == "itm" or not item.is_statement]
    groups: dict[str, list[tuple[Item, Scores]]] = defaultdict(list)
    for item, score in own:
        groups[item.group].append((item, score))
    if not groups:
        return ""
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = []
    for label, members in [("all", own), *largest[:_GROUPS]]:
        accuracy = 100 * float(np.mean([judge(item, score).accuracy for item, score in members]))
        chance = item_chances([item for item, _ in members])["accuracy"]
        rows.append(
            f"<tr><td>{html.escape(label)}</td><td class=n>{len(members)}</td><td><div class=bar>"
            f'<i style="width:{accuracy:.1f}%"></i><u style="left:{chance:.1f}%"></u></div></td>'
            f"<td class=n>{accuracy:.1f}</td></tr>"
        )
    hidden = len(groups) - _GROUPS
    more = f"<p>and {hidden} smaller groups</p>" if hidden > 0 else ""
    return f"<h3>{name.upper()}: accuracy by group, items (red: chance)</h3><table>{''.join(rows)}</table>{more}"


def margin(item: Item, scores: Scores) -> float:
    """Return by how much the worst comparison of an item is right; negative where it is wrong."""
    if item.is_statement:
        return float(scores[0, 0]) * (1 if item.right else -1)
    return min(
        float(min(scores[pair] for pair in right) - max(scores[pair] for pair in wrong))
        for axis in (0, 1)
        for right, wrong in right_and_wrong(item, axis)
    )


def _worst(items: Sequence[Item], scores: Mapping[str, Sequence[Scores]], name: ItemScore, n_shown: int) -> str:
    """Show the items with the lowest margins: images, texts (right ones green) and scores of each pair."""
    order = np.argsort([margin(item, score) for item, score in zip(items, scores[name])], kind="stable")
    cells = []
    for number in order[:n_shown].tolist():
        item, score = items[number], scores[name][number]
        if margin(item, score) > 0:
            break
        pictures = "".join(_picture(item, image) for image in range(len(item.images)))
        lines = "".join(_text(item, score, text) for text in range(len(item.texts)))
        cells.append(f'<div class="row">{pictures}<div>{html.escape(item.group)}: {html.escape(item.id)}'
                     f"<ol>{lines}</ol></div></div>")  # fmt: skip
    if not cells:
        return "<p>No item is wrong.</p>"
    title = (
        f"The worst items by {name.upper()}: texts that are right of an image are green, with the score of each image"
    )
    return f"<h3>{title}</h3>{''.join(cells)}"


def _picture(item: Item, image: int) -> str:
    try:
        pixels = load_crop(item.crop(image)).permute(1, 2, 0).numpy()
    except BadSampleError:  # it was there when it was scored
        return "<p>image is gone</p>"
    return img_tag(pixels, Path(item.images[image]).name)


def _text(item: Item, scores: Any, text: int) -> str:
    is_right = any(own == text for _, own in item.right)
    shown = ", ".join(f"{score:.3f}" for score in scores[:, text])
    return f'<li class="{"hit" if is_right else "miss"}">{html.escape(item.texts[text])} ({shown})</li>'
