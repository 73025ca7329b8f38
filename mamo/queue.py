"""Ring buffer of teacher features of past samples, as further ITC candidates."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class FeatureQueue(nn.Module):
    """Queue of the last `size` (image feature, text feature, image id, caption ids) tuples, oldest overwritten first.

    Any number of samples may be pushed at once; `size` need not be a multiple of it. The state is in buffers, so that a
    checkpoint holds it. `is_filled` marks the rows that hold a sample. `caption_id` is int64 [size], or with several
    caption ids a sample (`widen`) [size, C].
    """

    image_feature: Tensor
    text_feature: Tensor
    image_id: Tensor
    caption_id: Tensor
    position: Tensor
    filled: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image_feature", torch.zeros(size, width))
        self.register_buffer("text_feature", torch.zeros(size, width))
        self.register_buffer("image_id", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("caption_id", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def widen(self, n_caption_ids: int) -> None:
        """Hold several caption ids a sample. A sample that is there repeats its own."""
        if n_caption_ids > 1 and self.caption_id.ndim == 1:
            self.caption_id = self.caption_id[:, None].repeat(1, n_caption_ids)

    def widened(self, caption_id: Tensor) -> Tensor:
        """Return stored caption ids in the shape of this queue's; earlier versions stored one a sample."""
        return caption_id if caption_id.ndim == self.caption_id.ndim else caption_id[:, None].expand_as(self.caption_id)

    def caption_ids(self) -> Tensor:
        """Return int64 [size, C]."""
        return self.caption_id[:, None] if self.caption_id.ndim == 1 else self.caption_id

    @torch.no_grad()
    def push(self, image_feature: Tensor, text_feature: Tensor, image_id: Tensor, caption_id: Tensor) -> None:
        """Append [N, D] features, [N] image ids and [N] or [N, C] caption ids of one global batch.

        Of more than `size` samples only the last ones are kept.
        """
        if self.size == 0:
            return
        n = image_feature.shape[0]
        pushed = min(n, self.size)
        start = self.position + (n - pushed)
        rows = (start + torch.arange(pushed, device=self.position.device)) % self.size
        self.image_feature[rows] = image_feature[n - pushed :].to(self.image_feature.dtype)
        self.text_feature[rows] = text_feature[n - pushed :].to(self.text_feature.dtype)
        self.image_id[rows] = image_id[n - pushed :]
        self.caption_id[rows] = caption_id[n - pushed :].view(pushed, *self.caption_id.shape[1:])
        self.position.add_(n).remainder_(self.size)
        self.filled.add_(n).clamp_(max=self.size)

    @torch.no_grad()
    def fill_at_random(self, seed: int) -> None:
        """Fill every row with random unit vectors of no sample: as a start, they are negatives of all (ALBEF)."""
        generator = torch.Generator().manual_seed(seed)
        for feature in (self.image_feature, self.text_feature):
            drawn = torch.randn(feature.shape, generator=generator)
            feature.copy_(functional.normalize(drawn, dim=1))
        self.filled.fill_(self.size)

    def is_filled(self) -> Tensor:
        """Return bool [size], True at rows that hold a sample."""
        return torch.arange(self.size, device=self.filled.device) < self.filled
