"""MLIM in the one loop: from pixels and words to PR AUC; resumed, split into micro-batches, evaluated, refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import mamo
from mamo.config.schema import RunConfig
from mamo.config.values import merge, read_values
from mamo.evaluator import evaluate
from mamo.tasks.registry import build_config, build_task, finetune_config, load_config
from mamo.trainer import TrainingRun, train
from mamo.training import run_dir
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of, finetuning_values, write_config

pytestmark = pytest.mark.usefixtures("no_curves")
CONFIGS = Path(__file__).parents[3] / "configs"
TRAINING = {"total_steps": 6, "checkpoint_every_steps": 3, "warmup_steps": 1, "learning_rate": 1e-3}
EVALUATION = {"enabled": True, "probe_items": 12, "batch_size": 5}


def mlim(folder: Path, **over: Any) -> RunConfig:
    """A pre-training of MLIM."""
    sections = {"output_dir": str(folder), "training": TRAINING, "evaluation": EVALUATION}
    return config_of("mlim", **merge(sections, over))


def matching(folder: Path, parent: Path, *overrides: str, is_resume: bool = False) -> RunConfig:
    """Its fine-tuning, as the command makes it."""
    sections = {"output_dir": str(folder), "training": TRAINING, "evaluation": EVALUATION}
    file = write_config(folder.parent / "matching.yaml", finetuning_values("matching", **sections))
    return finetune_config(file, [f"checkpoint={parent}", *overrides], is_resume)


@pytest.fixture(scope="module")
def pretrained_mlim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny MLIM run; not to be written to."""
    import mamo.trainer

    folder = tmp_path_factory.mktemp("mlim") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamo.trainer, "plot_curves", lambda *_: None)
        train(mlim(folder), is_resume=False)
    return folder


class Stop(Exception):
    """An in-process stand-in for a kill."""


def interrupted(config: RunConfig, step: int) -> None:
    """Run `config` until the metrics of `step` are written."""
    write = run_dir.JsonlWriter.write

    def write_or_stop(self: run_dir.JsonlWriter, values: dict[str, Any]) -> None:
        write(self, values)
        if values["step"] == step and self.path.name == run_dir.METRICS:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_dir.JsonlWriter, "write", write_or_stop)
        with pytest.raises(Stop):
            train(config, is_resume=False)


def ends_of(run: Path) -> dict[str, bytes]:
    """What must be bit-identical."""
    last = run / "checkpoints" / "step-0000006"
    files = {name: (last / f"{name}.safetensors").read_bytes() for name in ("student", "optimizer")}
    evaluations = json.loads((run / "results.json").read_text())["evaluations"]
    return {
        **files,
        "metrics": (run / run_dir.METRICS).read_bytes(),
        "numbers": json.dumps([entry["metrics"] for entry in evaluations]).encode(),
    }


def test_a_broken_pretraining_ends_in_the_bits_of_an_unbroken_one(pretrained_mlim: Path, tmp_path: Path) -> None:
    """Bug: masks or dropout drawn from a state that a resume does not restore."""
    interrupted(mlim(tmp_path / "broken"), 4)
    train(mlim(tmp_path / "broken"), is_resume=True)
    whole, broken = ends_of(pretrained_mlim), ends_of(tmp_path / "broken")
    assert [name for name in whole if whole[name] != broken[name]] == []


def test_a_broken_fine_tuning_too_and_it_starts_from_the_checkpoint(pretrained_mlim: Path, tmp_path: Path) -> None:
    """Bug: as above; or a fine-tuning that drops the pre-trained weights, the embedder's depth among them."""
    train(matching(tmp_path / "whole", pretrained_mlim), is_resume=False)
    interrupted(matching(tmp_path / "broken", pretrained_mlim), 4)
    train(matching(tmp_path / "broken", pretrained_mlim, is_resume=True), is_resume=True)
    whole, broken = ends_of(tmp_path / "whole"), ends_of(tmp_path / "broken")
    assert [name for name in whole if whole[name] != broken[name]] == []

    run = TrainingRun(matching(tmp_path / "fresh", pretrained_mlim))
    before = load_file(pretrained_mlim / "checkpoints/last/student.safetensors")
    own = run.task.network.state_dict()
    shared = [name for name in before if name.startswith("backbone.")]
    assert len(shared) > 20
    assert all(torch.equal(own[name], before[name]) for name in shared)
    entry = json.loads((tmp_path / "whole/results.json").read_text())["evaluations"][-1]
    assert entry["protocol"] == "scenes-easy-matching-custom"  # 12 pairs rather than 1,000
    assert {name.removeprefix("matching/pr_auc/") for name in entry["metrics"]} == {
        "both", "image_only", "text_only", "random",
    }  # fmt: skip
    later = evaluate(tmp_path / "whole", "scenes-easy-matching", ["evaluation.probe_items=12"])
    assert later["metrics"] == pytest.approx(entry["metrics"])


def test_pretraining_is_evaluated_on_words_and_pixels(pretrained_mlim: Path) -> None:
    """Bug: a metric that is missing or not a number; an error of reconstruction that beats the data's spread."""
    (entry,) = json.loads((pretrained_mlim / "results.json").read_text())["evaluations"]
    words = {name for name in entry["metrics"] if name.startswith("masked_word/")}
    assert {"masked_word/colour", "masked_word/shape", "masked_word/size"} <= words
    assert all(0 <= entry["metrics"][name] <= 100 for name in words)
    assert 0 < entry["metrics"]["recon/error_of_mean"] < entry["metrics"]["recon/error"] < 300  # untrained: grey
    assert "filled in from what is left" in (pretrained_mlim / "report.html").read_text()


def gradients_of(run: TrainingRun, size: int, folder: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients of one batch in micro-batches of `size`."""
    loop = run.dry_run_loop("fp32", folder)
    loop.micro_batch_size = size
    _, values = loop.backward(run.example_batch(8), 0)
    gradients = {name: p.grad for name, p in run.task.network.named_parameters() if p.grad is not None}
    run.task.network.zero_grad(set_to_none=True)
    return {name: float(value) for name, value in values.items()}, gradients


@pytest.mark.parametrize("kind", ["mlim", "whole image", "matching"])
def test_micro_batches_add_up_and_every_parameter_learns(kind: str, pretrained_mlim: Path, tmp_path: Path) -> None:
    """Bug: a mean over the micro-batch, whose numbers of masked words differ; a head or layer that no loss reaches."""
    area = {"losses": {"recon_area": "image"}} if kind == "whole image" else {}
    config = matching(tmp_path / "run", pretrained_mlim) if kind == "matching" else mlim(tmp_path / "run", **area)
    run = TrainingRun(config)
    run.task.network.eval()  # no dropout
    (losses, gradients), (parts, other) = (gradients_of(run, size, tmp_path) for size in (8, 4))
    assert losses == pytest.approx(parts, rel=1e-4, abs=1e-6)
    assert {name for name, p in run.task.network.named_parameters() if p.requires_grad} == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-3)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


def test_the_losses_are_those_of_a_naive_step(tmp_path: Path) -> None:
    """Bug: labels of other words, pixels of other samples, unmasked input; computed sample by sample here."""
    config = mlim(tmp_path / "run")
    run = TrainingRun(config)
    network = run.task.network.eval()
    batch = run.example_batch(8)
    values = run.dry_run_loop("fp32", tmp_path).backward(batch, 0)[1]
    word_losses, squared, n_pixels = [], 0.0, 0
    for b in range(8):
        ids, n = batch.input_ids[b].clone(), int(batch.is_valid[b].sum())
        ids[batch.is_masked_word[b]] = run.tokenizer.mask_token_id
        image = batch.image[b].float() / 255
        masked = batch.is_masked_patch[b]
        with torch.no_grad():
            tokens = network.backbone(
                (image[None] - 0.5) / 0.5, ids[None, :n], batch.is_valid[b : b + 1, :n], is_masked_patch=masked[None]
            )[0]
            pixels = network.recon(tokens[None, :4])[0]
            for slot in batch.is_masked_word[b].nonzero().flatten().tolist():
                probability = network.mlm(tokens[4 + slot][None]).softmax(dim=1)[0, batch.input_ids[b, slot]]
                word_losses.append(-math.log(float(probability)))
        for patch in masked.nonzero().flatten().tolist():
            rows, columns = slice(8 * (patch // 2), 8 * (patch // 2) + 8), slice(8 * (patch % 2), 8 * (patch % 2) + 8)
            squared += float((pixels[:, rows, columns] - image[:, rows, columns]).square().sum())
            n_pixels += 64
    assert len(word_losses) > 8
    assert float(values["loss/mlm"]) == pytest.approx(sum(word_losses) / len(word_losses), rel=1e-4)
    assert float(values["loss/recon"]) == pytest.approx(squared / n_pixels, rel=1e-4)


def test_modality_dropout_is_read(pretrained_mlim: Path, tmp_path: Path) -> None:
    """Bug: a key that changes nothing."""
    never, always = (
        TrainingRun(matching(tmp_path / name, pretrained_mlim, f"matching.modality_dropout={share}")).example_batch(20)
        for name, share in (("never", 0.0), ("always", 1.0))
    )
    assert torch.equal(never.image, always.image)
    assert (always.has_image.any(dim=1) != always.has_text.any(dim=1)).float().mean() > 0.9
    assert never.has_image.sum() > always.has_image.sum()


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        (
            {"losses": {"weights": {"itc": 1}}},
            "losses.weights.itc: not used by task mlim (only by pretrain, grounding); remove it",
        ),
        ({"losses": {"weights": {"mrm_text": 1}}}, "losses.weights.mrm_text: not used by task mlim"),
        ({"losses": {"queue_size": 8}}, "losses.queue_size: not used by task mlim"),
        ({"teacher": {"momentum": 0.9}}, "teacher: not used by task mlim; remove it"),
        ({"masking": {"mode": "joint"}}, "masking.mode: Input should be 'modality_aware' (found 'joint')"),
        ({"model": {"fusion_layers": 5}}, "model.fusion_layers: not used by task mlim"),
        ({"losses": {"weights": {"mlm": 0, "recon": 0, "itm": 0}}}, "losses.weights: every loss of MLIM is switched"),
        ({"losses": {"itm_pool_size": 5}}, "losses.itm_pool_size: 5 does not divide"),
        ({"data": {"source": "pairs", "train_file": "a", "eval_file": "b"}}, "evaluation.enabled: MLIM's pre-training"),
        ({"data": {"image_size_px": 20}}, None),
    ],
)
def test_what_mlim_does_not_read_is_refused(over: dict[str, Any], problem: str | None, tmp_path: Path) -> None:
    """Bug: MAMO's losses are ignored in silence; one thinks that one has trained with them."""
    with pytest.raises(ValueError) as caught:
        TrainingRun(mlim(tmp_path / "run", **over))
    assert (problem or "data.image_size_px: 20x20 px cannot be halved") in str(caught.value)


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        (
            {"losses": {"weights": {"recon": 1}}},
            "losses.weights.recon: not used by task pretrain (only by mlim); remove it",
        ),
        ({"losses": {"recon_area": "image"}}, "losses.recon_area: not used by task pretrain"),
        ({"masking": {"mode": "modality_aware"}}, "masking.mode: Input should be 'alternate' or 'joint'"),
        ({"masking": {"light_ratio": 0.3}}, "masking.light_ratio: not used by task pretrain"),
        ({"model": {"embedder_layers": 4}}, "model.embedder_layers: not used by task pretrain"),
        ({"matching": {"modality_dropout": 0.0}}, "matching: not used by task pretrain; remove it"),
        ({"task": "matching", "data": {"source": "records"}}, "data.source: records contradicts task matching"),
    ],
)
def test_what_is_mlim_s_is_refused_elsewhere(over: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """Bug: RECON switched on in a MAMO that has no decoder."""
    with pytest.raises(ValueError) as caught:
        build_config({"output_dir": str(tmp_path), **over})
    assert problem in str(caught.value)


def test_the_paper_s_size_on_the_meta_device(tmp_path: Path) -> None:
    """Bug: a config that only exists as text. The BERT-large is counted against Hugging Face's."""
    large = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 30522}
    (tmp_path / "config.json").write_text(json.dumps({**large, "model_type": "bert", "num_hidden_layers": 24}))
    values = merge(read_values(CONFIGS / "pretrain/mlim_paper.yaml"), {"model": {"text": {"weights": "random"}}})
    values["model"]["text"]["bert"] = str(tmp_path)
    with torch.device("meta"):
        network = build_task(build_config(values), scenes_tokenizer()).network
        bert = BertModel(BertConfig(**large, num_hidden_layers=24), add_pooling_layer=False)
    assert all(parameter.is_meta for parameter in network.parameters())
    stream = network.backbone
    assert stream.embedder.grid == (3, 3)
    own, theirs = (sum(p.numel() for p in module.parameters()) for module in (stream.text_encoder, bert))
    assert own == theirs
    assert network.get_head("itm") is None
    assert len(network.recon.layers) == 10


@pytest.mark.parametrize("name", ["pretrain/mlim_scenes", "finetune/closely_matching_scenes"])
def test_the_shipped_configs_take_a_step(name: str, pretrained_mlim: Path, tmp_path: Path) -> None:
    """Bug: a recipe whose parts do not fit together."""
    overrides = [
        f"output_dir={tmp_path / 'run'}", "data.image_size_px=16", "data.workers=0", "training.batch_size_global=8",
        "training.precision=fp32", "training.device=cpu",
    ]  # fmt: skip
    path = CONFIGS / f"{name}.yaml"
    if name.startswith("pretrain"):
        config = load_config(path, [*overrides, "losses.itm_pool_size=4"])
    else:
        config = finetune_config(path, [*overrides, f"checkpoint={pretrained_mlim}"], is_resume=False)
    run = TrainingRun(config)
    loop = run.dry_run_loop("fp32", tmp_path)
    values = loop.read(loop.step(run.example_batch(8), 1))
    assert all(math.isfinite(value) for value in values.values())


def test_a_checkpoint_of_mlim_says_that_it_is_no_mamo(pretrained_mlim: Path, fails: Callable[..., str]) -> None:
    """Bug: `AttributeError: 'Mlim' object has no attribute 'temperature'`."""
    message = fails(lambda: mamo.load(pretrained_mlim))
    assert "is an MLIM (task mlim)" in message
