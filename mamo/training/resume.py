"""Continuing a run: which config it has, and whether the one given now is the same run."""

from pathlib import Path
from typing import Any

from mamo.config import Config, build_config, load_config

FREE_KEYS = (
    "output_dir",
    "data.workers",
    "evaluation.",
    "training.checkpoint_every_steps",
    "training.checkpoints_kept",
)
"""What may differ when a run is resumed (or its folder was moved): nothing that changes a step."""
PROBED_KEYS = ("training.precision", "training.device")
"""Written into the resolved config at the first start; `auto` then means what was found."""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def resumed_config(given: Config, resolved_file: Path) -> Config:
    """The config of the run to continue, with the free keys as given now.

    Raises:
        ValueError: the file is missing, or a key that changes the run differs; all such keys are named.
    """
    if not resolved_file.is_file():
        raise ValueError(f"nothing to resume: {resolved_file} does not exist; start without --resume")
    stored = load_config(resolved_file)
    old, new = flatten(stored.model_dump()), flatten(given.model_dump())
    for key in PROBED_KEYS:
        if new[key] == "auto":
            new[key] = old[key]
    differing = [key for key in new if new[key] != old.get(key) and not key.startswith(FREE_KEYS)]
    if differing:
        lines = [f"  {key}: {old.get(key)} in the run, {new[key]} now" for key in differing]
        raise ValueError("--resume with another config than the run's:\n" + "\n".join(lines))
    merged = stored.model_dump()
    merged["output_dir"] = given.output_dir
    merged["data"]["workers"] = given.data.workers
    merged["evaluation"] = given.evaluation.model_dump()
    for key in ("checkpoint_every_steps", "checkpoints_kept"):
        merged["training"][key] = getattr(given.training, key)
    return build_config(merged, str(resolved_file))
