"""Measure data loading: samples per second of one core, and the share of step time spent waiting for data.

Seconds are processor seconds (`time.process_time`), so that other load on the machine hardly matters.
"""

import functools
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mamo.benchmark.cases import Case
from mamo.benchmark.timing import Rounds, synchronise
from mamo.config.schema import DataConfig
from mamo.data.loader import SampleDataset
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import read_pairs
from mamo.data.shards import index_folder
from mamo.data.transforms import train_transform
from mamo.trainer import TrainingRun
from mamo.training.precision import Precision
from mamo.world.datasets import ScenePairs

STORED_PX = 256
STORED = 64
"""Number of JPEG files in a measurement."""
JPEG_QUALITY = 90
WAIT_STEPS = 8


def measure_loading(folder: Path, rounds: int, n_stored: int = STORED, side_px: int = STORED_PX) -> dict[str, float]:
    """Measure samples per second of one core: rendered scenes, and augmented JPEGs from files and from shards."""
    files, n_bytes = write_jpegs(folder / "jpeg", n_stored, side_px)
    write_shards(folder / "jpeg", folder / "shards", n_stored)
    index_folder(folder / "shards")
    augment = functools.partial(train_transform, min_crop_scale=0.2, horizontal_flip=True, rand_augment=True)
    size = (side_px, side_px)
    sources: dict[str, SampleDataset] = {
        "scenes": ScenePairs(DataConfig(image_size_px=96), "train", 10_000),
        "jpeg_folder": PairDataset(read_pairs(files), size, augment),
        "jpeg_shards": PairDataset(read_pairs(folder / "shards"), size, augment),
        "jpeg_no_augmentation": PairDataset(read_pairs(files), size),
    }
    values = Rounds()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            found = {f"{name}_samples_per_core_s": _rate(source, n_stored) for name, source in sources.items()}
            if number > 0:
                values.add(**found)
    finally:
        torch.set_num_threads(threads)
    return values.summary("loading") | {"loading/jpeg_bytes": n_bytes / n_stored}


def _rate(source: SampleDataset, count: int) -> float:
    started = time.process_time()
    for index in range(count):
        source.load(index, np.random.default_rng(index))
    return count / (time.process_time() - started)


def measure_waiting(
    case: Case, folder: Path, device: torch.device, precision: Precision, workers: int
) -> dict[str, float]:
    """Measure the share of step time spent waiting for the loader, on rendered scenes."""
    run = TrainingRun(case.config(folder, device.type, precision))
    run.task.network.train()
    loop = run.dry_run_loop(precision, folder)
    batches = run.batches(0, workers)
    for step in range(2):  # warm-up: workers start, kernels are chosen
        loop.step(next(batches).to(device), step)
    waited, started = 0.0, time.perf_counter()
    for step in range(2, 2 + WAIT_STEPS):
        mark = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - mark
        loop.step(batch.to(device), step)
    synchronise(device)
    share = waited / (time.perf_counter() - started)
    batches.close()  # type: ignore[attr-defined]
    return {f"loading/{case.preset}/wait_share": share, f"loading/{case.preset}/workers": float(workers)}


def write_jpegs(folder: Path, count: int, side_px: int) -> tuple[Path, int]:
    """Write JPEGs with the spectrum of photographs (amplitude 1/f); return the pairs file and the total bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows, n_bytes = [], 0
    frequency = np.hypot(np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None, :])
    frequency[0, 0] = 1.0
    for number in range(count):
        spectrum = np.fft.rfft2(rng.standard_normal((3, side_px, side_px))) / frequency
        texture = np.fft.irfft2(spectrum, s=(side_px, side_px))
        colours = texture + 2 * texture.mean(axis=0, keepdims=True)  # colour channels of photographs are correlated
        pixels = (128 + 48 * colours / colours.std()).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(stream, "JPEG", quality=JPEG_QUALITY)
        n_bytes += len(stream.getvalue())
        (folder / f"{number:05d}.jpg").write_bytes(stream.getvalue())
        rows.append(json.dumps({"image": f"{number:05d}.jpg", "caption": f"picture number {number}"}))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(rows), "utf-8")
    return file, n_bytes


def write_shards(jpegs: Path, folder: Path, count: int, n_shards: int = 2) -> None:
    """Write the same images in tar shards of img2dataset's layout."""
    folder.mkdir()
    for shard in range(n_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, count, n_shards):
                tar.add(jpegs / f"{number:05d}.jpg", f"{number:05d}.jpg")
                caption = f"picture number {number}".encode()
                info = tarfile.TarInfo(f"{number:05d}.txt")
                info.size = len(caption)
                tar.addfile(info, io.BytesIO(caption))
