"""Build the entries of `results.json`."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.distributed import world_size
from mamo.evaluation.protocols import split_of


def result_entry(
    config: RunConfig,
    protocol: str,
    scorer: str,
    folder: Path,
    step: int,
    lineage: list[Values],
    metrics: dict[str, float],
) -> Values:
    """Return one entry of `results.json`: the metrics and everything that they depend on."""
    return {
        "protocol": protocol,
        "split": split_of(protocol, config),
        "scorer": scorer,
        "checkpoint": str(folder),
        "step": step,
        "seed": config.seed,
        "rerank_k": config.evaluation.rerank_k,
        "image_size_px": list(config.data.image_size),
        "eval_file": config.data.eval_file,
        "eval_split": config.data.eval_split,
        "ancestry": lineage,
        "versions": versions(),
        "metrics": metrics,
    }


def summary(metrics: Mapping[str, float]) -> str:
    """Format the main metrics in one line; all metrics of a task that has few."""
    first = [name for name in metrics if name.endswith(("_r1", "/itm", "/accuracy")) or "word" in name]
    return ", ".join(f"{name} {metrics[name]:.1f}" for name in first or metrics)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute the metrics."""
    names = ("mamo", "torch", "torchvision", "timm", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def machine(device: torch.device) -> dict[str, str]:
    """Return what decides the last bits of a step's sums: processor, threads, number of processes."""
    found = {"processes": str(world_size())}
    if device.type == "cuda":
        return found | {"GPU": torch.cuda.get_device_name(device)}
    return found | {"CPU": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}
