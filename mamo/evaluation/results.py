"""Build the entries of `results.json`."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.distributed import world_size
from mamo.evaluation.protocols import CUSTOM, split_of


class Metrics(dict[str, float]):
    """Metrics in percent by name, with `facts`: the numbers without which they cannot be read.

    `gallery_images`, `gallery_texts`, `rerank_k`, `chance/NAME` in percent, `ties/NAME` (queries), the number of items
    of other evaluations, and `skipped`, the items that could not be read. `files` has, by name, what identifies the
    files of items and how they were scored.
    """

    def __init__(
        self,
        values: Mapping[str, float],
        facts: Mapping[str, float] | None = None,
        files: Mapping[str, Values] | None = None,
    ) -> None:
        super().__init__(values)
        self.facts: dict[str, float] = dict(facts or {})
        self.files: dict[str, Values] = dict(files or {})

    def __or__(self, other: Mapping[str, float]) -> "Metrics":  # type: ignore[override]
        """Return these metrics with those of `other`; facts of both are kept."""
        files = other.files if isinstance(other, Metrics) else {}
        return Metrics({**self, **other}, {**self.facts, **facts_of(other)}, {**self.files, **files})


def facts_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the facts of metrics; none of a plain dictionary."""
    return metrics.facts if isinstance(metrics, Metrics) else {}


def facts_line(facts: Mapping[str, float]) -> str:
    """Format facts in one line, names without their signs; empty without facts."""
    return "; ".join(f"{name.replace('/', ' ').replace('_', ' ')} {value:.4g}" for name, value in facts.items())


def remarks(metrics: Mapping[str, float]) -> list[str]:
    """Return a sentence for each number that is worse than what it should improve."""
    recalls = [[metrics.get(f"{stage}/{way}_r1") for way in ("i2t", "t2i")] for stage in ("itc", "rerank")]
    found = []
    for task in ("vqa", "reasoning", "entailment"):
        accuracy, majority = metrics.get(f"{task}/accuracy"), metrics.get(f"{task}/majority")
        if accuracy is not None and majority is not None and accuracy < majority:
            found.append(f"{task} is below the commonest answer: accuracy {accuracy:.1f}, majority {majority:.1f}")
    means = [sum(pair) / 2 for pair in recalls if None not in pair]  # type: ignore[arg-type]
    if len(means) < 2 or means[1] >= means[0]:
        return found
    shown = f"ITC {means[0]:.1f}, re-ranked {means[1]:.1f} (R@1, mean of both directions)"
    return [f"ITM does not help yet: {shown}", *found]


def result_entry(
    config: RunConfig,
    protocol: str,
    scorer: str,
    folder: Path,
    step: int,
    lineage: list[Values],
    metrics: dict[str, float],
) -> Values:
    """Return one entry of `results.json`: the metrics and everything that they depend on.

    Where items were skipped, the protocol's name says `-custom`.
    """
    facts = facts_of(metrics)
    files = metrics.files if isinstance(metrics, Metrics) else {}
    if facts.get("skipped") and not protocol.endswith(CUSTOM):
        protocol += CUSTOM
    return {
        "protocol": protocol,
        "split": split_of(protocol, config),
        "scorer": scorer,
        "checkpoint": str(folder),
        "step": step,
        "seed": config.seed,
        "rerank_k": config.evaluation.rerank_k,
        "image_size_px": list(config.data.image_size),
        "text_max_tokens": config.data.text_max_tokens,
        "precision": config.training.precision,
        "eval_file": config.data.eval_file,
        "eval_split": config.data.eval_split,
        "statements_file": config.data.statements_file,
        "ancestry": lineage,
        "versions": versions(),
        **({"items": files} if files else {}),
        "facts": facts,
        "metrics": dict(metrics),
    }


def summary(metrics: Mapping[str, float]) -> str:
    """Format the main metrics in one line; all metrics of a task that has few."""
    first = [name for name in metrics if name.endswith(("_r1", "/itm", "/accuracy", "/majority")) or "word" in name]
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
