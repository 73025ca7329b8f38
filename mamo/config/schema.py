"""Typed, strict configuration: YAML file -> `section.key=value` overrides -> one validated, frozen `Config`.

Every problem in a file is reported at once, each with its dotted path, the value found and the nearest valid key,
before a model is built. `dump` writes the resolved configuration, from which a run can be repeated exactly.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mamo.config.rules import contradictions

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0)]

LOSS_NAMES = ("itc", "itm", "mlm", "mim", "mrm_image", "mrm_text", "recon")


class Section(BaseModel):
    """A strict section: unknown keys, booleans for numbers, numbers for text, infinity and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class AugmentationConfig(Section):
    """Training augmentation of real images; scenes are drawn, not augmented."""

    crop_scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Smallest area share of the random resized crop; 1 resizes the whole image."""
    horizontal_flip: bool = False
    """Mirror half of the images. Off by default: a mirrored image makes "left of" false."""
    randaugment: bool = False
    """Two random geometric or contrast operations (never colour), as ALBEF does."""


class BadSampleConfig(Section):
    """What happens to a sample whose image or caption cannot be used."""

    policy: Literal["raise", "skip"] = "raise"
    """`raise` stops at the first; `skip` counts, names and replaces each until the budget is spent."""
    budget: Fraction = 0.001
    """Largest share of bad samples among the samples drawn."""


class DataConfig(Section):
    """Where image-text pairs come from."""

    source: Literal["scenes", "pairs", "records"] = "scenes"
    """`scenes`: the embedded world. `pairs`: files of image-text pairs. `records`: JSON Lines of the task's records."""
    difficulty: Literal["easy", "full"] = "easy"
    """Difficulty of the embedded world."""
    train_scenes: Positive = 1_000_000
    """Number of distinct training scenes; none is stored, each is drawn when needed."""
    curriculum_scenes: list[Positive] = []
    """How many training scenes show one object at most, how many two, ...; they come first. Even numbers: twins."""
    train_file: str | list[str] | None = None
    """One or several: JSON Lines; of pairs also ALBEF JSON, Karpathy JSON, or a folder or glob of tar shards."""
    train_split: str | None = None
    """Split to take from a Karpathy file."""
    eval_file: str | None = None
    """Held-out pairs in the same formats."""
    eval_split: str | None = None
    """Split to take from a Karpathy file for evaluation."""
    statements_file: str | None = None
    """Statements labelled true or false of an image (`data.py build nlvr`), scored by ITM."""
    tokenizer: str = "scenes"
    """`scenes`, a folder in Hugging Face layout, or a hub name."""
    image_size_px: Positive | list[Positive] = 48
    """Side of the square image, or [height, width]."""
    text_max_tokens: Annotated[int, Field(ge=4)] = 48
    """Captions are cut to this many tokens, [CLS] and [SEP] included."""
    workers: NonNegative = 1
    """Loader processes; any number gives the same run."""
    augmentation: AugmentationConfig = AugmentationConfig()
    bad_samples: BadSampleConfig = BadSampleConfig()

    @field_validator("image_size_px")
    @classmethod
    def _two_sides(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, int) or len(value) == 2:
            return value
        raise ValueError("give one side or [height, width]")

    @property
    def train_files(self) -> list[str]:
        """`train_file` as a list."""
        files = self.train_file or []
        return [files] if isinstance(files, str) else files

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        sides = self.image_size_px
        return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


class ImageEncoderConfig(Section):
    """A timm VisionTransformer; the numbers override the named model's own."""

    name: str = "vit_tiny_patch16_224"
    """timm name of a VisionTransformer with absolute positions; the sizes below, where given, replace its own."""
    patch_size_px: Positive | None = None
    """Side of a patch; the image size is a multiple of it."""
    width: Positive | None = None
    """Features of a token."""
    depth: Positive | None = None
    """Transformer blocks."""
    heads: Positive | None = None
    """Attention heads; they divide `width`."""
    weights: str = "random"
    """`random`, `timm` (published, by name), a file or a folder as timm, OpenAI, open_clip or transformers store it."""


class TextEncoderConfig(Section):
    """The lower layers of a Hugging Face BERT."""

    bert: str | None = None
    """Folder or hub name of a BERT; its config replaces the numbers below."""
    weights: Literal["random", "bert"] = "random"
    """`bert` loads the weights of `bert`: lower layers here, upper layers into fusion."""
    width: Positive = 192
    """Features of a token; fusion is as wide."""
    heads: Positive = 3
    """Attention heads, in fusion too; they divide `width`."""
    mlp_width: Positive = 768
    """Hidden features of the MLP of each layer, in fusion too."""
    layers: Positive = 3
    """Number of lower layers that form the text encoder; of MLIM all layers, which patches pass too."""


class ModelConfig(Section):
    """The network of MAMO; MLIM reads `text`, `dropout` and `embedder_layers` alone."""

    preset: Literal["tiny", "small", "base"] = "tiny"
    """Values for every key below that the file does not give; see `mamo/presets.py`."""
    image: ImageEncoderConfig = ImageEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    fusion_type: Literal["concat", "cross"] = "concat"
    """`concat`: self-attention over image and text, outputs for both; `cross`: text attends to the image (ALBEF)."""
    fusion_layers: Positive = 3
    """Transformer layers over the tokens of image and text."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of text encoder and fusion."""
    itc_width: Positive = 128
    """Width of the shared ITC space."""
    mim_head_blocks: Annotated[int, Field(ge=0, le=6)] = 0
    """0: an MLP; 1 to 6: transformer blocks over the masked slots (Table 10)."""
    embedder_layers: Annotated[int, Field(ge=1, le=10)] = 3
    """MLIM's convolutions, each of which halves the image: a patch has 2 to this power pixels a side (paper: 7)."""


class MaskingConfig(Section):
    """How the masked views are drawn; ratios as in the paper's section 4 (75 % and 25 %)."""

    mode: Literal["alternate", "joint", "modality_aware"] = "alternate"
    """`alternate`: one modality is masked a pass; `joint`: one pass with both masked. `modality_aware` (MLIM): one
    pass; of each third of the samples the image alone, the text alone, or both are masked, the last by `light_ratio`.
    """
    image_ratio: Ratio = 0.75
    """Share of the patches that are masked, at least one."""
    image_style: Literal["random", "block"] = "random"
    """`random` patches, or rectangular blocks of them (BEiT)."""
    text_ratio: Ratio = 0.25
    """Share of the tokens, special ones apart, that are masked, at least one."""
    text_unit: Literal["token", "word"] = "token"
    """`word` masks all pieces of a chosen word."""
    text_replacement: Literal["mask", "bert"] = "mask"
    """`mask`: a chosen token becomes [MASK]; `bert`: 80 % do, 10 % become a random token, 10 % stay."""
    light_ratio: Ratio = 0.15
    """Of `modality_aware`, where both are masked. MLIM does not state it; 15 % is BERT's."""


class LossWeights(Section):
    """Weight of each loss in the sum (the paper's Eq. 6: all of MAMO's 1); 0 switches a loss and its head off."""

    itc: Weight = 1.0
    """Image-text contrast of the two encoders."""
    itm: Weight = 1.0
    """Image-text matching by fusion, true pairs against hard negatives."""
    mlm: Weight = 1.0
    """Masked words."""
    mim: Weight = 1.0
    """Masked patches: `mim_target`."""
    mrm_image: Weight = 1.0
    """At masked patches, the teacher's fused tokens of the whole pair."""
    mrm_text: Weight = 1.0
    """At masked words, the teacher's fused tokens of the whole pair."""
    recon: Weight = 0.0
    """MLIM's image loss, squared error of pixels. MLIM has this, `mlm` and `itm`, MAMO has all others."""


class LossConfig(Section):
    """The losses and what they contrast with."""

    weights: LossWeights = LossWeights()
    itc_candidates: Literal["teacher", "batch"] = "teacher"
    """`teacher`: the teacher's features of the global batch and of the queue; `batch`: plainly in batch."""
    queue_size: NonNegative = 0
    """Teacher features of past samples kept as further ITC candidates."""
    itc_soft_target_alpha: Fraction = 0.0
    """Share of the teacher's similarities in the ITC target (ALBEF: 0.4)."""
    itc_soft_target_ramp_steps: NonNegative = 0
    """Steps over which that share grows from 0."""
    mlm_soft_target_alpha: Fraction = 0.0
    """Share of the teacher's word probabilities in the MLM target: momentum distillation (ALBEF: 0.4)."""
    mlm_soft_target_ramp_steps: NonNegative = 0
    """Steps over which that share grows from 0."""
    temperature: Annotated[float, Field(ge=0.001, le=0.5)] = 0.07
    """First value of the learnable ITC temperature."""
    itm_negatives: Literal["pool", "foils"] = "pool"
    """`pool`: hard negatives by ITC; `foils` (grounding): the records' own expressions that are true of nothing."""
    itm_pool_size: Annotated[int, Field(ge=2)] = 32
    """Hard negatives come from fixed pools of this many consecutive samples."""
    mim_target: Literal["features", "pixels"] = "features"
    """The teacher's image-encoder features, or normalised pixels (Table 9)."""
    recon_area: Literal["masked", "image"] = "masked"
    """Pixels that `recon` counts: of masked patches, or all. Sources on MLIM differ."""


class TeacherConfig(Section):
    """The momentum teacher: teacher = m * teacher + (1 - m) * student, once an optimizer step."""

    momentum: Fraction = 0.995
    """m; 1 never moves the teacher."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` moves the momentum from `momentum` to 1 over the run."""


class VqaConfig(Section):
    """Visual question answering."""

    head: Literal["decoder", "classifier"] = "decoder"
    """`decoder` writes answers word by word and is ranked over the answer list; `classifier` chooses from the list."""
    answer_min_count: Positive = 9
    """An answer is on the list if it is the commonest one to at least this many training questions."""


class ReasoningConfig(Section):
    """Sentences about one image or a pair (NLVR, NLVR2)."""

    cross_layers: Positive = 1
    """Transformer layers across the fused tokens of the images; the last one computes their [CLS] alone."""


class MatchingConfig(Section):
    """Are two listings of a catalogue of the same item?"""

    modality_dropout: Fraction = 0.6667
    """How often one modality of a training pair is dropped, image or text alike. MLIM does not state it; the default
    gives both, image only and text only a third each; 0 never drops."""


class TrainingConfig(Section):
    """The loop."""

    total_steps: Positive = 1000
    """Optimizer steps."""
    batch_size_global: Positive = 64
    """Samples an optimizer step sees, over all processes and micro-batches."""
    micro_batch_size: Positive | None = None
    """Samples a forward pass sees at most; null takes a process's whole share of the batch at once."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: `ddp` copies weights, Adam's state and teacher to each, `fsdp` splits them over all."""
    activation_checkpointing: bool = False
    """Compute the transformer layers again in the backward pass instead of keeping their activations."""
    compile: bool = False
    """Compile the transformer layers with `torch.compile`."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """The highest, reached after the warm-up."""
    learning_rate_min: Annotated[float, Field(ge=0.0)] = 1e-5
    """Where the half cosine ends, at the last step."""
    warmup_steps: NonNegative = 100
    """Steps over which the learning rate grows in a line."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.02
    """Applied to matrices; biases, norms and other vectors have none."""
    adam_beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """AdamW's decay of the mean square of gradients; beta1 is 0.9."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the matrices of the transformer layers, AdamW for all else."""
    gradient_clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Longer gradients, all parameters as one vector, are scaled down to this."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` times both once and writes the faster into the resolved config."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    checkpoint_every_steps: Positive = 500
    """The last step is always saved."""
    checkpoints_kept: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept; two at least, so that a broken one has a predecessor."""


class EvaluationConfig(Section):
    """Zero-shot evaluation at the end, and every `every_steps`."""

    enabled: bool = True
    """Whether to evaluate at all."""
    every_steps: NonNegative = 0
    """0: at the end alone."""
    retrieval_items: Positive = 1000
    """Images in the retrieval gallery (scenes); pairs files are taken whole."""
    near_duplicates: bool = False
    """Half of the gallery (scenes) are pictures that differ from the other half in one word of one object."""
    rerank_k: Positive = 16
    """Shortlist: of ITC's ranking, which ITM re-ranks; of answers by their first token, which are then scored whole."""
    retrieval_folds: Positive = 1
    """Equal galleries that the images of a pairs file are dealt to in order; recalls are means (COCO 1K: 5)."""
    probe_items: Positive = 1000
    """Items a probe, captions of the masked-word test; questions, statements, expressions or pairs of a scenes task."""
    grounding_heat: Literal["fusion", "image_encoder", "occlusion"] = "fusion"
    """How expressions are grounded: where Grad-CAM is read, or by painting patches over; see `mamo.explain`."""
    batch_size: Positive = 256
    """Images, texts or pairs in one forward pass of the evaluation."""


class Config(Section):
    """One run."""

    seed: NonNegative = 0
    """Of weights, order, captions, augmentation, masks and dropout; the embedded world is the same for all seeds."""
    task: Literal["pretrain", "grounding", "vqa", "reasoning", "mlim", "matching"] = "pretrain"
    """What is trained. `pretrain`: the losses of `losses` on image-text pairs, which fine-tune retrieval too.
    `grounding`: the same on images and expressions. `vqa`: answers. `reasoning`: is a sentence true of images?
    `mlim`: pre-training of MLIM on image-text pairs; `matching`: its fine-tuning on pairs of a catalogue's items."""
    output_dir: str
    """Folder of the run: new or empty, unless it is resumed."""
    checkpoint: str | None = None
    """A run or a step folder whose weights start this run, or a file in the layout of the published ALBEF's."""
    from_scratch: bool = False
    """Take architecture, vocabulary and sizes of `checkpoint` but none of its weights: the control of a fine-tuning."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    losses: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    vqa: VqaConfig = VqaConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    matching: MatchingConfig = MatchingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _no_contradiction(self) -> "Config":
        problems = list(contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
