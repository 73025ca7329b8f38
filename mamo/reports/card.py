"""Write the card of a checkpoint as Markdown: its model, its training data and lineage, every evaluation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mamo.config.conventions import ALBEF, conventions_of
from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.data.sampler import samples_seen
from mamo.training.checkpoint import EVALUATIONS, read_state, run_folder
from mamo.training.run_dir import RESULTS, read_evaluations


def model_card(folder: Path, config: RunConfig) -> str:
    """Return the card of a verified step folder (`checkpoint.resolve`); `config` is the folder's own."""
    state = read_state(folder)
    training, (height, width) = config.training, config.data.image_size
    facts = {
        "method": state.get("method", f"task {config.task}"),
        "preset": f"`{config.model.preset}`, {_parameters(folder):,} parameters",
        "image": f"{state.get('image_encoder', 'image encoder')}, {height} x {width} px",
        "steps": (
            f"{state['step']:,} of {training.total_steps:,}, {training.batch_size_global} samples each, "
            f"{training.optimizer}"
        ),
        "training data": f"{_data(config)}, fingerprint `{state['data_fingerprint']}`",
        **_seen(config, state),
        **_mim_target(config),
        "conventions": _conventions(config),
        "seed and precision": f"{config.seed}, {training.precision}",
        "versions": ", ".join(f"{name} {number}" for name, number in state["versions"].items()),
    }
    name = ", ".join(dict.fromkeys((run_folder(folder).name, folder.name)))
    lines = [f"# {name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "## Lineage", ""]
    lines += [
        f"- {link['checkpoint']}, step {link['step']}, data `{link['data_fingerprint']}`" for link in state["ancestry"]
    ] or ["Random weights."]
    for entry in evaluations_of(folder, state["step"]):
        lines += ["", f"## {entry['protocol']}, {entry['split']}", "", "| metric | % |", "|---|---|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in entry["metrics"].items()]
    return "\n".join(lines) + "\n"


def _conventions(config: RunConfig) -> str:
    """List the conventions of the weights by which images and texts are read and scored."""
    found = conventions_of(config)
    origin = " (ALBEF's)" if found == ALBEF else ""
    return ", ".join(f"`{key}: {str(value).lower()}`" for key, value in found.items()) + origin


def _data(config: RunConfig) -> str:
    data = config.data
    if data.source != "scenes":
        return str(data.train_file) if not data.train else ", ".join(f"{x.file} × {x.repeat}" for x in data.train)
    stages = "".join(f"; {n:,} of at most {k} objects" for k, n in enumerate(data.curriculum_scenes, start=1))
    return f"scenes ({data.difficulty}, {data.train_scenes:,}{stages})"


def _seen(config: RunConfig, state: Values) -> Values:
    """Say how many pictures of each file were seen, where the training pairs are of several."""
    sources = [(str(name), int(size)) for name, size in state.get("sources", [])]
    if len(sources) < 2:
        return {}
    return {"pictures seen": seen_line(config, sources, state["step"])}


def _mim_target(config: RunConfig) -> Values:
    """Name the frozen encoder whose features MIM predicts, with the run or the weights that it is of."""
    losses: Any = getattr(config, "losses", None)
    if getattr(losses, "mim_target", None) != "encoder":
        return {}
    encoder = losses.mim_encoder
    source = (
        f"the image encoder of {encoder.checkpoint}" if encoder.checkpoint else f"{encoder.name}, {encoder.weights}"
    )
    return {"MIM target": f"frozen features: {source}"}


def seen_line(config: RunConfig, sources: Sequence[tuple[str, int]], step: int) -> str:
    """Format the number of pictures of each source in the batches of the first `step` steps.

    Args:
        config: of the run.
        sources: (name, number of samples) in the order of the data set.
        step: number of steps done.
    """
    is_one_source = config.data.batch_from == "one_file"
    sizes = [size for _, size in sources]
    seen = samples_seen(sizes, config.training.batch_size_global, config.seed, step, is_one_source)
    return ", ".join(f"{n:,} of {name}" for n, (name, _) in zip(seen, sources))


def _parameters(folder: Path) -> int:
    """Count the student's parameters; a tied weight counts once."""
    with safe_open(folder / "student.safetensors", framework="numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dictionary)
    return sum(math.prod(shape) for shape in shapes)


def evaluations_of(folder: Path, step: int) -> list[Values]:
    """Read the evaluations of this step: the run's own results and those of `evaluate.py`."""
    run = run_folder(folder)
    folders = [run, *sorted(file.parent for file in (run / EVALUATIONS).glob(f"*/{RESULTS}"))]
    found = [entry for one in folders for entry in read_evaluations(one)]
    return [entry for entry in found if entry["step"] == step]
