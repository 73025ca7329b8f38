"""A small residual network for little data, trained from random weights.

Its kernels are stored as matrices [out, in * 9], so that Muon orthogonalises their steps as it does a transformer's.

Legend: B batch, H and W height and width in pixels, P patches in a grid [h, w], C channels, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional

from mamo.models.image_encoder import check_image_size
from mamo.models.towers import ImageTower, paint_masked

_GROUPS = 8
"""Of each group norm: a batch norm would make a sample depend on the others of its batch."""


class MatrixConv2d(nn.Linear):
    """A convolution without bias whose kernel is a matrix ``weight`` float [C_out, C_in * side * side]."""

    def __init__(self, n_in: int, n_out: int, side_px: int, stride: int = 1) -> None:
        """Build it with He's weights (He et al. 2015): a standard deviation of sqrt(2 / (C_in * side * side))."""
        super().__init__(n_in * side_px * side_px, n_out, bias=False)
        self.kernel_shape, self.stride = (n_out, n_in, side_px, side_px), stride
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        """Convolve float [B, C_in, H, W], with zeros around it."""
        kernel = self.weight.view(self.kernel_shape)
        return functional.conv2d(input, kernel, stride=self.stride, padding=self.kernel_shape[-1] // 2)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016), with group norms (Wu and He 2018)."""

    def __init__(self, n_in: int, n_out: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.first = MatrixConv2d(n_in, n_out, 3, stride)
        self.first_norm = nn.GroupNorm(_GROUPS, n_out)
        self.second = MatrixConv2d(n_out, n_out, 3)
        self.second_norm = nn.GroupNorm(_GROUPS, n_out)
        is_same = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if is_same else MatrixConv2d(n_in, n_out, 1, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute float [B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        branch = functional.relu(self.first_norm(self.first(hidden)))
        branch = self.drop_path(self.second_norm(self.second(branch)))
        return functional.relu(self.shortcut(hidden) + branch)


class ResidualTower(ImageTower):
    """An image encoder of residual blocks; `model.image.name: mamo.models.residual_tower:ResidualTower`.

    The stem halves the image, and so does each stage; each stage but the first doubles the channels. The features of
    the last stage are the patches, whose side is a power of 2. There is no class token. Masked patches are painted with
    a learned colour before the first layer, as :class:`StageEncoder` does.
    """

    def __init__(self, config: Any, image_size_px: tuple[int, int], settings: None = None) -> None:
        """Build the network with random weights.

        Args:
            config: `model.image`: `patch_size_px`, 4 or more; `width` of the last stage; `depth`, the blocks of all
                stages, spread evenly, the last stages one more where they do not divide; `drop_path` of the last block,
                that of earlier ones grows from 0.
            image_size_px: height and width.
            settings: none.

        Raises:
            ValueError: names the key whose value does not fit.
        """
        for key in ("patch_size_px", "width", "depth"):
            if getattr(config, key) is None:
                raise ValueError(f"model.image.{key}: is null, and {config.name} has no size of its own; set it")
        side = config.patch_size_px
        n_stages = side.bit_length() - 2
        if side < 4 or side & (side - 1):
            raise ValueError(f"model.image.patch_size_px: {side} is no power of 2 from 4 on, to which stages halve")
        least = _GROUPS << (n_stages - 1)
        if config.width % least:
            raise ValueError(f"model.image.width: {config.width} is no multiple of {least}, for {n_stages} stages")
        if config.depth < n_stages:
            raise ValueError(f"model.image.depth: {config.depth} is less than one block in each of {n_stages} stages")
        if config.dropout:
            raise ValueError("model.image.dropout: convolutions use model.image.drop_path; use 0")
        check_image_size(config.name, image_size_px, side)
        super().__init__(
            width=config.width,
            grid=(image_size_px[0] // side, image_size_px[1] // side),
            patch_size_px=(side, side),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
        widths = [config.width >> (n_stages - 1 - stage) for stage in range(n_stages)]
        base, extra = divmod(config.depth, n_stages)
        depths = [base + (stage >= n_stages - extra) for stage in range(n_stages)]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.GroupNorm(_GROUPS, widths[0]), nn.ReLU()
        )
        blocks: list[ResidualBlock] = []
        n_in = widths[0]
        for width, depth in zip(widths, depths, strict=True):
            for number in range(depth):
                drop_path = config.drop_path * len(blocks) / max(1, config.depth - 1)
                blocks.append(ResidualBlock(n_in, width, 1 if number else 2, drop_path))
                n_in = width
        self.blocks = nn.ModuleList(blocks)
        self.mask_colour = nn.Parameter(torch.zeros(3))

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Return the residual blocks."""
        return list(self.blocks)

    def embed(self, image: Tensor) -> Tensor:
        """Return the normalised image float [B, 3, H, W]: masked patches are painted before the first layer."""
        return self.normalize(image).to(self.mask_colour.dtype)

    def encode(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode images, or their visible patches, as the class describes; see `ImageTower.encode`."""
        if visible is not None:
            embedded = paint_masked(embedded, visible, self.grid, self.mask_colour)
        hidden = self.stem(embedded)
        for block in self.blocks:
            hidden = block(hidden)
        tokens: Tensor = hidden.flatten(2).transpose(1, 2)  # [B, P, D]
        return tokens if visible is None else tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.width))
