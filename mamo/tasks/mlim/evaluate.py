"""Evaluate a pre-trained MLIM: masked words by class, and images filled in.

Legend: I images, N items, L text tokens, W tokens of a masked word, P patches in a grid [h, w], H, W in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mamo.data.collate import sample_rng, tokenize
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.probes import masked_word_accuracy
from mamo.evaluation.scorer import eval_mode
from mamo.masking import draw_image_mask
from mamo.reports.pictures import img_tag
from mamo.tasks.mlim.config import MlimConfig
from mamo.tasks.mlim.network import Mlim
from mamo.world.captions import identifying_caption
from mamo.world.masked_words import masked_word_items
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, Scene, SceneWorld


class StreamScorer:
    """A `WordFiller`: the single stream sees image and text together, so nothing is encoded before they meet."""

    def __init__(self, predictor: Predictor, batch_size: int) -> None:
        self.network: Mlim = predictor.network
        self.tokenizer = predictor.processor.tokenizer
        self.text_max_tokens = predictor.processor.text_max_tokens
        self.device = predictor.device
        self.batch_size = batch_size

    def encode_texts(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return token ids int64 [N, L] and which of them are real, bool [N, L]."""
        return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]

    def predict_masked(
        self, images: Tensor, texts: tuple[Tensor, Tensor], image_indices: Tensor, text_rows: Tensor, slots: Tensor
    ) -> Tensor:
        """Return the likeliest token at text positions `slots` int64 [N, W] of pairs -> int64 [N, W] in main memory."""
        stream = self.network.backbone
        found = []
        for rows in torch.split(torch.arange(len(slots)), self.batch_size):
            image = images[image_indices[rows]].to(self.device)
            input_ids, is_valid = (value[text_rows[rows]].to(self.device) for value in texts)
            tokens = stream(image, input_ids, is_valid)
            at = (slots[rows] + stream.n_patches).to(self.device)[..., None].expand(-1, -1, tokens.shape[-1])
            found.append(self.network.mlm(tokens.gather(1, at)).argmax(dim=-1).cpu())
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """`image` and `prediction` float32 [I, 3, H, W], 0 to 1; `is_masked` bool [I, H, W]."""

    image: Tensor
    prediction: Tensor
    is_masked: Tensor

    def error(self, other: Tensor | None = None) -> float:
        """Return the mean squared error over masked pixels, summed over colours; of the prediction, or of `other`."""
        guess = self.prediction if other is None else other
        squared = torch.square(guess - self.image).sum(dim=1)  # [I, H, W]
        return (squared * self.is_masked).sum().item() / self.is_masked.sum().item()

    def mean_visible(self) -> Tensor:
        """Return each image's mean visible colour, float32 [I, 3, 1, 1]: what one knows without looking at shapes."""
        is_visible = ~self.is_masked[:, None]
        return (self.image * is_visible).sum(dim=(2, 3), keepdim=True) / is_visible.sum(dim=(2, 3), keepdim=True)


def reconstruct(
    scorer: StreamScorer, scenes: Sequence[Scene], pictures: Tensor, ratio: float, style: Literal["random", "block"]
) -> Reconstruction:
    """Fill in images uint8 [I, 3, H, W], of which `ratio` is masked, from the scenes' identifying captions.

    The masks are a function of the scenes.
    """
    network = scorer.network
    grid, patch = network.backbone.embedder.grid, network.backbone.embedder.patch_size_px
    is_masked = torch.zeros(len(scenes), grid[0] * grid[1], dtype=torch.bool)
    for row, scene in enumerate(scenes):
        _, hidden = draw_image_mask(sample_rng(WORLD_SEED, 0, scene.index, 0), grid, ratio, style)
        is_masked[row, hidden] = True
    captions = [identifying_caption(scene).text for scene in scenes]
    input_ids, is_valid = tokenize(scorer.tokenizer, captions, scorer.text_max_tokens)
    predictions = []
    for rows in torch.split(torch.arange(len(scenes)), scorer.batch_size):
        image, ids, valid, masked = (x[rows].to(scorer.device) for x in (pictures, input_ids, is_valid, is_masked))
        tokens = network.backbone(image, ids, valid, is_masked_patch=masked)
        predictions.append(network.recon(tokens[:, : network.backbone.n_patches]).cpu())
    pixels = is_masked.view(-1, *grid).repeat_interleave(patch[0], dim=1).repeat_interleave(patch[1], dim=2)
    return Reconstruction(pictures.float() / 255, torch.cat(predictions), pixels)


def evaluate_mlim(config: MlimConfig, predictor: Predictor) -> dict[str, float]:
    """Evaluate on the test scenes; a head that the network does not have leaves its metrics out.

    Returns:
        `masked_word/CLASS` in percent, as of MAMO; `recon/error`, 100 times the mean over masked pixels of the squared
        error summed over the colours (values 0 to 1), and `recon/error_of_mean`, the same of an image filled with its
        mean visible colour. Nothing for files of pairs.
    """
    if config.data.source != "scenes":
        return {}
    world, n_items = SceneWorld(config.data.difficulty, WORLD_SEED), config.evaluation.probe_items
    scenes = [world.scene("test", index) for index in range(n_items)]
    pictures = _rendered(scenes, config)
    metrics: dict[str, float] = {}
    network = predictor.network
    scorer = StreamScorer(predictor, config.evaluation.batch_size)
    with eval_mode(network):
        if network.get_head("mlm") is not None:
            rows = {index: index for index in range(n_items)}
            found = masked_word_accuracy(scorer, pictures, masked_word_items(world, n_items), rows)
            metrics |= {f"masked_word/{name}": value for name, value in found.items()}
        if network.get_head("recon") is not None:
            filled = reconstruct(scorer, scenes, pictures, config.masking.image_ratio, config.masking.image_style)
            metrics["recon/error"] = 100.0 * filled.error()
            metrics["recon/error_of_mean"] = 100.0 * filled.error(filled.mean_visible())
    return metrics


def reconstructions(config: MlimConfig, predictor: Predictor, n_shown: int) -> list[tuple[str, str]]:
    """Draw test scenes for the report: whole, masked, and filled in. The network stays in eval mode."""
    network = predictor.network
    if config.data.source != "scenes" or network.get_head("recon") is None:
        return []
    network.eval()
    world = SceneWorld(config.data.difficulty, WORLD_SEED)
    scenes = [world.scene("test", index) for index in range(n_shown)]
    pictures = _rendered(scenes, config)
    with torch.inference_mode():
        scorer = StreamScorer(predictor, config.evaluation.batch_size)
        filled = reconstruct(scorer, scenes, pictures, config.masking.image_ratio, config.masking.image_style)
    grey = torch.where(filled.is_masked[:, None], 0.5, filled.image)
    joined = torch.where(filled.is_masked[:, None], filled.prediction, filled.image)
    cells = []
    for row, scene in enumerate(scenes):
        text = identifying_caption(scene).text
        three = (picture[row].mul(255).byte().permute(1, 2, 0).numpy() for picture in (filled.image, grey, joined))
        cells.append(f"<p>{text}</p><div class='row'>{''.join(img_tag(np.array(one), text) for one in three)}</div>")
    return [("Images: whole, masked, and filled in from what is left and the caption", "".join(cells))]


def _rendered(scenes: Sequence[Scene], config: MlimConfig) -> Tensor:
    """Return uint8 [I, 3, H, W]."""
    pictures = np.stack([render(scene, config.data.image_size) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)
