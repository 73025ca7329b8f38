"""Write one page with the outputs of a network on held-out pictures of the embedded world, drawn for the page."""

import html
import tempfile
from pathlib import Path

from mamo.data.records import ENTAILMENT_LABELS
from mamo.evaluation.predictor import Predictor
from mamo.inference.model import Model
from mamo.reports.page import as_html, html_page
from mamo.reports.pictures import img_tag
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.pretrain.samples import GALLERY, sample_pictures
from mamo.training.run_dir import atomic_write_text
from mamo.world.entailment import entailment_items, render_covered
from mamo.world.probes import PROBES, probe_items
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, SceneWorld

ROWS = 6
"""Queries, expressions and statements of each kind."""
_PER_PROBE = 3


def write_demo(model: Model, name: str, to: Path) -> None:
    """Write retrieval, heat maps, masked words, statements and the card of a model as one self-contained HTML file.

    Args:
        model: one that was pre-trained or fine-tuned on the embedded world.
        name: of the model, for the heading.
        to: file to write.

    Raises:
        ValueError: the model was trained on other pictures, or has no head whose outputs are shown.
    """
    config = model.config
    if config.data.source != "scenes":
        raise ValueError(
            f"checkpoint: {name} was trained on {config.data.source}, and the demo draws pictures of the embedded "
            f"world; use `mamo evaluate checkpoint={name} protocol=NAME --pictures`"
        )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=to.parent):  # found before the work
            pass
    except OSError as error:
        raise ValueError(f"--to: {to} cannot be written: {error.strerror}; name another file") from None
    sections: list[tuple[str, str]] = []
    if isinstance(config, PretrainConfig):
        predictor = Predictor(model.network, model.processor, next(model.network.parameters()).device)
        sections += sample_pictures(predictor, config, ROWS)
    sections += _statements(model)
    if not sections:
        raise ValueError(
            f"checkpoint: {name} has task {config.task}; the demo shows networks of pretrain, grounding and entailment"
        )
    opening = (
        f"<p>{html.escape(repr(model))}. The pictures were drawn for this page: scenes of the test split "
        f"({config.data.difficulty}), which no training has seen. {GALLERY} of them are the gallery. "
        "Right outputs are green, wrong ones red or grey.</p>"
    )
    sections.append(("The card of the checkpoint", as_html(model.card)))
    atomic_write_text(to, html_page(f"{name}: held-out pictures", sections, opening))


def _statements(model: Model) -> list[tuple[str, str]]:
    """Build the section of true and false statements by the entailment head, or else by the ITM head, if any."""
    world = SceneWorld(model.config.data.difficulty, WORLD_SEED)
    if model.network.get_head("entailment") is not None:
        return [_entailed(model, world)]
    return [_matched(model, world)] if model.network.get_head("itm") is not None else []


def _entailed(model: Model, world: SceneWorld) -> tuple[str, str]:
    """Show sentences about pictures of which a grey card hides a part, with the likeliest label."""
    cells = []
    for item in entailment_items(world, "test", ROWS * len(ENTAILMENT_LABELS)):
        scene = world.scene("test", item.scene_index)
        picture = render_covered(scene, item.covered, model.config.data.image_size)
        found = model.entails(picture, item.sentence)
        label = max(found, key=lambda name: found[name])
        truth = "" if label == item.label else f" (is: {item.label})"
        mark = "hit" if label == item.label else "miss"
        shown = f"{html.escape(item.sentence)}: <b class={mark}>{label}</b> ({found[label]:.2f}){truth}"
        cells.append(f"<figure>{img_tag(picture, item.sentence)}<figcaption>{shown}</figcaption></figure>")
    title = "Sentences that a picture entails, contradicts or leaves undecided (something may lie under the grey card)"
    return title, f'<div class="row">{"".join(cells)}</div>'


def _matched(model: Model, world: SceneWorld) -> tuple[str, str]:
    """Show a true and a false sentence about each picture, the true one first, with the probability of a match."""
    items = [
        (probe, item)
        for number, probe in enumerate(PROBES, 1)
        for item in probe_items(world, probe, number * _PER_PROBE)[-_PER_PROBE:]  # other pictures for each kind
    ]
    pictures = [render(world.scene("test", item.scene_index), model.config.data.image_size) for _, item in items]
    true, false = (
        model.match(pictures, texts).tolist()
        for texts in ([item.caption for _, item in items], [item.foil for _, item in items])
    )
    cells = []
    for (probe, item), picture, match, other in zip(items, pictures, true, false, strict=True):
        lines = _sentence(item.caption, match, "hit" if match > other else "")
        lines += _sentence(item.foil, other, "miss" if other > match else "")
        kind = html.escape(probe.replace("_", " "))
        shown = img_tag(picture, item.caption)
        cells.append(f'<div class="row">{shown}<div>{kind}<ol>{lines}</ol></div></div>')
    title = (
        "A true sentence, then a false one; bold is the likelier by the ITM head (this network has no entailment head)"
    )
    return title, "".join(cells)


def _sentence(text: str, probability: float, mark: str) -> str:
    """Format one sentence; with a mark in bold, green or red."""
    shown = html.escape(text)
    if mark:
        return f"<li><b class={mark}>{shown}</b> ({probability:.2f})</li>"
    return f"<li class=miss>{shown} ({probability:.2f})</li>"
