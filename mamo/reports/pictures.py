"""Show a network's predictions on held-out images as HTML: retrieval, grounding, masked words, masked patches.

Images are embedded in the page (PNG, large ones JPEG; base64), so that it is one self-contained file.

Legend: I images, P patches, K masked patches, D width of the image encoder.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from mamo.config.objective import MaskingConfig
from mamo.config.schema import RunConfig
from mamo.data.collate import sample_rng
from mamo.evaluation.metrics.grounding import IOU_THRESHOLD, best_proposal, iou, to_image_size
from mamo.evaluation.metrics.retrieval import union_of_pairs
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.probes import fill_masked_words
from mamo.evaluation.scorer import EncodedImages, HeatFrom, Scorer, heatmaps
from mamo.masking import draw_image_mask
from mamo.models.vlm import Mamo
from mamo.world.masked_words import MaskedWord
from mamo.world.referring import Expression

SHOWN = 8
TOP = 5
_SIDE_PX = 132  # shown height of an image
_MOST_PX = 2 * _SIDE_PX  # stored height: enough for a high-density screen
_GREEN, _WHITE = (60, 200, 90), (255, 255, 255)
_GREY = 128  # grey level of a masked patch


Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Samples:
    """N pictures [H, W, 3] with one distinct caption each, and the expressions and masked words on them by index.

    Files of expressions have no captions.
    """

    pictures: list[Picture]
    captions: list[str]
    expressions: list[Expression]
    """With gold boxes, in pixels of the pictures; empty for image-text pairs."""
    masked_words: list[MaskedWord]


def network_pictures(
    predictor: Predictor,
    config: RunConfig,
    masking: MaskingConfig,
    mim_target: str,
    samples: Samples,
    rows: int = SHOWN,
) -> list[tuple[str, str]]:
    """Build one (title, HTML) section per available head. The network is left in eval mode.

    Args:
        predictor: the network with its processor.
        config: of the run; evaluation settings and seed.
        masking: masking settings of the masked patches.
        mim_target: target of MIM.
        samples: the pictures to show.
        rows: number of queries, expressions and images of each kind.
    """
    network: Mamo = predictor.network.eval()
    scorer = Scorer(predictor, config.evaluation.batch_size, config.evaluation.itm_score)
    pictures, captions, n = samples.pictures, samples.captions, len(samples.pictures)
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    found: list[tuple[str, str]] = []
    with torch.inference_mode():
        images = scorer.encode_images(torch.split(batch, scorer.batch_size))
        if network.get_head("temperature") is not None and captions:
            to_texts, to_images, by = _rankings(scorer, images, captions, config.evaluation.rerank_k)
            shown = _to_texts(to_texts[:rows], pictures, captions)
            found.append((f"Images to texts, top {TOP} of {n} by {by}", shown))
            shown = _to_images(to_images[:rows], pictures, captions)
            found.append((f"Texts to images, top {TOP} of {n} by {by}", shown))
        if network.get_head("itm") is not None and samples.expressions:
            title = "Expressions: heat map of the match, gold box (green), chosen proposal (white)"
            how = config.evaluation.grounding_heat
            found.append((title, _grounded(scorer, batch, samples.expressions[: 2 * rows], pictures, how)))
        sees_parts = network.get_head("mim") is not None or network.get_head("mrm_image") is not None
        grid = network.backbone.image_encoder.grid
        drawn = [draw_image_mask(sample_rng(config.seed, 0, k, 0), grid, masking.image_ratio, masking.image_style)
                 for k in range(n)]  # fmt: skip
        visible, masked = (torch.from_numpy(np.stack(part)) for part in zip(*drawn))
        if network.get_head("mlm") is not None and samples.masked_words:
            partly = _partly_seen(scorer, batch, visible) if sees_parts else None
            hidden = [mask_patches(picture, patches, grid) for picture, patches in zip(pictures, masked)]
            title = "Masked words" + (": with the whole image | with its visible patches" if partly else "")
            items = samples.masked_words
            found.append((title, _filled(scorer, images, partly, items, pictures, hidden, 3 * rows)))
        if network.get_head("mim") is not None and captions:
            rebuilt = rebuilt_pictures(scorer, batch, captions, visible, masked, mim_target)
            cells = [_trio(pictures[k], mask_patches(pictures[k], masked[k], grid), rebuilt[k], captions[k])
                     for k in range(min(rows, n))]  # fmt: skip
            title = "Masked patches: image, visible patches, and other images' patches nearest to MIM's prediction"
            found.append((title, f'<div class="row">{"".join(cells)}</div>'))
    return found


def _rankings(
    scorer: Scorer, images: EncodedImages, captions: Sequence[str], rerank_k: int
) -> tuple[list[list[int]], list[list[int]], str]:
    """Return the `TOP` texts of each image, the `TOP` images of each text, and the name of the scorer."""
    texts = scorer.encode_texts(*scorer.tokenize(captions))
    similarity = images.feature @ texts.feature.T  # [I, I]
    k = min(max(TOP, rerank_k), len(captions))
    shortlists = [values.topk(k, dim=1).indices.cpu() for values in (similarity, similarity.T)]
    if scorer.network.get_head("itm") is None:
        return shortlists[0][:, :TOP].tolist(), shortlists[1][:, :TOP].tolist(), "ITC"
    pairs, *places = union_of_pairs(*shortlists)
    score = scorer.itm_scores(images, texts, pairs[:, 0], pairs[:, 1], scorer.itm_score)
    best = [s.gather(1, score[place].topk(min(TOP, k), dim=1).indices) for s, place in zip(shortlists, places)]
    return best[0].tolist(), best[1].tolist(), "ITM among the shortlist of ITC"


def _to_texts(best: Sequence[Sequence[int]], pictures: Sequence[Picture], captions: Sequence[str]) -> str:
    cells = []
    for image, texts in enumerate(best):
        lines = "".join(
            f'<li class="{"hit" if text == image else "miss"}">{html.escape(captions[text])}</li>' for text in texts
        )
        cells.append(f'<div class="row">{img_tag(pictures[image], captions[image])}<ol>{lines}</ol></div>')
    return "".join(cells)


def _to_images(best: Sequence[Sequence[int]], pictures: Sequence[Picture], captions: Sequence[str]) -> str:
    cells = []
    for text, images in enumerate(best):
        shown = "".join(
            img_tag(pictures[image], captions[image], "hit" if image == text else "miss") for image in images
        )
        cells.append(f"<p>{html.escape(captions[text])}</p><div class='row'>{shown}</div>")
    return "".join(cells)


def _partly_seen(scorer: Scorer, batch: Tensor, visible: Tensor) -> EncodedImages:
    """Encode only the visible patches of images, as in training.

    Args:
        scorer: scorer of the network.
        batch: uint8 [I, 3, H, W].
        visible: int64 [I, P_v].
    """
    parts = []
    for pixels, seen in zip(
        torch.split(batch, scorer.batch_size), torch.split(visible.to(scorer.device), scorer.batch_size)
    ):
        parts.append(scorer.network.backbone.image_encoder(pixels.to(scorer.device), seen).cpu())
    return EncodedImages(torch.cat(parts), torch.empty(len(batch), 0), visible)


def rebuilt_pictures(
    scorer: Scorer, batch: Tensor, captions: Sequence[str], visible: Tensor, masked: Tensor, target: str
) -> list[Picture]:
    """Replace each masked patch by the patch of another image that is nearest to MIM's prediction.

    Nearest is by cosine between the prediction and the standardised target (`mim_target`: features of the image
    encoder, here the student's own, or pixels). For standardised vectors this order is that of the distance.

    Args:
        scorer: scorer of the network.
        batch: uint8 [I, 3, H, W]; the patches of all images are candidates.
        captions: of the images, encoded with them as in training.
        visible, masked: int64 [I, P - K] and [I, K].
        target: `mim_target` of the config.
    """
    backbone, mim = scorer.network.backbone, scorer.network.mim
    texts = scorer.encode_texts(*scorer.tokenize(captions))
    partly = _partly_seen(scorer, batch, visible)
    positions = backbone.fusion.patch_positions(masked)
    predicted = []
    for start in range(0, len(batch), scorer.batch_size):
        rows = slice(start, start + scorer.batch_size)
        encoded, text = partly.tokens[rows].to(scorer.device), texts.tokens[rows].to(scorer.device)
        image = backbone.fusion.embed_image(encoded, visible[rows].to(scorer.device))
        is_valid = (torch.arange(text.shape[1]) < texts.lengths[rows, None]).to(scorer.device)
        fused = backbone.fusion.fuse(image, text, is_valid, positions[rows].to(scorer.device))
        predicted.append(mim(fused).float().cpu())
    size = backbone.image_encoder.patch_size_px
    patches = _patches(batch.float(), size)  # [I, P, 3 * h * w]
    known = []
    for pixels in torch.split(batch, scorer.batch_size):
        normal = backbone.image_encoder.normalize(pixels.to(scorer.device))
        encoded = backbone.image_encoder(normal)[:, backbone.image_encoder.num_prefix_tokens :]
        known.append((encoded if target == "features" else _patches(normal, size)).float().cpu())
    bank = functional.normalize(functional.layer_norm(torch.cat(known), known[0].shape[-1:], eps=1e-6), dim=-1)
    found = []
    for k, prediction in enumerate(functional.normalize(torch.cat(predicted), dim=-1)):
        similarity = prediction @ bank.flatten(0, 1).T  # [K, I * P]
        similarity[:, k * patches.shape[1] : (k + 1) * patches.shape[1]] = -torch.inf
        mine = patches[k].clone()
        mine[masked[k]] = patches.flatten(0, 1)[similarity.argmax(dim=1)]
        folded = functional.fold(mine.T[None], batch.shape[-2:], size, stride=size)[0]
        found.append(folded.permute(1, 2, 0).to(torch.uint8).numpy())
    return found


def _patches(image: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Cut images float [I, 3, H, W] into row-major patches [I, P, 3 * patch_h * patch_w]."""
    return functional.unfold(image, size_px, stride=size_px).transpose(1, 2)


def mask_patches(picture: Picture, masked: Tensor, grid: tuple[int, int]) -> Picture:
    """Paint the masked patches (row-major indices int64 [K]) of a picture [H, W, 3] grey."""
    is_hidden = np.zeros(grid[0] * grid[1], dtype=bool)
    is_hidden[masked.numpy()] = True
    height, width = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    whole = is_hidden.reshape(grid).repeat(height, axis=0).repeat(width, axis=1)
    shown: Picture = np.where(whole[..., None], np.uint8(_GREY), picture)
    return shown


def _trio(picture: Picture, hidden: Picture, rebuilt: Picture, text: str) -> str:
    three = "".join(img_tag(shown, text) for shown in (picture, hidden, rebuilt))
    return f"<figure class='wide'>{three}<figcaption>{html.escape(text)}</figcaption></figure>"


def _grounded(
    scorer: Scorer, images: Tensor, items: Sequence[Expression], pictures: Sequence[Picture], heat_from: HeatFrom
) -> str:
    texts = scorer.encode_texts(*scorer.tokenize([item.text for item in items]))
    rows = torch.tensor([item.scene_index for item in items])
    cells = []
    for item, heat in zip(items, heatmaps(scorer, images, texts, rows, torch.arange(len(items)), heat_from)):
        picture = pictures[item.scene_index]
        whole = to_image_size(heat, picture.shape[:2])
        chosen = item.proposals[best_proposal(whole, item.proposals)]
        is_hit = iou(chosen, item.box) >= IOU_THRESHOLD
        drawn = overlay(picture, whole, [(chosen, _WHITE), (item.box, _GREEN)])
        cells.append(
            f'<figure class="{"hit" if is_hit else "miss"}">{img_tag(drawn, item.text)}'
            f"<figcaption>{html.escape(item.text)}</figcaption></figure>"
        )
    return f'<div class="row">{"".join(cells)}</div>'


def _filled(
    scorer: Scorer,
    images: EncodedImages,
    partly: EncodedImages | None,
    items: Sequence[MaskedWord],
    pictures: Sequence[Picture],
    hidden: Sequence[Picture],
    n_shown: int,
) -> str:
    """Show the predicted masked words with the whole image, and with only its visible patches."""
    classes = list(dict.fromkeys(item.word_class for item in items))
    in_turn = zip(*([item for item in items if item.word_class == name] for name in classes))  # one of each class
    chosen = [item for several in in_turn for item in several][:n_shown]
    rows = {index: index for index in range(len(pictures))}
    whole = fill_masked_words(scorer, images, chosen, rows)
    parts = whole if partly is None else fill_masked_words(scorer, partly, chosen, rows)
    cells = []
    for (item, word, is_right), (_, guess, is_guessed) in zip(whole, parts):
        before, after = html.escape(item.caption[: item.start]), html.escape(item.caption[item.end :])
        truth = "" if is_right and is_guessed else f" (is: {html.escape(' or '.join(item.answers))})"
        shown, words = img_tag(pictures[item.scene_index], item.caption), _marked(word, is_right)
        if partly is not None:
            shown += img_tag(hidden[item.scene_index], item.caption)
            words += f" | {_marked(guess, is_guessed)}"
        cells.append(f"<figure class='wide'>{shown}<figcaption>{before}{words}{after}{truth}</figcaption></figure>")
    return f'<div class="row">{"".join(cells)}</div>'


def _marked(word: str, is_right: bool) -> str:
    return f"<b class='{'hit' if is_right else 'miss'}'>{html.escape(word)}</b>"


def overlay(
    picture: Picture, heat: NDArray[np.float64], boxes: Sequence[tuple[tuple[float, ...], tuple[int, int, int]]]
) -> Picture:
    """Draw heat [H, W] in red over a darkened picture [H, W, 3], and boxes (x, y, width, height) in colours."""
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


def img_tag(picture: Picture, text: str, css_class: str = "") -> str:
    """Return an `<img>` that embeds the picture [H, W, 3]; `text` is its tooltip."""
    image, buffer, kind = Image.fromarray(picture), io.BytesIO(), "png"
    if image.height > _MOST_PX:
        image, kind = image.resize((image.width * _MOST_PX // image.height, _MOST_PX)), "jpeg"
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="{css_class}" height="{_SIDE_PX}" loading="lazy" alt="{html.escape(text, quote=True)}" '
        f'title="{html.escape(text, quote=True)}" src="data:image/{kind};base64,{data}">'
    )
