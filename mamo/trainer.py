"""A training run from its config to `results.json`."""

import contextlib
import copy
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mamo.config.conventions import ALBEF, conventions_of, with_conventions
from mamo.config.schema import RunConfig
from mamo.config.values import Values, flatten, read_values
from mamo.data.collate import Batch
from mamo.data.images import BadSamplePolicy
from mamo.data.loader import count_workers, iterate, load_range, loader_errors, make_loader
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import MAX_CAPTION_CHARS
from mamo.data.processor import Processor, has_sep
from mamo.data.sampler import OneSourceSampler, StepSampler
from mamo.data.tokenizer import read_tokenizer, unknown_share
from mamo.distributed import (
    RankLostError,
    all_gather_object,
    detect_lost_ranks,
    process_group,
    rank,
    run_on_all_ranks,
    world_size,
)
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.protocols import EVALUATION_KEYS, protocol_of
from mamo.evaluation.results import Metrics, facts_line, facts_of, machine, remarks, result_entry, summary, versions
from mamo.models.build import position_resamplers
from mamo.models.convert_albef import load_albef
from mamo.models.image_encoder import choose_attention
from mamo.queue import FeatureQueue
from mamo.reports.card import model_card, seen_line
from mamo.reports.curves import plot_curves
from mamo.reports.page import write_report
from mamo.reports.pictures import SHOWN
from mamo.tasks.registry import build_config, build_task, load_config, load_stored_config
from mamo.tasks.restore import without_published
from mamo.tasks.sources import refuse_training_files, tokenizer_of
from mamo.teacher import Teacher
from mamo.training import checkpoint, run_dir
from mamo.training.freezing import freeze_unused_parameters
from mamo.training.lock import RunLock
from mamo.training.loop import Evaluate, Loop
from mamo.training.memory import memory_errors
from mamo.training.monitors import LossMonitor
from mamo.training.optim import make_optimizer
from mamo.training.parallel import apply_compile_and_checkpointing, local_batch_sizes
from mamo.training.parts import freeze_parts, learning_rate_scales
from mamo.training.precision import (
    LossScale,
    Precision,
    choose_device,
    choose_precision,
    deterministic_operations,
)
from mamo.training.resume import (
    check_architecture,
    read_lineage,
    resumed_config,
    trained_data,
    warn_if_not_bit_identical,
)
from mamo.training.trackers import check_named_trackers, open_trackers

logger = logging.getLogger(__name__)

EXAMPLES = 512
"""Samples from which the baselines of the losses are counted."""
SHAPE_RESULTS = (
    "data.eval_file",
    "data.eval_split",
    "data.eval_caption_keys",
    "data.statements_file",
    *(key for key in EVALUATION_KEYS if key != "evaluation.batch_size"),
)
"""Keys that may change at a resume and change the results."""
UNKNOWN_SHARE = 0.01
"""Share of [UNK] among the words from which on a run warns."""


class TrainingRun:
    """Everything built from one config: data, task, optimizer, loop."""

    def __init__(self, config: RunConfig, is_resume: bool = False) -> None:
        """Build it; with `is_resume` weights and tokenizer are the run's own: where they came from may be gone."""
        self.config = config = config if is_resume else adopt_conventions(config)
        self.output_dir = Path(config.output_dir)
        self.device = choose_device(config.training.device)
        self.tokenizer = (
            read_tokenizer(str(self.output_dir / "tokenizer"), has_sep(config)) if is_resume else tokenizer_of(config)
        )
        stored = self.output_dir if is_resume else None
        if config.checkpoint is not None and not config.from_scratch and not is_resume:
            source = Path(config.checkpoint)
            stored = source if source.is_file() else checkpoint.resolve(source)  # a file is ALBEF's
        built = config if stored is None else without_published(config, stored)
        self.task = build_task(built, self.tokenizer, self.output_dir if is_resume else None)
        if self.device.type == "cuda":
            self.task.fix_shapes()
        self.source = self.task.train_dataset()
        self.ancestry: list[Values] = []
        self.collator = self.task.collator
        for module in self.task.modules().values():
            module.to(self.device)
        choose_attention(self.task.network, self.device, config.training.precision)
        if config.checkpoint is not None and not is_resume:
            self.load_pretrained(Path(config.checkpoint))
        frozen = freeze_parts(self.task, config.training.parts)
        if frozen:
            self.task.share_frozen(frozen)
        self.parameter_counts = freeze_unused_parameters(
            self.task, self.example_batch(max(2, self.task.unit)).to(self.device)
        )
        apply_compile_and_checkpointing(config.training, self.task.modules())
        scales = learning_rate_scales(self.task, config.training.parts)
        self.optimizer = make_optimizer(self.task.network, config.training, scales)
        self.bad_samples = BadSamplePolicy(config.data.bad_samples.policy, config.data.bad_samples.budget)
        self.loss_scale: dict[str, Any] | None = None
        """Of the checkpoint that the run resumes from: arguments of `LossScale`."""

    @property
    def predictor(self) -> Predictor:
        """The network in training with its processor."""
        return Predictor(self.task.network, Processor.of(self.tokenizer, self.config), self.device)

    def load_pretrained(self, path: Path) -> None:
        """Take student and teacher weights from another run's checkpoint (none with `from_scratch`), or ALBEF's file.

        Heads that this run's task does not use stay behind, those it adds start anew, and positions are resampled to
        this run's grid of patches; the log says which. A teacher that the checkpoint lacks starts as the student.

        Raises:
            CheckpointError: missing, damaged, of another architecture or with another vocabulary.
            ValueError: an ALBEF file of another layout or other sizes.
        """
        if path.is_file():
            teacher = self.task.modules().get("teacher")
            if not isinstance(teacher, Teacher) or self.config.from_scratch:
                raise ValueError(
                    f"checkpoint: {path} is a file of weights, which can start tasks pretrain and grounding, not "
                    "from_scratch; give another task the folder of such a run"
                )
            logger.info("%s: %s", path, load_albef(path, self.task.network, teacher.backbone, teacher.mlm))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            self.ancestry = [{"checkpoint": str(path), "step": 0, "data_fingerprint": f"unknown; file {digest}"}]
            return
        folder = checkpoint.resolve(path)
        if read_tokenizer(str(folder / "tokenizer")).get_vocab() != self.tokenizer.get_vocab():
            raise checkpoint.CheckpointError(
                f"{folder} was trained with another vocabulary; set data.tokenizer={folder / 'tokenizer'}"
            )
        if self.config.from_scratch:
            logger.info("from_scratch: architecture, vocabulary and sizes of %s, none of its weights", folder)
            return
        old = load_stored_config(folder)
        check_architecture(self.config, old, folder)
        old_size = old.data.image_size
        modules = self.task.modules()
        resamplers = position_resamplers(modules["student"], old_size)
        report = checkpoint.load_transfer(folder, "student", modules["student"], "backbone.", resamplers)
        logger.info("student from %s: %s", folder, report)
        self.task.init_new_parameters(folder, report.new)
        teacher = modules.get("teacher")
        if isinstance(teacher, Teacher):
            if (folder / "teacher.safetensors").is_file():
                resamplers = position_resamplers(teacher, old_size)
                report = checkpoint.load_transfer(folder, "teacher", teacher, "module.", resamplers)
                logger.info("teacher from %s: %s", folder, report)
                if "mlm.dense.weight" in report.new:
                    teacher.copy_head(self.task.network.mlm)  # that run's MLM was not distilled
            else:
                teacher.update(self.task.network.backbone, 0.0, self.task.network.get_head("mlm"))
                logger.info("teacher: a copy of the student, %s has none", folder)
        self.ancestry = read_lineage(folder)

    def batches(self, start_step: int, workers: int) -> Iterator[Batch]:
        """Return the training batches from `start_step` on, loaded by this many processes (0: by this one).

        This process loads the first one while the others start.
        """
        total, is_cuda = self.config.training.total_steps, self.device.type == "cuda"
        end = min(start_step + 1, total) if workers else start_step
        first = make_loader(self.source, self.collator, self.sampler(start_step, end), 0, is_cuda)
        yield from iterate(make_loader(self.source, self.collator, self.sampler(end, total), workers, is_cuda), first)

    def sampler(self, start_step: int, end_step: int) -> StepSampler:
        """Return the order of this process's samples in these steps, the last one left out."""
        steps = (self.config.training.batch_size_global, self.config.seed, start_step, end_step, rank(), world_size())
        if self.config.data.batch_from == "one_file" and isinstance(self.source, PairDataset):
            return OneSourceSampler([size for _, size in self.source.sources], *steps)
        stages = self.config.data.curriculum_scenes
        return StepSampler(len(self.source), *steps, self.source.group_size, stages)

    def example_batch(self, size: int) -> Batch:
        """Return the first `size` samples, for timing and counting."""
        batch: Batch = self.collator(self.example_samples(size))
        return batch

    def example_samples(self, size: int) -> list[tuple[int, Any]]:
        """Load the first `size` samples as [(epoch 0, sample)]."""
        return load_range(self.source, self.config.seed, [i % len(self.source) for i in range(size)])

    def trivial_losses(self) -> dict[str, float]:
        """Compute the losses of a predictor that ignores its input; log the share of [UNK] in these samples."""
        samples = self.example_samples(min(EXAMPLES, len(self.source)))
        batch: Batch = self.collator(samples)
        if rank() == 0 and isinstance(getattr(batch, "is_valid", None), Tensor):
            self.warn_of_cuts(samples, batch)
            self.warn_of_unknown_words(batch)
        return self.task.trivial_losses(batch)

    def warn_of_cuts(self, samples: list[tuple[int, Any]], batch: Batch) -> None:
        """Log the number of texts that `data.text_max_tokens` cuts; the samples are collated again without the cut."""
        limit = self.config.data.text_max_tokens
        if batch.is_valid.shape[-1] >= limit and hasattr(self.collator, "text_max_tokens"):
            uncut = copy.copy(self.collator)
            uncut.text_max_tokens = MAX_CAPTION_CHARS
            counts = uncut(samples).is_valid.flatten(0, -2).sum(dim=1).tolist()
            self.predictor.processor.warn_of_lengths(counts, len(counts))

    def warn_of_unknown_words(self, batch: Batch) -> None:
        """Log the share of [UNK] among the words of a batch, if there is any."""
        tensors = batch.tensors()
        share = unknown_share(self.tokenizer, tensors["input_ids"], tensors["is_valid"])
        if share > 0:
            logger.log(
                logging.WARNING if share >= UNKNOWN_SHARE else logging.INFO,
                "%.1f %% of the words are [UNK] to the tokenizer %s, of the first %d samples; train one on your "
                "captions with `mamo data tokenizer`",
                100 * share,
                self.config.data.tokenizer,
                len(batch),
            )

    def check_evaluation(self) -> None:
        """Read the evaluation files, if an evaluation follows; refuse those that are trained on. Raises ValueError."""
        if self.config.evaluation.enabled:
            self.task.check_files()
            refuse_training_files(self.config.data, [self.config.data.model_dump(), *trained_data(self.ancestry)])

    def loop(self, trackers: list[run_dir.Tracker]) -> Loop:
        """Return the training loop of this run."""
        names = (run_dir.CONFIG, "tokenizer", *self.task.assets)
        files = {name: self.output_dir / name for name in names}
        if self.config.model.text_source is not None:
            files[run_dir.BERT] = self.output_dir / run_dir.BERT
        state = {
            "method": self.task.describe_method(),
            "image_encoder": self.task.describe_image_encoder(),
            "data_fingerprint": self.fingerprint(),
            "data_sets": self.source.dataset_names(),
            **({"sources": self.source.sources} if isinstance(self.source, PairDataset) else {}),
            "carried": {name: run_dir.sha256_hex([text]) for name, text in self.task.assets.items()},
            "versions": versions(),
            "machine": machine(self.device),
            "ancestry": self.ancestry,
        }
        loop = Loop(
            self.config,
            self.task,
            self.optimizer,
            self.device,
            self.output_dir,
            trackers,
            state,
            files,
            LossMonitor(self.trivial_losses()),
            self.bad_samples,
        )
        if loop.guard.loss_scale is not None and self.loss_scale is not None:
            loop.guard.loss_scale = LossScale(**self.loss_scale, device=self.device)
        loop.join()
        return loop

    def dry_run_loop(self, precision: Precision, output_dir: Path) -> Loop:
        """Build a loop for measuring steps: without trackers and checkpoints.

        `output_dir` gets a file only if a loss is not finite.
        """
        choose_attention(self.task.network, self.device, precision)
        training = self.config.training.model_copy(update={"precision": precision})
        config = self.config.model_copy(update={"training": training})
        return Loop(
            config, self.task, self.optimizer, self.device, output_dir, [], {}, {}, LossMonitor({}), self.bad_samples
        )

    def fingerprint(self, by_row: bool = False) -> str:
        """Return 16 hex digits that change with the training data, the vocabulary and the assets.

        `by_row` gives the fingerprint that runs on JSON Lines had before version 0.3.
        """
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        items = self.source.fingerprint_items()
        if by_row and isinstance(self.source, PairDataset):
            items = self.source.fingerprint_items(by_row=True)
        return run_dir.sha256_hex(itertools.chain([vocabulary], items, self.task.assets.values()))[:16]


def adopt_conventions(config: RunConfig) -> RunConfig:
    """Return the config with the conventions of the checkpoint that it starts from, where it sets none itself."""
    if config.checkpoint is None:
        return config
    path = Path(config.checkpoint)
    found = ALBEF if path.is_file() else conventions_of(load_stored_config(checkpoint.resolve(path)))
    adopted, contradicted = with_conventions(config, found)
    if adopted is not config:
        taken = ", ".join(f"{key}={value}" for key, value in found.items() if conventions_of(adopted).get(key) == value)
        logger.info("conventions of %s: %s", path, taken)
    for key, value in contradicted.items():
        logger.warning("%s: %s was trained with %s", key, path, value)
    return adopted


def train(config: RunConfig, is_resume: bool, trackers: Sequence[run_dir.Tracker] = ()) -> None:
    """Train, evaluate and write everything into `output_dir`, in every process that `torchrun` started.

    A run that `torchrun --max-restarts` starts again resumes.

    Args:
        config: what to run.
        is_resume: whether to go on with the run in `output_dir`.
        trackers: list of receivers of each step's metrics besides TensorBoard, in the process of rank 0; closed at the
            end. One that raises is left out afterwards, with a warning.

    Raises:
        ValueError: a mistake in the config, the data, the checkpoint or `trackers`; nothing of an earlier run is
            touched.
        ProcessLost: another process of the run died.
        Preempted: SIGTERM came, and the step was finished and saved.
        KeyboardInterrupt: Ctrl-C came, and the step was finished and saved, unless it came twice.
    """
    run_dir.check_trackers(trackers)
    check_named_trackers(config)
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    is_resume = is_resume or (is_restart and (Path(config.output_dir) / run_dir.CONFIG).is_file())
    with process_group(config.training.device), memory_errors(config), contextlib.ExitStack() as held:
        held.enter_context(deterministic_operations(config.training.deterministic))
        lock = run_on_all_ranks(lambda: take_output_dir(Path(config.output_dir), is_resume, held))
        run, start_step = run_on_all_ranks(lambda: resume_run(config) if is_resume else new_run(config))
        logger.info("parameters: %s", run.parameter_counts)
        warn_of_repeats(len(run.source), config.training.batch_size_global)
        run_on_all_ranks(run.check_evaluation)
        prepared = run_on_all_ranks(lambda: prepare_output_dir(run, start_step) if rank() == 0 else set())
        [evaluated, *_] = all_gather_object(prepared)
        opened = open_trackers(run.config, start_step, trackers)
        try:
            with detect_lost_ranks():
                loop = run.loop(opened)
                train_and_evaluate(run, loop, start_step, evaluated, lock)
        except RankLostError:
            raise  # at once: who started the processes ends this one too
        except BaseException:
            with contextlib.suppress(Exception):  # on a full disk these fail too; report the first error
                close_loggers(run.output_dir, opened)
            raise
        close_loggers(run.output_dir, opened)
        if run.config.evaluation.enabled:
            write_run_report(run, loop)


def take_output_dir(output_dir: Path, is_resume: bool, held: contextlib.ExitStack) -> RunLock | None:
    """Lock the run's folder in the process of rank 0, and create that of a new run; return the lock.

    Raises:
        ValueError: another process runs there; a new run's folder is not empty, or cannot be written.
    """
    if rank() > 0 or (is_resume and not output_dir.is_dir()):
        return None
    if not is_resume:
        run_dir.make_folder(output_dir)
    lock = held.enter_context(RunLock(output_dir))
    if is_resume:
        checkpoint.restore_step_folder(output_dir)
    else:
        run_dir.create_output_dir(output_dir)
    return lock


def warn_of_repeats(n_samples: int, batch_size_global: int) -> None:
    """Log where a batch has each sample several times, each of which is a pair of its own in the losses."""
    if n_samples < batch_size_global and rank() == 0:
        logger.warning(
            "training data: %d samples are fewer than training.batch_size_global = %d: a batch has each %.1f times; "
            "use a smaller batch or more data",
            n_samples,
            batch_size_global,
            batch_size_global / n_samples,
        )


def new_run(config: RunConfig) -> tuple[TrainingRun, int]:
    """Build a new run; return it and its first step."""
    run = TrainingRun(config)
    if config.training.precision == "auto" or config.training.device == "auto":
        resolve_auto_settings(run)
    return run, 0


def resume_run(config: RunConfig) -> tuple[TrainingRun, int]:
    """Restore the run in `output_dir`; return it and the number of steps it has done."""
    output_dir = Path(config.output_dir)
    config = resumed_config(config, output_dir / run_dir.CONFIG, build_config)
    has_checkpoint = bool(checkpoint.step_folders(output_dir))
    run = TrainingRun(config, has_checkpoint)
    tokenizer, before = config.data.tokenizer, read_values(output_dir / run_dir.CONFIG)["data"]["tokenizer"]
    if has_checkpoint and tokenizer != before and tokenizer_of(config).get_vocab() != run.tokenizer.get_vocab():
        raise ValueError(f"data.tokenizer: {tokenizer} has another vocabulary than the run in {output_dir}")
    if not has_checkpoint:
        logger.info("%s has no checkpoint yet: beginning with step 1", output_dir)
    start_step = load_checkpoint(run) if has_checkpoint else 0
    refuse_another_evaluation(config, start_step)
    return run, start_step


def refuse_another_evaluation(config: RunConfig, start_step: int) -> None:
    """Raise ValueError where a run is finished and evaluated, and `config` would evaluate it otherwise.

    Its config and report would then be of another evaluation than its `results.json`.
    """
    output_dir = Path(config.output_dir)
    done = {entry["step"] for entry in run_dir.read_evaluations(output_dir)}
    if start_step < config.training.total_steps or start_step not in done:
        return
    before = flatten(build_config(read_values(output_dir / run_dir.CONFIG), str(output_dir)).model_dump())
    now = flatten(config.model_dump())
    differing = [key for key in now if key.startswith(SHAPE_RESULTS) and now[key] != before.get(key)]
    if differing:
        raise ValueError(
            f"{output_dir} is finished, and its results are of another {', '.join(differing)}; evaluate it otherwise "
            f"by `mamo evaluate checkpoint={output_dir}`"
        )


def prepare_output_dir(run: TrainingRun, start_step: int) -> set[int]:
    """Write what the run's folder begins with, cut back what is later than `start_step`; the steps evaluated so far."""
    output_dir = run.output_dir
    evaluations = run_dir.read_evaluations(output_dir)
    for name in (run_dir.METRICS, run_dir.TIMING):
        run_dir.truncate_jsonl(output_dir / name, start_step)
    run_dir.write_config(output_dir, run.config)
    run.tokenizer.save_pretrained(output_dir / "tokenizer")
    for name, text in run.task.assets.items():
        run_dir.atomic_write_text(output_dir / name, text)
    if run.config.model.text_source is not None:
        run.task.network.backbone.text_encoder.config.save_pretrained(output_dir / run_dir.BERT)
    kept = [entry for entry in evaluations if entry["step"] <= start_step]
    if kept != evaluations:
        logger.info("%s: removing the evaluations after step %d", output_dir / run_dir.RESULTS, start_step)
        run_dir.write_evaluations(output_dir, kept)
    if start_step > 0:
        checkpoint.settle(output_dir, start_step, run.config.training.checkpoints_kept)
    return {entry["step"] for entry in kept}


def train_and_evaluate(
    run: TrainingRun, loop: Loop, start_step: int, evaluated: set[int], lock: RunLock | None
) -> None:
    """Run the steps from `start_step` on and the evaluations that are due; `evaluated` are the steps done already."""
    total, evaluation = run.config.training.total_steps, run.config.evaluation
    evaluate = make_evaluator(run, loop) if evaluation.enabled else None
    is_due = start_step == total or (evaluation.every_steps > 0 and start_step % evaluation.every_steps == 0)
    if evaluate is not None and is_due and start_step > 0 and start_step not in evaluated:
        evaluate(start_step)  # a kill came between the checkpoint and the evaluation that follows it
    if start_step < total:
        workers = count_workers(run.config.data.workers, run.device.type)
        batches = run.batches(start_step, workers)
        with loader_errors(workers):
            loop.run(batches if lock is None else lock.guard(batches), start_step, evaluate)
        log_sources(run, total)
        if evaluate is not None:
            evaluate(total)


def log_sources(run: TrainingRun, step: int) -> None:
    """Log how many pictures of each file the first `step` steps have, where the training pairs are of several."""
    sources = run.source.sources if isinstance(run.source, PairDataset) else []
    if len(sources) > 1 and rank() == 0:
        logger.info("pictures seen in %d steps: %s", step, seen_line(run.config, sources, step))


def close_loggers(output_dir: Path, trackers: list[run_dir.Tracker]) -> None:
    """Close the trackers and draw the curves."""
    run_dir.close(trackers)
    if rank() == 0 and (output_dir / run_dir.METRICS).exists():
        plot_curves(output_dir, load_config)


def write_run_report(run: TrainingRun, loop: Loop) -> None:
    """Write `report.html`: the last evaluation's numbers, pictures of what the network does, the curves."""
    with loop.strategy.evaluating() as network:
        if rank() > 0:
            return
        shown = run.task.report(run.predictor.with_network(network), SHOWN, run.output_dir)
    last = run_dir.read_evaluations(run.output_dir)[-1]
    title = f"{run.output_dir}: {last['protocol']}"
    newest = checkpoint.step_folders(run.output_dir)[-1]
    card = model_card(newest, run.config)
    facts, files = last.get("facts", {}), run.config.data.eval_names
    logger.info("pictures: %s", write_report(run.output_dir, title, last["metrics"], shown, newest, card, facts, files))


def load_checkpoint(run: TrainingRun) -> int:
    """Load the last good checkpoint; returns its step."""
    folder = checkpoint.last_good(run.output_dir)
    state = checkpoint.read_state(folder)
    if state["step"] > run.config.training.total_steps:
        raise ValueError(f"{folder} is past training.total_steps={run.config.training.total_steps}")
    found = run.fingerprint()
    if state["data_fingerprint"] != found and state["data_fingerprint"] != run.fingerprint(by_row=True):
        raise ValueError(
            f"{folder}: the training data or its vocabulary changed since (fingerprint {state['data_fingerprint']}, "
            f"now {found}); restore it, or start a new run with checkpoint={folder}"
        )
    for name, module in run.task.modules().items():
        resample = {"caption_id": module.widened} if isinstance(module, FeatureQueue) else None
        checkpoint.load_module(folder, name, module, resample)
    run.ancestry = state["ancestry"]
    run.bad_samples.seen, run.bad_samples.skipped = state["samples_seen"], state["samples_skipped"]
    run.loss_scale = state.get("loss_scale")
    if run.loss_scale is None or run.loss_scale["overflows"] < state["step"]:  # else the optimizer has not moved yet
        tensors = checkpoint.read_tensors(folder, "optimizer")
        checkpoint.load_optimizer_tensors(run.optimizer, run.task.network, tensors)
    logger.info("resuming after step %d from %s", state["step"], folder)
    if rank() == 0:  # whose machine the checkpoint names
        warn_if_not_bit_identical(state, {**versions(), **machine(run.device)})
    step: int = state["step"]
    return step


def make_evaluator(run: TrainingRun, loop: Loop) -> Evaluate | None:
    """Return a function that evaluates after a step and appends the result to `results.json`."""

    def evaluate(step: int) -> None:
        with loop.strategy.evaluating() as network:
            predictor = run.predictor.with_network(network)
            metrics = run_on_all_ranks(lambda: run.task.evaluate_files(predictor, run.output_dir))
        if run.config.evaluation.items_files:
            with loop.strategy.evaluating("fp32") as network:
                whole = run.predictor.with_network(network)
                items = run_on_all_ranks(lambda: run.task.evaluate_items(whole, run.output_dir))
            metrics = Metrics(metrics, facts_of(metrics)) | items
        if rank() > 0:
            return
        folder = checkpoint.step_folder(Path("."), step)
        name = protocol_of(run.config, run.task.scenes_protocol)
        entry = result_entry(run.config, name, run.task.describe_scorer(), folder, step, run.ancestry, metrics)
        evaluations = [e for e in run_dir.read_evaluations(run.output_dir) if e["step"] < step]
        run_dir.write_evaluations(run.output_dir, [*evaluations, entry])
        if run.config.training.keep_best is not None:
            checkpoint.point_at_best(run.output_dir, [*evaluations, entry], run.config.training.keep_best)
        run_dir.log_to(loop.trackers, step, {f"evaluation/{name}": value for name, value in metrics.items()})
        for line in (summary(metrics), facts_line(entry["facts"]), *remarks(metrics)):
            if line:
                logger.info("step %d: %s", step, line)

    return evaluate


def resolve_auto_settings(run: TrainingRun, size: int | None = None) -> None:
    """Replace `auto` in the run's config by what this machine offers and a few steps of `size` samples prefer."""
    training = run.config.training
    precision = training.precision

    def run_step(precision: Precision) -> None:
        run.dry_run_loop(precision, run.output_dir).backward(batch, 0)
        run.task.network.zero_grad(set_to_none=True)

    if precision == "auto":
        local, _ = local_batch_sizes(training, run.task.unit, run.task.unit_key)
        batch = run.example_batch(size or local).to(run.device)
        precision = choose_precision(run.device, run_step)
    found = all_gather_object({"precision": precision, "device": run.device.type})[0]
    config = run.config.model_copy(update={"training": training.model_copy(update=found)})
    run.config = run.task.config = config
    choose_attention(run.task.network, run.device, config.training.precision)
