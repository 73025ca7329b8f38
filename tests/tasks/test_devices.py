"""Steps and evaluations on a pretended GPU: no mixed devices, no wait for the GPU in a step, few shapes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mamo.losses.rows
from mamo.data.pairs import Sample
from mamo.tasks.pretrain.losses import Mlm
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import build_task
from mamo.trainer import TrainingRun
from mamo.world.vocabulary import scenes_tokenizer
from tests.pretend_gpu import MixedDevicesError, PretendGpu
from tests.tiny import config_of

DISTILLED = {"mlm_soft_target_alpha": 0.4, "itc_soft_target_alpha": 0.4}
CROSS = {"model": {"fusion_type": "cross"}, "losses": {"weights": {"mim": 0, "mrm_image": 0}, **DISTILLED}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "alternate": ("pretrain", {}),
    "joint": ("pretrain", {"masking": {"mode": "joint"}}),
    "cross": ("pretrain", CROSS),
    "grounding": ("grounding", {}),
    "decoder": ("vqa", {}),
    "classifier": ("vqa", {"vqa": {"head": "classifier"}}),
    "reasoning": ("reasoning", {}),
    "mlim": ("mlim", {}),
    "matching": ("matching", {}),
}
EVALUATION = {"probe_items": 4, "batch_size": 4, "rerank_k": 2, "grounding_heat": "image_encoder"}


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute masked words and read the numbers of a step as on a GPU."""
    for module in ("guard", "parallel"):
        monkeypatch.setattr(f"mamo.training.{module}.reads_late", lambda device: True)
    for module in ("mamo.losses.rows", "mamo.tasks.pretrain.views"):
        monkeypatch.setattr(f"{module}.has_fixed_rows", lambda device: True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_and_mixes_no_devices(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a tensor made on the host meets the network's, or the host reads a value in the middle of a step."""
    as_on_a_gpu(monkeypatch)
    task, sections = KINDS[kind]
    config = config_of(task, output_dir=str(tmp_path / "run"), **{**sections, "evaluation": EVALUATION})
    with PretendGpu() as gpu:
        run = TrainingRun(config)
        run.task.network.train()
        loop, batch = run.dry_run_loop("fp32", tmp_path), run.example_batch(8).to(run.device)
        gpu.waits.clear()
        loop.read(loop.step(batch, 0))  # the read waits for an event, after the next step is issued
        assert gpu.waits == []
        if kind not in ("joint", "cross"):  # their evaluation is that of `alternate`, which takes seconds
            run.task.network.eval()
            run.task.evaluate(run.predictor, tmp_path)


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the pretended GPU sees nothing, so that the test above passes whatever a step does."""
    as_on_a_gpu(monkeypatch)
    with PretendGpu() as gpu:
        run = TrainingRun(config_of(output_dir=str(tmp_path)))
        loop, batch = run.dry_run_loop("fp32", tmp_path), run.example_batch(8).to(run.device)
        gpu.waits.clear()
        plain = Mlm.__call__

        def reading(self: Mlm, network: Any, part: Any, n_global: Tensor, fixed: Any) -> Any:
            if part.batch.input_ids.sum() > 0:
                return plain(self, network, part, n_global, fixed)
            raise AssertionError

        monkeypatch.setattr(Mlm, "__call__", reading)
        loop.step(batch, 0)
        assert [operation for *_, operation in gpu.waits] == ["__bool__"]

        def mixing(self: Mlm, network: Any, part: Any, n_global: Tensor, fixed: Any) -> Any:
            loss, metrics = plain(self, network, part, n_global, fixed)
            return loss + (part.batch.input_ids * torch.arange(part.batch.input_ids.shape[1])).sum(), metrics

        monkeypatch.setattr(Mlm, "__call__", mixing)
        with pytest.raises(MixedDevicesError, match=r"mamo/tasks/objective\.py:\d+: mul of a host tensor"):
            loop.step(batch, 0)


@pytest.mark.parametrize("kind", ["alternate", "joint", "cross", "mlim"])
def test_fixed_rows_give_the_same_losses_and_gradients(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a slot without a masked word counts, in the loss, the metrics or the teacher's probabilities."""
    task, sections = KINDS[kind]
    run = TrainingRun(config_of(task, output_dir=str(tmp_path / "run"), **sections))
    run.task.network.eval()  # no dropout
    loop, batch = run.dry_run_loop("fp32", tmp_path), run.example_batch(8)
    found = []
    for is_fixed in (False, True):
        if is_fixed:
            as_on_a_gpu(monkeypatch)
        _, values = loop.backward(batch, 0)
        gradients = {n: p.grad for n, p in run.task.network.named_parameters() if p.grad is not None}
        run.task.network.zero_grad(set_to_none=True)
        found.append((values, gradients))
    (values, gradients), (others, more) = found
    torch.testing.assert_close(others, values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(more, gradients, atol=1e-6, rtol=1e-4)


def test_padded_captions_give_the_same_losses(tmp_path: Path) -> None:
    """Bug: padding to a multiple changes which words are masked, or a padded token takes part."""
    run = TrainingRun(config_of(output_dir=str(tmp_path / "run")))
    run.task.network.eval()
    loop = run.dry_run_loop("fp32", tmp_path)
    plain = run.example_batch(8)
    run.task.fix_shapes()
    padded = run.example_batch(8)
    assert padded.is_valid.shape[1] % 8 == 0 or padded.is_valid.shape[1] == run.config.data.text_max_tokens
    assert padded.is_valid.shape[1] > plain.is_valid.shape[1]
    torch.testing.assert_close(loop.backward(padded, 0)[1], loop.backward(plain, 0)[1], atol=1e-6, rtol=1e-5)


def test_captions_of_varied_lengths_have_few_shapes() -> None:
    """Bug: `torch.compile` sees another shape in every batch."""
    config = config_of(data={"text_max_tokens": 64})
    task = build_task(config, scenes_tokenizer())
    assert isinstance(task, PretrainTask)
    task.fix_shapes()
    rng, shapes = np.random.default_rng(0), set()
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    for _ in range(2000):
        lengths = np.clip(rng.gamma(18, 10.5 / 18, size=4).round(), 5, 50).astype(int)  # as COCO's: mean 10.5 words
        lengths[0] = max(lengths[0], int(rng.geometric(0.1)) + 8)
        samples = [
            Sample(image, " ".join(["red"] * n), image_id=i, caption_id=i, sample_id=i, skipped=())
            for i, n in enumerate(lengths)
        ]
        batch = task.collator([(0, sample) for sample in samples])
        shapes.add((batch.input_ids.shape, batch.text_slots.shape))
    assert len(shapes) <= 8
    assert mamo.losses.rows.has_fixed_rows(torch.device("cuda"))
