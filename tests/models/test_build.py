"""Networks built from a config: what the config says reaches the parts that must know it."""

from collections.abc import Callable
from typing import Any

import pytest

from mamo.trainer import TrainingRun

MLM_ONLY = {"itc": 0.0, "itm": 0.0, "mim": 0.0, "mrm_image": 0.0, "mrm_text": 0.0}


@pytest.mark.parametrize(("mode", "is_trained"), [("joint", True), ("alternate", False)])
def test_mask_token_is_trained_where_a_loss_reaches_it(tiny: Callable[..., Any], mode: str, is_trained: bool) -> None:
    """Bug: MLM reads masked patches under joint masking, whose token stays at its random start."""
    run = TrainingRun(tiny(masking={"mode": mode}, losses={"weights": MLM_ONLY, "queue_size": 0}))
    assert run.task.network.backbone.fusion.mask_token.requires_grad == is_trained
