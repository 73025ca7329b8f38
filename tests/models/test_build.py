"""Networks built from a config: what the config says reaches the parts that must know it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from mamo.models.build import build_backbone, position_resamplers
from mamo.models.vlm import Network
from mamo.trainer import TrainingRun
from mamo.training.checkpoint import load_transfer
from tests.tiny import config_of

MLM_ONLY = {"itc": 0.0, "itm": 0.0, "mim": 0.0, "mrm_image": 0.0, "mrm_text": 0.0}


@pytest.mark.parametrize(("mode", "is_trained"), [("joint", True), ("alternate", False)])
def test_mask_token_is_trained_where_a_loss_reaches_it(tiny: Callable[..., Any], mode: str, is_trained: bool) -> None:
    """Bug: MLM reads masked patches under joint masking, whose token stays at its random start."""
    run = TrainingRun(tiny(masking={"mode": mode}, losses={"weights": MLM_ONLY, "queue_size": 0}))
    assert run.task.network.backbone.fusion.mask_token.requires_grad == is_trained


GRIDS = st.sampled_from([(4, 9), (6, 6), (9, 4), (12, 3), (2, 18), (3, 3), (2, 3), (3, 2), (5, 4)])


@settings(deadline=None, max_examples=20)
@given(old=GRIDS, new=GRIDS)
def test_positions_of_a_checkpoint_follow_the_grid(
    old: tuple[int, int], new: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bug: two grids of equally many patches, as 4 x 9 and 6 x 6, pass for one, in the encoder or in the fusion."""
    sizes = [[8 * rows, 8 * columns] for rows, columns in (old, new)]
    saved, again = (Network(build_backbone(config_of(data={"image_size_px": size}), 60, 0), {}) for size in sizes)
    folder = tmp_path_factory.mktemp("checkpoint")
    stored = {name: torch.randn_like(value) for name, value in saved.state_dict().items()}
    save_file(stored, folder / "student.safetensors")
    report = load_transfer(folder, "student", again, "backbone.", position_resamplers(again, tuple(sizes[0])))
    names = {"backbone.image_encoder.vit.pos_embed", "backbone.fusion.image_position"}
    assert set(report.interpolated) == (set() if old == new else names)
    for name in names:
        expected = stored[name] if old == new else resample_abs_pos_embed(stored[name], list(new), list(old))
        assert torch.equal(again.state_dict()[name], expected)
