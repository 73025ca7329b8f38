"""The two losses that set pairs against other pairs: ITC on unimodal features, ITM on fused hard negatives.

Legend: B batch, L text tokens, N ITC candidates, S ITM pool size.
"""

import torch
from torch import Tensor

from mamo.losses.itc import itc_loss, itc_targets, positives
from mamo.losses.itm import draw_negatives, itm_loss
from mamo.models.fusion import index_rows
from mamo.models.vlm import Mamo
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.targets import Targets

Features = tuple[Tensor, Tensor]
"""(image, text), each float32 [B, D_itc], L2-normalised."""


def itc_step(
    features: Features, temperature: Tensor, batch: PairBatch, targets: Targets, start: int
) -> tuple[Tensor, Tensor]:
    """ITC loss and accuracy (image to text) of the samples from `start` on, as shares of the global batch."""
    image_feature, text_feature = features
    if targets.candidate_image is None:  # plainly in batch
        candidate_image, candidate_text = image_feature, text_feature
    else:
        assert targets.candidate_text is not None
        candidate_image, candidate_text = targets.candidate_image, targets.candidate_text
    own = torch.arange(len(batch), device=image_feature.device) + targets.first + start
    is_excluded = positives(batch.image_id, batch.caption_id, targets.candidate_image_id, targets.candidate_caption_id)
    is_excluded = is_excluded | ~targets.candidate_is_filled
    is_excluded = is_excluded.scatter(1, own[:, None], False)
    logits = [image_feature @ candidate_text.t() / temperature, text_feature @ candidate_image.t() / temperature]
    opinions = logits  # not read at alpha 0
    if targets.itc_alpha > 0 and targets.image_feature is not None and targets.text_feature is not None:
        rows = slice(start, start + len(batch))
        opinions = [
            targets.image_feature[rows] @ candidate_text.t() / temperature.detach(),
            targets.text_feature[rows] @ candidate_image.t() / temperature.detach(),
        ]
    image_loss, text_loss = (
        itc_loss(
            logit, itc_targets(opinion.detach(), own, is_excluded, targets.itc_alpha), is_excluded, targets.n_samples
        )
        for logit, opinion in zip(logits, opinions)
    )
    hits = logits[0].detach().masked_fill(is_excluded, -torch.inf).argmax(dim=1) == own
    return (image_loss + text_loss) / 2, hits.sum() / targets.n_samples


def pool_positives(batch: PairBatch, size: int) -> Tensor:
    """bool [B / S, S, S], True where two samples of a pool of `size` consecutive ones match each other."""
    image_id, caption_id = batch.image_id.view(-1, size), batch.caption_id.view(-1, size)
    same_image = image_id[:, :, None] == image_id[:, None, :]
    return same_image | (caption_id[:, :, None] == caption_id[:, None, :])


def itm_step(
    network: Mamo,
    features: Features,
    temperature: Tensor,
    embedded: Tensor,
    text: Tensor,
    batch: PairBatch,
    targets: Targets,
    pool_size: int,
) -> tuple[Tensor, Tensor]:
    """ITM loss and accuracy: each pair, each image with a hard negative text, each text with one image: 3 B fusions.

    A negative is drawn with probability proportional to exp(ITC similarity / temperature) within its pool, as in ALBEF,
    which takes the online features' similarity to the teacher's; here both sides are online, so that ITM does not need
    the teacher.

    Args:
        embedded: images from the fusion's `embed_image`, [B, ...].
        text: float [B, L, D] from the fusion's `embed_text`.
    """
    n, size = len(batch), pool_size
    is_positive = pool_positives(batch, size)
    with torch.no_grad():
        images, texts = (feature.view(n // size, size, -1) for feature in features)
        similarity = images @ texts.transpose(1, 2) / temperature  # [pools, S, S]
        noise = batch.itm_noise.view(-1, size, 2, size)
        text_negative, has_text = draw_negatives(similarity, is_positive, noise[:, :, 0])
        image_negative, has_image = draw_negatives(similarity.transpose(1, 2), is_positive, noise[:, :, 1])
    first = torch.arange(0, n, size, device=embedded.device)[:, None]
    text_rows, image_indices = (text_negative + first).flatten(), (image_negative + first).flatten()
    own = torch.arange(n, device=embedded.device)
    text_choice, image_choice = torch.cat([own, text_rows, own]), torch.cat([own, own, image_indices])
    fusion = network.backbone.fusion
    cls = fusion.text_positions(torch.zeros(3 * n, 1, dtype=torch.int64, device=embedded.device))
    words = index_rows(text, text_choice)
    fused = fusion.fuse(embedded, words, batch.is_valid[text_choice], read=cls, image_indices=image_choice)
    assert network.itm is not None
    logits = network.itm(fused[:, 0])
    is_match = torch.arange(3 * n, device=embedded.device) < n
    is_valid = torch.cat([torch.ones_like(own, dtype=torch.bool), has_text.flatten(), has_image.flatten()])
    hits = ((logits.argmax(dim=1) == is_match.long()) & is_valid).sum() / targets.n_itm
    return itm_loss(logits, is_match, is_valid, targets.n_itm), hits
