"""Typed, strict configuration: YAML file -> `section.key=value` overrides -> one validated, frozen config of its task.

`RunConfig` has the keys that every task uses. Each task adds its own sections in `mamo/tasks/NAME/config.py`.
Every problem in a file is reported at once, each with its dotted path, the value found and the nearest valid key,
before a model is built.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mamo.config.images import AugmentationConfig, ImageEncoderConfig
from mamo.config.section import (
    Fraction,
    LoggingConfig,
    NonNegative,
    Positive,
    Settings,
    Weight,
    expanded_paths,
    repeated_stems,
)
from mamo.config.section import Section as Section
from mamo.config.training import TrainingConfig as TrainingConfig
from mamo.config.values import expand_path

GroundingHeat = Literal["fusion", "image_encoder", "occlusion"]
ItemScore = Literal["itm", "itc", "itm+itc", "text"]

DEFAULT_TASK = "pretrain"
"""Task of a file that names none."""


class BadSampleConfig(Section):
    """Policy for samples whose image or caption cannot be used."""

    policy: Literal["raise", "skip"] = "raise"
    """`raise` stops at the first; `skip` counts, names and replaces each until the budget is spent."""
    budget: Fraction = 0.001
    """Largest share of bad samples among the samples drawn."""


CaptionWeights = dict[str, Weight]


class TrainSource(Section):
    """One file of a mixture of training pairs."""

    file: str
    """In any of the formats of `data.train_file`."""
    repeat: Positive = 1
    """How many times an epoch has each of its pairs."""
    caption_keys: CaptionWeights = {}
    """Fields of its captions, with weights; empty: those of `data.caption_keys`."""

    @field_validator("file")
    @classmethod
    def _expanded(cls, value: str) -> str:
        return expand_path(value)

    def problems(self) -> Iterator[str]:
        """Yield weights that choose nothing."""
        if self.caption_keys and not sum(self.caption_keys.values()):
            yield "caption_keys: the weights sum to 0; give one above 0"


class DataConfig(Section):
    """Images and texts."""

    source: Literal["scenes", "pairs", "records"] = "scenes"
    """`scenes`: the embedded world. `pairs`: files of image-text pairs. `records`: JSON Lines of the task's records."""
    difficulty: Literal["easy", "full"] = "easy"
    """Difficulty of the embedded world."""
    train_scenes: Positive = 1_000_000
    """Number of distinct training scenes; none is stored, each is drawn when needed."""
    curriculum_scenes: list[Positive] = []
    """How many training scenes show one object at most, how many two, ...; they come first. Even numbers: twins."""
    train_file: str | list[str] | None = None
    """One or several: JSON Lines; of pairs also CSV, TSV, `metadata.jsonl`, COCO's, ALBEF's or Karpathy's JSON, or a
    folder, glob or URL of tar shards."""
    train: list[TrainSource] = []
    """A mixture of training pairs in place of `train_file`: entries with `file`, `repeat` and `caption_keys`."""
    batch_from: Literal["mixture", "one_file"] = "mixture"
    """`one_file`: each batch has pairs of one file only; the files take turns in proportion to their pairs."""
    caption_keys: CaptionWeights = {}
    """Fields of the training captions, with weights, such as {re_caption: 0.7, caption: 0.3}; empty: `caption`."""
    sub_caption_sentences: NonNegative = 0
    """A caption of several sentences gives 1 to so many consecutive ones, drawn anew each epoch (FLAIR); 0: the whole
    caption. Evaluation reads whole captions."""
    columns: list[str] = []
    """Names of the columns of CSV and TSV files that have no header."""
    train_split: str | None = None
    """Split to take from a Karpathy file."""
    eval_file: str | list[str] | None = None
    """Held-out pairs in the same formats; of several files each has metrics of its own, named by the file."""
    eval_caption_keys: list[str] = []
    """Fields of the held-out captions, each of which is right; empty: `caption`."""
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
    workers: NonNegative | Literal["auto"] = 1
    """Loader processes; any number gives the same run. `auto`: the cores that are left, and one without a GPU."""
    augmentation: AugmentationConfig = AugmentationConfig()
    bad_samples: BadSampleConfig = BadSampleConfig()

    @field_validator("train_file", "eval_file", "statements_file", "tokenizer")
    @classmethod
    def _expanded(cls, value: str | list[str] | None) -> str | list[str] | None:
        return expanded_paths(value)

    @field_validator("image_size_px")
    @classmethod
    def _two_sides(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, int) or len(value) == 2:
            return value
        raise ValueError("give one side or [height, width]")

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the keys of `data`."""
        if self.source != "scenes" and not self.train_files:
            yield f"train_file: needed when data.source is {self.source}"
        if self.train and self.train_file is not None:
            yield "train: contradicts data.train_file; list that file in data.train"
        if self.caption_keys and not sum(self.caption_keys.values()):
            yield "caption_keys: the weights sum to 0; give one above 0"
        for number, entry in enumerate(self.train):
            yield from (f"train.{number}.{problem}" for problem in entry.problems())
        for key in ("train", "batch_from", "caption_keys", "sub_caption_sentences", "columns", "eval_caption_keys"):
            if self.source != "pairs" and getattr(self, key) != type(self).model_fields[key].default:
                yield f"{key}: contradicts data.source: {self.source}; it is for pairs; remove it"
        yield from self.augmentation.source_problems(self.source)
        if self.source == "records":
            for key in ("train_split", "eval_split", "statements_file"):
                if getattr(self, key) is not None:
                    yield f"{key}: contradicts data.source: records, whose files hold one split each"
        yield from (f"eval_file: {line}" for line in repeated_stems(self.eval_files))
        if sum(self.curriculum_scenes) > self.train_scenes:
            n_scenes = sum(self.curriculum_scenes)
            yield f"curriculum_scenes: {n_scenes} scenes are more than train_scenes {self.train_scenes}"
        if any(n % 2 for n in self.curriculum_scenes):
            yield "curriculum_scenes: scenes come in pairs; use even numbers"

    @property
    def train_files(self) -> list[str]:
        """Return the training files as a list."""
        return [entry.file for entry in self.train_sources]

    @property
    def train_sources(self) -> list[TrainSource]:
        """Return the mixture: `train`, or each file of `train_file` once."""
        files = self.train_file or []
        return self.train or [TrainSource(file=file) for file in ([files] if isinstance(files, str) else files)]

    @property
    def eval_files(self) -> list[str]:
        """Return the held-out files as a list."""
        return [self.eval_file] if isinstance(self.eval_file, str) else list(self.eval_file or [])

    @property
    def eval_path(self) -> str | None:
        """Return the held-out file, the first of several; each evaluation is on one, see `per_eval_file`."""
        return next(iter(self.eval_files), None)

    @property
    def eval_names(self) -> list[str]:
        """Return the names with which the metrics of several held-out files begin; none of one file."""
        return [Path(file).stem for file in self.eval_files] if len(self.eval_files) > 1 else []

    def per_eval_file(self) -> list["DataConfig"]:
        """Return a copy for each held-out file; the statements are evaluated with the first."""
        return [
            self.model_copy(update={"eval_file": file, "statements_file": None if k else self.statements_file})
            for k, file in enumerate(self.eval_files)
        ] or [self]

    @property
    def eval_keys(self) -> CaptionWeights:
        """Return the fields of the held-out captions with equal weights, {} for `caption`."""
        return dict.fromkeys(self.eval_caption_keys, 1.0)

    @property
    def image_size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        sides = self.image_size_px
        return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


class TextEncoderConfig(Section):
    """The lower layers of a Hugging Face BERT."""

    bert: str | None = None
    """Folder or hub name of a BERT, RoBERTa, XLM-R, DistilBERT, ModernBERT, CLIP or SigLIP; its config replaces the
    numbers below."""
    weights: Literal["random", "bert"] = "random"
    """`bert` loads the weights of `bert`: lower layers here, upper layers, where they are BERT's, into fusion."""
    width: Positive = 192
    """Features of a token; fusion is as wide."""
    heads: Positive = 3
    """Attention heads, in fusion too; they divide `width`."""
    mlp_width: Positive = 768
    """Hidden features of the MLP of each layer, in fusion too."""
    layers: Positive = 3
    """Number of lower layers that form the text encoder; of MLIM all layers, which patches pass too. Of
    ModernBERT, CLIP and SigLIP all are taken."""

    @field_validator("bert")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return None if value is None else expand_path(value)

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the keys of `model.text`."""
        if self.weights == "bert" and self.bert is None:
            yield "bert: needed when model.text.weights is bert"


class TextTowerConfig(TextEncoderConfig):
    """The lower layers of a Hugging Face BERT, or a text tower from outside."""

    name: str | None = None
    """Text tower by its class, `module:Class`; null: BERT."""
    sep: bool = True
    """End texts with [SEP]; ALBEF does not. Answers of VQA always do."""
    cleaning: Literal["plain", "albef"] = "plain"
    """`plain`: normalise Unicode and spaces; `albef`: as its code, lower case without most marks, 30 words at most."""
    settings: Settings = {}
    """Settings of that class."""


class ModelConfig(Section):
    """Keys that the network of every task has."""

    preset: Literal["tiny", "small", "base"] = "tiny"
    """Values for every key below that the file does not give; see `mamo/config/presets.py`."""
    text: TextEncoderConfig = TextEncoderConfig()
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of text encoder and fusion."""

    @property
    def text_source(self) -> str | None:
        """Return the folder or hub name of a published text encoder, None for one of the sizes in `text`."""
        return self.text.bert


class MamoModelConfig(ModelConfig):
    """The network of MAMO: two encoders and a fusion."""

    clip: str | None = None
    """Folder or hub name of a whole CLIP or SigLIP, of transformers or open_clip: its text tower, the weights of both
    towers, projections and temperature; the fusion starts anew. `image.name` names its image tower in timm."""
    image: ImageEncoderConfig = ImageEncoderConfig()
    text: TextTowerConfig = TextTowerConfig()
    fusion_type: Literal["concat", "cross"] = "concat"
    """`concat`: self-attention over image and text, outputs for both; `cross`: text attends to the image (ALBEF)."""
    fusion_layers: Positive = 3
    """Transformer layers over the tokens of image and text."""
    itc_width: Positive = 128
    """Width of the shared ITC space."""
    mim_head_blocks: Annotated[int, Field(ge=0, le=6)] = 0
    """0: an MLP; 1 to 6: transformer blocks over the masked slots (Table 10)."""

    @field_validator("clip")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return None if value is None else expand_path(value)

    @property
    def text_source(self) -> str | None:
        """See `ModelConfig.text_source`."""
        return self.clip or self.text.bert

    def problems(self) -> Iterator[str]:
        """Yield keys that name weights in place of those of `clip`."""
        for key, value in (
            ("image.weights", self.image.weights != "random"),
            ("text.bert", self.text.bert is not None),
            ("text.name", self.text.name is not None),
        ):
            if self.clip is not None and value:
                yield f"{key}: contradicts model.clip, which gives both towers; remove one of the two"


class EvaluationConfig(Section):
    """Zero-shot evaluation at the end, and every `every_steps`."""

    enabled: bool = True
    """Whether to evaluate at all."""
    network: Literal["student", "teacher"] = "student"
    """`teacher`: its backbone, the moving average of the student's, with the student's heads."""
    every_steps: NonNegative = 0
    """0: only at the end."""
    retrieval_items: Positive = 1000
    """Images in the retrieval gallery (scenes); pairs files are taken whole."""
    near_duplicates: bool = False
    """Half of the gallery (scenes) are pictures that differ from the other half in one word of one object."""
    rerank_k: Positive = 16
    """Shortlist: of ITC's ranking, which ITM re-ranks; of answers by their first token, which are then scored whole."""
    retrieval_folds: Positive = 1
    """Equal galleries that the images of a pairs file are dealt to in order; recalls are means (COCO 1K: 5)."""
    repeated_captions: Literal["merged", "separate"] = "merged"
    """A caption that occurs again: `merged` to one item, right for all its images; `separate` items, as published."""
    rankings_depth: NonNegative = 0
    """Best items of each query of a pairs file, written to `rankings.jsonl` with their ids; 0 writes none."""
    corrected: bool = False
    """R-precision, mAP@R and CxC recalls of COCO's test images by the package `eccv_caption`, from the rankings."""
    probe_items: Positive = 1000
    """Items a probe, captions of the masked-word test; questions, statements, expressions or pairs of a scenes task."""
    patch_scenes: NonNegative = 0
    """Scenes on which read-outs of single patches are fitted, and as many on which they are judged; 0: none."""
    grounding_heat: GroundingHeat = "fusion"
    """How expressions are grounded: where Grad-CAM is read, or by painting patches over; see `mamo.explain`."""
    itm_score: Literal["difference", "match"] = "difference"
    """What re-ranks and Grad-CAM explains: match minus mismatch logit, or the match logit only, as ALBEF does."""
    heat_resize: Literal["cut", "uncut"] = "cut"
    """Heat of records below 0 after bicubic resizing to the image: `cut` at 0, or `uncut`, as ALBEF does."""
    batch_size: Positive = 256
    """Images, texts or pairs in one forward pass of the evaluation."""
    items_files: list[str] = []
    """Items of fine-grained sets (JSON Lines), one or several files, scored in fp32 at every evaluation."""
    items_scores: list[ItemScore] = ["itm", "itc", "itm+itc", "text"]
    """Scores of the items: ITM, ITC, their sum, and of texts without the image, as far as the network has the heads."""

    @field_validator("items_files", mode="before")
    @classmethod
    def _one_file(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("items_files")
    @classmethod
    def _expanded(cls, value: list[str]) -> list[str]:
        return [expand_path(path) for path in value]

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the keys of `evaluation`."""
        yield from (f"items_files: {line}" for line in repeated_stems(self.items_files))
        if self.rankings_depth and (self.repeated_captions != "separate" or self.retrieval_folds > 1):
            yield "rankings_depth: needs repeated_captions: separate and retrieval_folds: 1; a caption has one id then"
        if self.corrected and not self.rankings_depth:
            yield "corrected: needs rankings_depth, from which it is computed"
        if not self.items_scores:
            yield "items_scores: is empty; name one or more of itm, itc, itm+itc, text"


class RunConfig(Section):
    """One run: the keys that every task uses."""

    file_source: ClassVar[Literal["pairs", "records"] | None] = "pairs"
    """`data.source` of the task's files; None: the task has scenes only."""
    scores_items: ClassVar[bool] = False
    """Whether the task scores `evaluation.items_files`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of weights, order, captions, augmentation, masks and dropout; the embedded world is the same for all seeds."""
    task: str
    """What is trained, by name, or a task from outside by its class, `module:Class`."""
    output_dir: str
    """Folder of the run: new or empty, unless it is resumed."""
    checkpoint: str | None = None
    """A run or a step folder whose weights start this run, or a file in the layout of the published ALBEF's."""
    from_scratch: bool = False
    """Take architecture, vocabulary and sizes of `checkpoint` but none of its weights: the control of a fine-tuning."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("output_dir", "checkpoint")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return None if value is None else expand_path(value)

    @property
    def pass_unit(self) -> int:
        """Return how many consecutive samples must share a forward pass."""
        return 1

    @property
    def masks_words(self) -> bool:
        """Say whether the task masks words, so that its tokenizer needs [MASK]."""
        return False

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the sections that every task has."""
        yield from self._source_problems()
        if self.data.source != "pairs" and self.evaluation.retrieval_folds > 1:
            yield f"evaluation.retrieval_folds: divides the images of data.source: pairs, not of {self.data.source}"
        if self.evaluation.patch_scenes and (self.task, self.data.source) != ("pretrain", "scenes"):
            yield "evaluation.patch_scenes: read by task pretrain on data.source: scenes only; use 0"
        if self.evaluation.items_files and not self.scores_items:
            yield f"evaluation.items_files: not scored by task {self.task}; remove it"
        if self.evaluation.network == "teacher" and not hasattr(self, "teacher"):
            yield f"evaluation.network: task {self.task} has no teacher; use student"
        yield from self._keep_best_problems()
        if self.from_scratch and self.checkpoint is None:
            yield "from_scratch: needs a checkpoint, whose architecture it takes"
        if self.training.micro_batch % self.pass_unit:
            yield (
                f"losses.itm_pool_size: {self.pass_unit} does not divide the micro-batch of {self.training.micro_batch}"
            )

    def _keep_best_problems(self) -> Iterator[str]:
        every, saved = self.evaluation.every_steps, self.training.checkpoint_every_steps
        if self.training.keep_best is None:
            return
        if not self.evaluation.enabled or not every:
            yield "training.keep_best: needs evaluation.every_steps, whose evaluations it compares"
        elif every % saved:
            yield (
                f"training.keep_best: evaluation.every_steps {every} is no multiple of training.checkpoint_every_steps "
                f"{saved}, and only a saved step can be kept"
            )

    def _source_problems(self) -> Iterator[str]:
        data, files = self.data, self.file_source
        if data.source not in ("scenes", files):
            valid = "scenes" if files is None else f"scenes or {files}"
            yield f"data.source: {data.source} contradicts task {self.task}; use {valid}"
        if (
            data.source != "scenes"
            and self.evaluation.enabled
            and data.eval_path is None
            and not (self.evaluation.items_files)
        ):
            name = f"name held-out {files} or " if files else ""
            yield f"data.eval_file: needed when evaluation.enabled is true; {name}disable evaluation"
        if data.source == "scenes":
            remedy = f"use data.source: {files}" if files else "remove it"
            for key in ("train_file", "train_split", "eval_file", "eval_split", "statements_file"):
                if getattr(data, key) is not None:
                    yield f"data.{key}: contradicts data.source: scenes; {remedy}"
        if data.curriculum_scenes and (data.source != "scenes" or files != "pairs"):
            yield "data.curriculum_scenes: is for image-text pairs of data.source: scenes; remove it"

    @model_validator(mode="after")
    def _check_problems(self) -> "RunConfig":
        problems = list(self.all_problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self


class MamoConfig(RunConfig):
    """One run with the network of MAMO."""

    model: MamoModelConfig = MamoModelConfig()

    def problems(self) -> Iterator[str]:
        """Yield also what cross-attention fusion cannot do."""
        yield from super().problems()
        if self.model.fusion_type == "cross":
            yield from self.cross_fusion_problems()

    def cross_fusion_problems(self) -> Iterator[str]:
        """Yield `dotted.key: what is wrong` for what needs `model.fusion_type: concat`."""
        yield from ()
