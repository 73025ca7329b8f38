"""Define the measured cases: the network of a preset at fixed shapes, with synthetic pairs in memory.

Captions use all their tokens, so that there is no padding to skip.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mamo.config.schema import RunConfig
from mamo.config.values import Values, merge
from mamo.data.pairs import Sample
from mamo.data.tokenizer import SPECIAL_TOKENS, build_tokenizer
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.registry import build_config
from mamo.trainer import TrainingRun
from mamo.training.loop import Loop
from mamo.training.precision import Precision

ALBEF: Values = {
    "model": {"fusion_type": "cross", "dropout": 0.1},
    "masking": {"text_ratio": 0.15, "text_replacement": "bert"},
    "losses": {
        "weights": {"mim": 0, "mrm_image": 0, "mrm_text": 0},
        "itc_soft_target_alpha": 0.4,
        "mlm_soft_target_alpha": 0.4,
    },
}
"""Settings of `configs/pretrain/albef.yaml` except sizes: three losses, cross-attention, momentum distillation."""

ITC_WIDTH = 256
"""ALBEF's, at every size."""


@dataclass(frozen=True)
class Case:
    """One preset at one set of shapes."""

    preset: str
    image_size_px: int
    batch_size: int
    vocabulary_size: int
    queue_size: int
    rounds: int
    """Number of measurements; the median is reported."""
    text_tokens: int = 25
    patch_size_px: int = 16
    pairs: int = 2048
    """Image-text pairs scored per round of the evaluation."""
    square_side: int = 2048
    """Side of the square matrix product that measures the machine's rate in each round."""
    method: Literal["mamo", "albef"] = "mamo"
    activation_checkpointing: bool = False
    processes: int = 1
    """Processes that share the batch; ITM's pool is the local batch of one process."""

    def config(self, folder: Path, device: str, precision: str) -> RunConfig:
        """Build the configuration of the case; its tokenizer is written into `folder`."""
        tokenizer = folder / f"tokenizer-{self.vocabulary_size}"
        if not tokenizer.exists():
            words = [f"w{number}" for number in range(self.vocabulary_size - len(SPECIAL_TOKENS))]
            build_tokenizer([*SPECIAL_TOKENS, *words]).save_pretrained(tokenizer)
        values: Values = {
            "output_dir": str(folder / "run"),
            "data": {
                "image_size_px": self.image_size_px,
                "text_max_tokens": self.text_tokens,
                "tokenizer": str(tokenizer),
            },
            "model": {"preset": self.preset, "image": {"patch_size_px": self.patch_size_px}, "itc_width": ITC_WIDTH},
            "losses": {"queue_size": self.queue_size, "itm_pool_size": self.batch_size // self.processes},
            "training": {
                "batch_size_global": self.batch_size,
                "device": device,
                "precision": precision,
                "activation_checkpointing": self.activation_checkpointing,
            },
            "evaluation": {"enabled": False},
        }
        return build_config(merge(values, ALBEF if self.method == "albef" else {}), f"benchmark {self.preset}")


CASES = {
    "tiny": Case("tiny", 96, batch_size=16, vocabulary_size=2_000, queue_size=4_096, rounds=9, pairs=2048),
    "small": Case("small", 224, batch_size=8, vocabulary_size=30_522, queue_size=4_096, rounds=5, pairs=256),
    "base": Case("base", 256, batch_size=4, vocabulary_size=30_522, queue_size=65_536, rounds=3, pairs=64),
}
GPU_BATCH_SIZE, GPU_ROUNDS, GPU_PAIRS = 64, 15, 16_384


def case_for(preset: str, device: torch.device) -> Case:
    """Return the case of a preset; a GPU gets larger batches, which fill it."""
    case = CASES[preset]
    if device.type == "cuda":
        case = replace(case, batch_size=GPU_BATCH_SIZE, rounds=GPU_ROUNDS, pairs=GPU_PAIRS, square_side=8192)
    return case


def synthetic_captions(count: int, n_words: int, vocabulary_size: int, seed: int = 0) -> list[str]:
    """Generate `count` captions of `n_words` words each."""
    words = np.random.default_rng(seed).integers(vocabulary_size - len(SPECIAL_TOKENS), size=(count, n_words))
    return [" ".join(f"w{word}" for word in row) for row in words]


def synthetic_batch(run: TrainingRun, size: int, n_words: tuple[int, ...] = ()) -> PairBatch:
    """Generate `size` pairs of noise with distinct images and captions; captions of `n_words[i % len]` words."""
    config = run.config.data
    rng = np.random.default_rng(0)
    lengths = n_words or (config.text_max_tokens - 2,)
    captions = synthetic_captions(size, max(lengths), len(run.tokenizer))
    samples = [
        Sample(
            image=torch.from_numpy(rng.integers(0, 256, (3, *config.image_size), dtype=np.uint8)),
            caption=" ".join(captions[i].split()[: lengths[i % len(lengths)]]),
            image_id=i,
            caption_id=i,
            sample_id=i,
            skipped=(),
        )
        for i in range(size)
    ]
    batch: PairBatch = run.collator([(0, sample) for sample in samples])
    return batch


def build_case(
    case: Case, folder: Path, device: torch.device, precision: Precision
) -> tuple[TrainingRun, Loop, PairBatch]:
    """Build a run of the case, a loop that writes nothing, and one process's batch on the device."""
    run = TrainingRun(case.config(folder, device.type, precision))
    run.task.network.train()
    return run, run.dry_run_loop(precision, folder), synthetic_batch(run, case.batch_size // case.processes).to(device)
