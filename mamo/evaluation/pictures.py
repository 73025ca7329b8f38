"""What a network does, to look at: retrieval, grounding and masked words of a few held-out scenes as HTML fragments.

Every picture is inside the text (PNG, base64), so that a page is one file that needs nothing else.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from mamo.config import Config
from mamo.data.expressions import Expression, expressions
from mamo.data.loader import WORLD_SEED
from mamo.data.rendering import render
from mamo.data.scene_captions import identifying_caption
from mamo.data.scenes import SceneWorld
from mamo.evaluation.grounding import IOU_THRESHOLD, best_proposal, iou, to_image_size
from mamo.evaluation.probes import fill_masked_words, masked_words
from mamo.evaluation.scoring import EncodedImages, Scorer
from mamo.models.vlm import Mamo

GALLERY = 60
SHOWN = 8
TOP = 5
_SIDE_PX = 132  # of a picture on the page
_GREEN, _RED, _WHITE = (60, 200, 90), (225, 70, 60), (255, 255, 255)
Picture = NDArray[np.uint8]


def scene_pictures(
    network: Mamo, config: Config, tokenizer: Any, normalise: Callable[[Tensor], Tensor], device: torch.device
) -> list[tuple[str, str]]:
    """(title, HTML fragment) of each kind of picture that the network has the heads for; arguments as `zero_shot`'s.

    The network stays in eval mode.
    """
    network.eval()
    scorer = Scorer(network, tokenizer, normalise, device, config.data.text_max_tokens, config.evaluation.batch_size)
    world = SceneWorld(config.data.difficulty, WORLD_SEED)
    size = config.data.image_size
    pictures = [render(world.scene("test", index), size) for index in range(GALLERY)]
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    found: list[tuple[str, str]] = []
    with torch.inference_mode():
        images = scorer.encode_images(torch.split(batch, scorer.batch_size))
        captions = [identifying_caption(world.scene("test", index)).text for index in range(GALLERY)]
        if scorer.network.temperature is not None:
            score, by = _scores(scorer, images, captions)
            found.append((f"Images to texts, top {TOP} of {GALLERY} by {by}", _to_texts(score, pictures, captions)))
            found.append((f"Texts to images, top {TOP} of {GALLERY} by {by}", _to_images(score.T, pictures, captions)))
        if scorer.network.itm is not None:
            items = [item for item in expressions(world, GALLERY, size) if item.scene_index < GALLERY][: 2 * SHOWN]
            title = "What an expression means: Grad-CAM of the match, gold box (green), chosen proposal (white)"
            found.append((title, _grounded(scorer, images, items, pictures)))
        if scorer.network.mlm is not None:
            found.append(("Masked words", _filled(scorer, images, world, pictures)))
    return found


def _scores(scorer: Scorer, images: EncodedImages, captions: Sequence[str]) -> tuple[Tensor, str]:
    """float32 [images, texts]: ITM of all pairs, or ITC where there is no ITM head."""
    texts = scorer.encode_texts(*scorer.tokenize(captions))
    n = len(captions)
    rows = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    if scorer.network.itm is None:
        return scorer.similarity(images, texts, rows[:, 0], rows[:, 1]).view(n, n), "ITC"
    return scorer.match(images, texts, rows[:, 0], rows[:, 1]).view(n, n), "ITM"


def _to_texts(score: Tensor, pictures: Sequence[Picture], captions: Sequence[str]) -> str:
    cells = []
    for image in range(SHOWN):
        best = score[image].topk(TOP).indices.tolist()
        lines = "".join(
            f'<li class="{"hit" if text == image else "miss"}">{html.escape(captions[text])}</li>' for text in best
        )
        cells.append(f'<div class="row">{_embedded(pictures[image], captions[image])}<ol>{lines}</ol></div>')
    return "".join(cells)


def _to_images(score: Tensor, pictures: Sequence[Picture], captions: Sequence[str]) -> str:
    cells = []
    for text in range(SHOWN):
        best = score[text].topk(TOP).indices.tolist()
        shown = "".join(
            _embedded(pictures[image], captions[image], "hit" if image == text else "miss") for image in best
        )
        cells.append(f"<p>{html.escape(captions[text])}</p><div class='row'>{shown}</div>")
    return "".join(cells)


def _grounded(scorer: Scorer, images: EncodedImages, items: Sequence[Expression], pictures: Sequence[Picture]) -> str:
    texts = scorer.encode_texts(*scorer.tokenize([item.text for item in items]))
    rows = torch.tensor([item.scene_index for item in items])
    cells = []
    for item, heat in zip(items, scorer.ground(images, texts, rows, torch.arange(len(items)))):
        picture = pictures[item.scene_index]
        whole = to_image_size(heat, picture.shape[:2])
        chosen = item.proposals[best_proposal(whole, item.proposals)]
        is_hit = iou(chosen, item.box) >= IOU_THRESHOLD
        drawn = overlay(picture, whole, [(chosen, _WHITE), (item.box, _GREEN)])
        cells.append(
            f'<figure class="{"hit" if is_hit else "miss"}">{_embedded(drawn, item.text)}'
            f"<figcaption>{html.escape(item.text)}</figcaption></figure>"
        )
    return f'<div class="row">{"".join(cells)}</div>'


def _filled(scorer: Scorer, images: EncodedImages, world: SceneWorld, pictures: Sequence[Picture]) -> str:
    items = [item for item in masked_words(world, GALLERY) if item.scene_index < GALLERY]
    kinds = list(dict.fromkeys(item.word_class for item in items))
    chosen = [[item for item in items if item.word_class == kind][k] for k in range(3) for kind in kinds]
    filled = fill_masked_words(scorer, images, chosen, {index: index for index in range(GALLERY)})
    cells = []
    for item, word, is_right in filled:
        said = f"<b class='{'hit' if is_right else 'miss'}'>{html.escape(word)}</b>"
        before, after = html.escape(item.caption[: item.start]), html.escape(item.caption[item.end :])
        truth = "" if is_right else f" (is: {html.escape(' or '.join(item.answers))})"
        shown = _embedded(pictures[item.scene_index], item.caption)
        cells.append(f"<figure>{shown}<figcaption>{before}{said}{after}{truth}</figcaption></figure>")
    return f'<div class="row">{"".join(cells)}</div>'


def overlay(
    picture: Picture, heat: NDArray[np.float64], boxes: Sequence[tuple[tuple[float, ...], tuple[int, int, int]]]
) -> Picture:
    """A picture [H, W, 3] with heat [H, W] in red over it, darkened, and boxes (x, y, width, height) in colours."""
    scale = max(1, round(_SIDE_PX / picture.shape[0]))
    share = (heat / max(heat.max(), 1e-12))[..., None]
    mixed = picture * (0.55 + 0.45 * share) * (1 - 0.5 * share) + 0.5 * share * np.array([255.0, 60.0, 30.0])
    large = Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).resize(
        (picture.shape[1] * scale, picture.shape[0] * scale), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(large)
    for (x, y, w, h), colour in boxes:
        draw.rectangle([scale * x, scale * y, scale * (x + w) - 1, scale * (y + h) - 1], outline=colour, width=2)
    return np.asarray(large)


def _embedded(picture: Picture, text: str, css_class: str = "") -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="{css_class}" height="{_SIDE_PX}" alt="{html.escape(text, quote=True)}" '
        f'title="{html.escape(text, quote=True)}" src="data:image/png;base64,{data}">'
    )
