"""The section `training`: the loop, the optimizer, and how each part of the network trains."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mamo.config.section import NonNegative, Positive, Section


class PartConfig(Section):
    """Training of one part of the network."""

    learning_rate_factor: Annotated[float, Field(gt=0.0)] = 1.0
    """The part's learning rate as a multiple of `training.learning_rate`."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor from the learning rate of a layer to that of the layer below it (BEiT: 0.65); what precedes the layers is
    the lowest, and what follows them goes with the last."""
    freeze: Literal["all", "none"] | Positive = "none"
    """`all`: the part does not train and drops nothing out; N: what precedes the layers and the lowest N of them."""

    def problems(self) -> Iterator[str]:
        """Yield rates of a part that does not train."""
        for key in ("learning_rate_factor", "layer_decay"):
            if self.freeze == "all" and getattr(self, key) != 1.0:
                yield f"{key}: contradicts freeze: all; remove it"


class PartsConfig(Section):
    """The parts of the network."""

    image: PartConfig = PartConfig()
    """The image encoder."""
    text: PartConfig = PartConfig()
    """The text encoder, with the word embeddings that the masked-word head shares."""
    fusion: PartConfig = PartConfig()
    """The fusion."""
    heads: PartConfig = PartConfig()
    """Everything else: projections, temperature and heads."""

    def problems(self) -> Iterator[str]:
        """Yield what leaves nothing to train, and settings of layers for the heads."""
        if all(getattr(self, name).freeze == "all" for name in type(self).model_fields):
            yield "heads.freeze: all contradicts freeze: all of every other part: nothing would be trained"
        if self.heads.layer_decay != 1.0:
            yield "heads.layer_decay: the heads have no layers; remove it"
        if isinstance(self.heads.freeze, int):
            yield "heads.freeze: the heads have no layers; use all or none"


class TrainingConfig(Section):
    """The loop."""

    total_steps: Positive = 1000
    """Optimizer steps."""
    batch_size_global: Positive = 64
    """Samples an optimizer step sees, over all processes and micro-batches."""
    micro_batch_size: Positive | None = None
    """Samples a forward pass sees at most; null takes a process's whole share of the batch at once."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: `ddp` copies weights, optimizer's state and teacher to each, `fsdp` splits them over all."""
    reshard_after_forward: bool = True
    """With `fsdp`, free a layer's gathered weights after a forward pass; false keeps them until the backward pass."""
    activation_checkpointing: bool = False
    """Compute the transformer layers again in the backward pass instead of keeping their activations."""
    compile: bool = False
    """Compile the transformer layers with `torch.compile`."""
    deterministic: bool = False
    """On a GPU, compute the same bits in every run, by slower operations where PyTorch has them; a CPU does anyway."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """The highest, reached after the warm-up."""
    learning_rate_min: Annotated[float, Field(ge=0.0)] = 1e-5
    """Where the schedule ends, at the last step."""
    warmup_steps: NonNegative = 100
    """Steps over which the learning rate grows in a line."""
    parts: PartsConfig = PartsConfig()
    schedule: Literal["cosine", "albef", "warmup-stable-decay"] = "cosine"
    """`cosine`: smooth, from 0; `albef`: in stairs, 20 in the warm-up from the smallest rate, then one an epoch;
    `warmup-stable-decay`: constant after the warm-up, then `decay_steps` in a line to the smallest rate."""
    decay_steps: NonNegative = 0
    """Last steps of `schedule: warmup-stable-decay`; a run may resume with another number of them and of steps, as long
    as none of the steps that it did would have had another rate."""
    epoch_steps: Positive | None = None
    """Steps of an epoch, for the stairs of `schedule: albef`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.02
    """Applied to matrices; biases, norms and other vectors have none."""
    decay_temperature: bool = False
    """Whether the temperature of ITC decays as matrices do (ALBEF)."""
    adam_beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """AdamW's decay of the mean square of gradients; beta1 is 0.9."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the matrices of the transformer layers, AdamW for all else."""
    gradient_clip_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Longer gradients, all parameters as one vector, are scaled down to this; null leaves them (ALBEF)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` writes the fastest into the resolved config. `fp16`, for GPUs without bf16, scales the loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    checkpoint_every_steps: Positive = 500
    """The last step is always saved."""
    checkpoints_kept: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept; two at least, so that a broken one has a predecessor."""
    keep_best: str | None = None
    """Metric of `results.json` by whose evaluations during training the best checkpoint is kept too, as
    `checkpoints/best`: the highest value, of an error the lowest."""

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the keys of `training`."""
        if self.warmup_steps > self.total_steps:
            yield f"warmup_steps: {self.warmup_steps} is more than total_steps {self.total_steps}"
        if self.schedule == "albef" and self.epoch_steps is None:
            yield "epoch_steps: needed when training.schedule is albef"
        elif self.schedule == "albef" and self.warmup_steps > (self.epoch_steps or 0):
            yield f"warmup_steps: {self.warmup_steps} is more than the first epoch's {self.epoch_steps}"
        elif self.schedule != "albef" and self.epoch_steps is not None:
            yield f"epoch_steps: contradicts training.schedule: {self.schedule}; remove it"
        if self.decay_steps and self.schedule != "warmup-stable-decay":
            yield f"decay_steps: contradicts training.schedule: {self.schedule}; remove it"
        elif self.warmup_steps + self.decay_steps > max(self.total_steps, self.warmup_steps):
            yield f"decay_steps: {self.decay_steps} after {self.warmup_steps} of warm-up are more than total_steps"
        if self.learning_rate_min > self.learning_rate:
            yield "learning_rate_min: is above training.learning_rate"
        if self.batch_size_global % self.micro_batch:
            yield f"micro_batch_size: {self.micro_batch} does not divide batch_size_global {self.batch_size_global}"

    @property
    def micro_batch(self) -> int:
        """Return the samples of a forward pass in a single process."""
        return self.micro_batch_size or self.batch_size_global
