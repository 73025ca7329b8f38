"""A pre-training run from its config to `results.json`."""

import hashlib
import json
import logging
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from mamo.config import Config, dump
from mamo.data.collate import PairBatch, PairCollator
from mamo.data.images import BadSamplePolicy
from mamo.data.loader import PairSource, collate_range, make_loader
from mamo.data.pairs import PairDataset
from mamo.data.sampler import StepSampler
from mamo.data.tokenizer import load_tokenizer
from mamo.tasks.build import build_collator, build_network, build_train_source
from mamo.tasks.pretrain import PixelNorm, PretrainTask
from mamo.training import checkpoint, run_folder
from mamo.training.alarms import ITM_CLASS_PRIOR, Alarms, unigram_entropy
from mamo.training.curves import draw_curves
from mamo.training.distributed import rank, world_size
from mamo.training.loop import Loop
from mamo.training.optim import make_optimizer
from mamo.training.precision import choose_device, choose_precision
from mamo.training.resume import resumed_config

logger = logging.getLogger(__name__)

ENTROPY_SAMPLES = 512


class Run:
    """Everything built from one config: data, task, optimizer, loop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.device = choose_device(config.training.device)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.source: PairSource = build_train_source(config)
        network = build_network(config, len(self.tokenizer), self.tokenizer.pad_token_id)
        encoder = network.backbone.image_encoder
        self.collator: PairCollator = build_collator(config, self.tokenizer, encoder.grid)
        self.normalise = PixelNorm(encoder.mean, encoder.std, self.device)
        self.task = PretrainTask(config, network, self.normalise)
        for module in self.task.modules().values():
            module.to(self.device)
        if config.checkpoint is not None:
            self.start_from(Path(config.checkpoint))
        self.optimizer = make_optimizer(self.task.network, config.training)
        self.bad_samples = BadSamplePolicy(config.data.bad_samples.policy, config.data.bad_samples.budget)

    def start_from(self, path: Path) -> None:
        """Take student and teacher weights from another run's checkpoint."""
        folder = checkpoint.resolve(path)
        checkpoint.load_module(folder, "student", self.task.network)
        checkpoint.load_module(folder, "teacher", self.task.teacher)

    def batches(self, start_step: int) -> Iterable[PairBatch]:
        """The training batches from `start_step` on."""
        training = self.config.training
        sampler = StepSampler(
            len(self.source),
            training.batch_size_global,
            self.config.seed,
            start_step,
            training.total_steps,
            rank(),
            world_size(),
        )
        loader = make_loader(
            self.source, self.collator, sampler, self.config.data.workers, self.device.type == "cuda"
        )
        return loader

    def example_batch(self, size: int) -> PairBatch:
        """The first `size` samples, for timing and counting."""
        indices = [i % len(self.source) for i in range(size)]
        return collate_range(self.source, self.collator, indices)

    def baselines(self) -> dict[str, float]:
        """What each loss is worth to a model that has learned nothing."""
        batch = self.example_batch(min(ENTROPY_SAMPLES, len(self.source)))
        counts = Counter(batch.input_ids[batch.is_valid].tolist())
        for token in self.tokenizer.all_special_ids:
            counts.pop(token, None)
        candidates = self.config.training.batch_size_global + self.config.losses.queue_size
        return {
            "loss/itm": ITM_CLASS_PRIOR,
            "loss/mlm": unigram_entropy(counts),
            "loss/itc": float(torch.tensor(float(candidates)).log()),
        }

    def loop(self, trackers: list[run_folder.Tracker]) -> Loop:
        """The training loop of this run."""
        files = {"config.yaml": self.output_dir / run_folder.CONFIG, "tokenizer": self.output_dir / "tokenizer"}
        state = {
            "data_fingerprint": fingerprint(self.config, self.source),
            "versions": versions(),
            "parent": self.config.checkpoint,
        }
        return Loop(
            self.config,
            self.task,
            self.optimizer,
            self.device,
            self.output_dir,
            trackers,
            state,
            files,
            Alarms(self.baselines()),
            self.bad_samples,
        )


def pretrain(config: Config, is_resume: bool) -> None:
    """Train, evaluate and write everything into `output_dir`.

    Raises:
        ValueError: a mistake in the config, the data or the checkpoint; nothing of an earlier run is touched.
    """
    output_dir = Path(config.output_dir)
    if is_resume:
        config = resumed_config(config, output_dir / run_folder.CONFIG)
        run = Run(config)
    else:
        run = Run(config)
        run_folder.claim(output_dir)
        if config.training.precision == "auto" or config.training.device == "auto":
            run = _resolve_auto(run)
        dump(run.config, output_dir / run_folder.CONFIG)
        run.tokenizer.save_pretrained(output_dir / "tokenizer")
    start_step = 0
    if is_resume and checkpoint.step_folders(output_dir):
        start_step = restore(run)
    for name in (run_folder.METRICS, run_folder.TIMING):
        run_folder.cut_back(output_dir / name, start_step)
    kept = [entry for entry in run_folder.read_evaluations(output_dir) if entry["step"] <= start_step]
    if is_resume:
        run_folder.write_evaluations(output_dir, kept)
    trackers: list[run_folder.Tracker] = [
        run_folder.TensorBoardTracker(output_dir / "tensorboard", start_step + 1)
    ]
    loop = run.loop(trackers)
    total = config.training.total_steps
    try:
        if start_step < total:
            loop.run(run.batches(start_step), start_step, evaluator(run, loop))
        if config.evaluation.enabled and not any(entry["step"] == total for entry in kept):
            evaluator(run, loop)(total)
    finally:
        for tracker in trackers:
            tracker.close()
        if (output_dir / run_folder.METRICS).exists():
            draw_curves(output_dir)


def restore(run: Run) -> int:
    """Load the last good checkpoint; returns the number of optimizer steps it stands after."""
    folder = checkpoint.last_good(run.output_dir)
    state = json.loads((folder / "state.json").read_text())
    found = fingerprint(run.config, run.source)
    if state["data_fingerprint"] != found:
        raise ValueError(
            f"{folder}: the training data changed since this checkpoint (fingerprint {state['data_fingerprint']}, "
            f"now {found}); restore the data, or start a new run with checkpoint={folder}"
        )
    for name, module in run.task.modules().items():
        checkpoint.load_module(folder, name, module)
    tensors = checkpoint.read_tensors(folder, "optimizer")
    checkpoint.load_optimizer_tensors(run.optimizer, run.task.network, tensors)
    run.bad_samples.seen, run.bad_samples.skipped = state["samples_seen"], state["samples_skipped"]
    logger.info("resuming after step %d from %s", state["step"], folder)
    step: int = state["step"]
    return step


def evaluator(run: Run, loop: Loop) -> Any:
    """A function that evaluates after a step and appends the result to `results.json`."""

    def evaluate(step: int) -> None:
        from mamo.evaluation.zero_shot import zero_shot
        with loop.autocast():
            metrics = zero_shot(run.task.network, run.config, run.tokenizer, run.normalise, run.device)
        data = run.config.data
        entry = {
            "protocol": f"scenes-{data.difficulty}-zeroshot" if data.source == "scenes" else "pairs-zeroshot",
            "split": "test" if data.source == "scenes" else (data.eval_split or "all"),
            "checkpoint": str(checkpoint.step_folder(Path("."), step)),
            "step": step,
            "seed": run.config.seed,
            "rerank_k": run.config.evaluation.rerank_k,
            "image_size_px": list(data.image_size),
            "versions": versions(),
            "metrics": metrics,
        }
        evaluations = [e for e in run_folder.read_evaluations(run.output_dir) if e["step"] < step]
        run_folder.write_evaluations(run.output_dir, [*evaluations, entry])
        for tracker in loop.trackers:
            tracker.log(step, {f"evaluation/{name}": value for name, value in metrics.items()})
        shown = {name: value for name, value in metrics.items() if name.endswith(("_r1", "/itm")) or "word" in name}
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.1f}" for name, value in shown.items()))

    return evaluate


def _resolve_auto(run: Run) -> Run:
    """Replace `auto` by what this machine offers and what a few timed steps prefer."""
    values = run.config.model_dump()
    values["training"]["device"] = run.device.type
    if run.config.training.precision == "auto":
        batch = run.example_batch(run.config.training.batch_size_global).to(run.device)

        def run_step(precision: Literal["fp32", "bf16"]) -> None:
            trial = run.config.training.model_copy(update={"precision": precision})
            loop = Loop(
                run.config.model_copy(update={"training": trial}),
                run.task,
                run.optimizer,
                run.device,
                run.output_dir,
                [],
                {},
                {},
                Alarms({}),
                run.bad_samples,
            )
            loop.backward(batch, 0)
            run.task.network.zero_grad(set_to_none=True)
            if run.device.type == "cuda":
                torch.cuda.synchronize()

        values["training"]["precision"] = choose_precision(run_step)
    return Run(Config.model_validate(values))


def fingerprint(config: Config, source: PairSource) -> str:
    """16 hex digits that change with the training data: the records of files, or the parameters of the world."""
    digest = hashlib.sha256()
    if isinstance(source, PairDataset):
        for record in source.records:
            digest.update(f"{record.image}\t{record.image_id}\t{record.captions}\n".encode())
    else:
        digest.update(f"scenes {config.data.difficulty} {config.data.train_scenes} {config.data.image_size}".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    names = ("mamo", "torch", "torchvision", "timm", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
