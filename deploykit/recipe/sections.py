"""The sections of a recipe, in the order in which they run.

Each class is one section of the YAML; ``docs/recipe.md`` and the help texts are generated
from the descriptions below, so they are written for the reader of those.
"""

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    model_validator,
)

from deploykit.targets import TARGETS, Target

Fraction = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Patterns = tuple[str, ...]


def _whole(value: object) -> object:
    if isinstance(value, bool | float):  # which equal 1 and so pass for it
        raise ValueError("expected an integer")
    return value


def _name_of_bits(value: object) -> object:
    return str(value) if type(value) is int else value


Whole = BeforeValidator(_whole)


class Section(BaseModel):
    """Frozen, and a stranger to unknown keys and to silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ResizeSection(Section):
    """How an image of another size becomes the model's size."""

    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"] = Field(
        "bilinear", description="resampling filter"
    )
    antialias: bool = Field(True, description="widen the filter when shrinking")
    fit: Literal["stretch", "cover"] = Field(
        "stretch",
        description="stretch to the size, or scale the shorter side and crop the centre",
    )


class NormalizeSection(Section):
    """Pixel statistics on the 0 to 1 scale; one number, or one a channel."""

    mean: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=4)] = Field(
        (0.5,), description="subtracted from the pixels; 0 to 1 scale"
    )
    std: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=4)] = Field(
        (0.5,), description="divides the pixels; 0 to 1 scale"
    )


class AugmentSection(Section):
    """One random change of the training images, drawn for each sample anew."""

    name: Literal[
        "flip", "crop", "rotate", "color", "rand-augment", "auto-augment", "mixup", "cutmix"
    ] = Field(description="which change")
    probability: Annotated[FiniteFloat, Field(ge=0, le=1)] = Field(
        1.0, description="share of samples changed; flip mirrors half of those"
    )
    padding: Annotated[int, Field(ge=0)] = Field(4, description="crop: border added; pixels")
    degrees: NonNegative = Field(10.0, description="rotate: largest angle; degrees")
    strength: NonNegative = Field(
        0.2, description="color: largest change of brightness, contrast, saturation; fraction"
    )
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(
        9, description="rand-augment: strength of each operation; 0 to 30"
    )
    operations: Count = Field(2, description="rand-augment: operations a sample")
    alpha: Positive = Field(0.2, description="mixup, cutmix: parameter of the beta distribution")


class DataSection(Section):
    """Where the samples come from, and how they are split and read."""

    source: str = Field(
        description="digits, parquet, imagefolder, numpy, csv, or path/to/file.py:function"
    )
    train: str | None = Field(None, description="file or folder of the training split; path")
    validation: Fraction | str = Field(
        0.15, description="fraction cut from train, or a file or folder of its own"
    )
    test: Fraction | str = Field(
        0.15, description="fraction cut from train, or a file or folder of its own"
    )
    image_column: str = Field("image", description="parquet, csv: column of the image")
    label_column: str = Field("label", description="parquet, csv: column of the label")
    classes: tuple[str, ...] | None = Field(
        None, description="class names in label order; default: what the data say"
    )
    size: tuple[Count, Count] | None = Field(
        None, description="height and width the model sees; pixels; default: the first image's"
    )
    channels: Annotated[Literal[1, 3], Whole] | None = Field(
        None, description="grey (1) or colour (3); default: the first image's"
    )
    resize: ResizeSection = Field(ResizeSection(), description="how images reach that size")
    normalize: NormalizeSection = Field(NormalizeSection(), description="pixel statistics")
    augment: tuple[AugmentSection, ...] = Field(
        (), description="random changes of training images, in this order"
    )
    limit: Count | None = Field(None, description="use at most so many rows a file; for trials")

    @model_validator(mode="after")
    def _normalize_matches_channels(self) -> Self:
        for key, values in (("mean", self.normalize.mean), ("std", self.normalize.std)):
            if self.channels is not None and len(values) not in (1, self.channels):
                raise ValueError(
                    f"data.normalize.{key}: expected 1 or {self.channels} numbers, "
                    f"got {len(values)}"
                )
        return self

    @model_validator(mode="after")
    def _train_keeps_samples(self) -> Self:
        cut = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if sum(cut) >= 1:
            raise ValueError(f"data.test: expected validation + test < 1, got {sum(cut):g}")
        return self


class ModelSection(Section):
    """The float model that the run starts from."""

    name: str = Field(
        description="digits-cnn, mlp, resnet20/32/44/56, torchvision:NAME, timm:NAME, "
        "or path/to/file.py:function"
    )
    weights: str | None = Field(
        None, description=".safetensors, or .pt/.pth/.th of plain tensors; path"
    )
    arguments: dict[str, bool | int | float | str | list[int]] = Field(
        {}, description="keyword arguments of the model's factory"
    )


# Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): soft answers tell of the smaller
# probabilities, and their gradients are scaled by the square of the temperature.
Temperature = Annotated[
    FiniteFloat,
    Field(gt=0, description="distillation: answers are divided by it before they are compared"),
]
Share = Annotated[
    FiniteFloat,
    Field(ge=0, le=1, description="distillation: share of the loss that is not the labels'"),
]


class TeacherSection(ModelSection):
    """A model whose answers are learned from beside the labels."""

    temperature: Temperature = 4.0
    share: Share = 0.9


class OptimizerSection(Section):
    """How weights move."""

    name: Literal["sgd", "adam", "adamw", "rmsprop"] = Field("sgd", description="algorithm")
    lr: Positive = Field(0.01, description="peak learning rate")
    momentum: Fraction = Field(0.9, description="sgd, rmsprop")
    nesterov: bool = Field(True, description="sgd: Nesterov's momentum")
    weight_decay: NonNegative = Field(1.0e-4, description="not applied to norms and biases")


class ScheduleSection(Section):
    """How the learning rate moves within a stage."""

    name: Literal["constant", "step", "cosine", "one-cycle", "plateau"] = Field(
        "cosine", description="shape of the curve"
    )
    warmup: Fraction = Field(0.0, description="share of the steps that rise from 0 to the peak")
    milestones: tuple[Fraction, ...] = Field(
        (0.5, 0.75), description="step: shares of the stage after which the rate falls"
    )
    factor: Annotated[FiniteFloat, Field(gt=0, lt=1)] = Field(
        0.1, description="step, plateau: the rate is multiplied by it"
    )
    patience: Count = Field(2, description="plateau: epochs without gain before the rate falls")
    final: Fraction = Field(0.0, description="cosine, one-cycle: last rate as share of the peak")


class GroupSection(Section):
    """Modules that thaw late, or learn at a rate of their own."""

    modules: Patterns = Field(
        description="shell patterns over module names, for example layer1.* or *bn*"
    )
    thaw_epoch: Annotated[int, Field(ge=0)] | Literal["never"] = Field(
        0, description="epoch (from 0) at which they begin to learn, or never"
    )
    lr_factor: Positive = Field(1.0, description="multiplies the learning rate")


class EarlyStoppingSection(Section):
    """Stop when validation no longer improves."""

    patience: Count = Field(5, description="epochs without gain before the stage stops")
    min_delta: NonNegative = Field(0.0, description="smallest gain that counts; accuracy, 0 to 1")


class AverageSection(Section):
    """A running mean of the weights that is evaluated and kept in their place."""

    name: Literal["ema", "swa"] = Field(
        description="exponential moving average, or equal-weight mean of the last epochs"
    )
    decay: Annotated[FiniteFloat, Field(gt=0, lt=1)] = Field(
        0.999, description="ema: weight of the past at each step"
    )
    start: Fraction = Field(0.75, description="swa: share of the stage after which it begins")


class TrainSection(Section):
    """Training or fine-tuning of the float model."""

    epochs: Annotated[int, Field(ge=0)] = Field(10, description="passes over the training split")
    batch_size: Count = Field(128, description="samples a step")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="how weights move")
    schedule: ScheduleSection = Field(ScheduleSection(), description="how the rate moves")
    label_smoothing: Fraction = Field(0.0, description="share of the target spread over classes")
    gradient_clip: Positive | None = Field(None, description="largest norm of the gradient")
    accumulate: Count = Field(1, description="batches whose gradients are summed into one step")
    precision: Annotated[Literal["32", "bf16", "16"], BeforeValidator(_name_of_bits)] = Field(
        "32", description="32, or mixed with bf16 or 16 bits"
    )
    groups: tuple[GroupSection, ...] = Field(
        (), description="freezing and rates by module; the first pattern that fits counts"
    )
    early_stopping: EarlyStoppingSection | None = Field(None, description="stop without gain")
    keep: Literal["best", "last"] = Field(
        "best", description="weights kept: those of the best validation epoch, or the last"
    )
    average: AverageSection | None = Field(None, description="mean of the weights")
    teacher: TeacherSection | None = Field(
        None, description="a model that knows the classes, to learn from beside the labels"
    )


UnlessItPays = Annotated[
    Literal["drop", "keep", "fail"],
    Field(
        description="what becomes of a stage that makes the shipped model slower at batch 1, or "
        "neither faster nor smaller: drop it, keep it, or fail"
    ),
]


class DistillSection(Section):
    """A smaller model learns from the trained one and goes on in its place."""

    student: ModelSection = Field(description="the model that goes on")
    temperature: Temperature = 4.0
    share: Share = 0.9
    epochs: Annotated[int, Field(ge=0)] = Field(10, description="training of the student; epochs")
    lr: Positive | None = Field(None, description="peak learning rate; default: train's")
    schedule: ScheduleSection | None = Field(
        None, description="how the rate moves; default: train's"
    )
    unless_it_pays: UnlessItPays = "drop"


BOUNDS = ("speedup", "latency_ms", "macs")


class RecoverySection(Section):
    """What stages share that alter the weights: training that wins accuracy back."""

    epochs: Annotated[int, Field(ge=0)] = Field(3, description="recovery training; epochs")
    lr: Positive | None = Field(None, description="peak learning rate; default: a tenth of train's")
    schedule: ScheduleSection = Field(ScheduleSection(), description="how the rate moves")
    distill: bool = Field(False, description="learn from the float model's answers as well")
    temperature: Temperature = 4.0
    share: Share = 0.9
    unless_it_pays: UnlessItPays = "drop"


Judged = DistillSection | RecoverySection  # whose stage has to pay


class PruneSection(RecoverySection):
    """Removal of channels and of residual blocks; one of four keys says how much."""

    speedup: Annotated[FiniteFloat, Field(ge=1)] | None = Field(
        None,
        description="times faster at batch 1 than unpruned, measured in the precision that ships",
    )
    latency_ms: Positive | None = Field(
        None, description="latency at batch 1, measured in the precision that ships; ms"
    )
    macs: Annotated[FiniteFloat, Field(ge=1)] | None = Field(
        None, description="times fewer multiply-accumulates; to compare with"
    )
    channel_ratio: Fraction = Field(
        0.3, description="share of the channels to remove, where none of the three above counts"
    )
    depth: bool = Field(
        True, description="speedup, latency_ms, macs: whole residual blocks may go as well"
    )
    importance: Literal["l1", "l2", "taylor"] = Field(
        "l2", description="what makes a channel worth keeping"
    )
    scope: Literal["global", "uniform"] = Field(
        "global", description="rank channels over all layers, or take the same share of each"
    )
    steps: Count = Field(1, description="prune in so many steps, each followed by recovery")
    protect: Patterns = Field((), description="shell patterns of modules to leave whole")
    channel_multiple: Count | None = Field(
        None, description="widths are multiples of it; default: the target's"
    )

    @model_validator(mode="after")
    def _one_says_how_much(self) -> Self:
        given = [key for key in BOUNDS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"prune.{given[1]}: expected one of {', '.join(BOUNDS)}, got "
                f"{' and '.join(given)}; remove all but one"
            )
        if self.importance == "taylor" and given:
            raise ValueError(
                f"prune.importance: expected l1 or l2 with {given[0]}, got taylor; change it"
            )
        return self

    @property
    def how_much(self) -> tuple[str, float]:
        """The key that says how much is pruned, and its value."""
        for key in BOUNDS:
            if (value := getattr(self, key)) is not None:
                return key, value
        return "channel_ratio", self.channel_ratio


class SurgerySection(RecoverySection):
    """Operators that integers run slowly give way to ones that cost nothing."""

    activations: bool = Field(True, description="hard-swish, SiLU and Mish become ReLU6")
    squeeze_excite: bool = Field(
        True,
        description="squeeze-and-excite goes, its mean factors into the weights of a neighbour",
    )
    protect: Patterns = Field((), description="shell patterns of modules to leave whole")


class SparsifySection(RecoverySection):
    """Zeros among the weights: a smaller file, at the same speed."""

    ratio: Fraction = Field(0.8, description="share of the weights that become zero")
    scope: Literal["global", "uniform"] = Field(
        "global", description="rank weights over all layers, or take the same share of each"
    )
    protect: Patterns = Field((), description="shell patterns of modules to leave whole")


class ClusterSection(RecoverySection):
    """Few values shared by the weights of a layer: a smaller file, at the same speed."""

    bits: Annotated[Literal[2, 4, 8], Whole] = Field(
        4, description="of the index of a shared value; a layer has 4, 16 or 256 values"
    )
    protect: Patterns = Field((), description="shell patterns of modules to leave whole")


class QuantizeSection(RecoverySection):
    """Integer weights and activations."""

    mode: Literal["auto", "ptq", "qat"] = Field(
        "auto", description="calibrate only (ptq), train (qat), or qat only if ptq breaks max_drop"
    )
    calibration_samples: Count = Field(512, description="training samples that set the ranges")
    freeze_statistics: Fraction = Field(
        0.5, description="share of the epochs after which BatchNorm and ranges stand still"
    )
    keep_float: Patterns = Field((), description="shell patterns of modules to leave in float")
    mix: bool = Field(
        True,
        description="layers that are not faster in integers stay in float as well, by measurement, "
        "where this machine is the target",
    )
    align: bool = Field(
        True,
        description="depthwise layers get channels of zeros up to a full block of the kernel's, "
        "where that is measured to be faster",
    )
    min_sqnr: Positive | None = Field(
        None,
        description="ptq: smallest signal-to-quantization-noise ratio of the logits, dB; layers "
        "stay in float, the most sensitive first, until it holds",
    )


class VerifySection(Section):
    """How closely ONNX Runtime must agree with torch."""

    samples: Count = Field(512, description="validation samples compared")
    min_agreement: Annotated[FiniteFloat, Field(gt=0, le=1)] = Field(
        0.98, description="smallest share of equal top-1 answers"
    )
    max_steps: Positive = Field(8.0, description="largest error; steps of the output's scale")


class BudgetSection(Section):
    """What the final model must hold for the run to succeed."""

    max_drop: NonNegative | None = Field(
        None, description="largest loss of validation accuracy against the float model; 0 to 1"
    )
    min_speedup: Positive | None = Field(
        None, description="smallest latency ratio against the float model at batch 1"
    )
    confidence: Annotated[FiniteFloat, Field(gt=0.5, lt=1)] | None = Field(
        None, description="accept only if the drop's interval at this level holds max_drop"
    )
    trials: Count = Field(
        3,
        description="tries to hold the budget: the recipe as it stands, then with less pruning "
        "where accuracy is missing, or more where speed is",
    )
    trial_epochs: Count | None = Field(
        None,
        description="most epochs of recovery, prune and quantize together, in each try after the "
        "first; default: as those sections say",
    )


# Sections that each make a stage out of the one before, in the order in which they run.
COMPRESSORS = ("distill", "surgery", "prune", "sparsify", "cluster", "quantize")


class Recipe(Section):
    """One run, from data to bundle; an absent section is a skipped stage."""

    # "schema" would shadow a method of pydantic's.
    version: Annotated[Literal[1], Whole] = Field(
        alias="schema", description="version of this format"
    )
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = Field(
        description="name of the run and of its bundle; lower case, digits, . _ -"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="all randomness follows")
    task: Literal["image-classification", "classification"] = Field(
        description="classification takes arrays in place of images"
    )
    target: str = Field(
        "cpu",
        description="where the model will run: cpu (this machine's), cpu-x86-vnni, cpu-x86-avx2, "
        "cpu-arm64, cuda, tensorrt, web",
    )
    precision: Literal["fp32", "fp16", "bf16"] | None = Field(
        None,
        description="floats that ship: fp16 computes in halves, bf16 stores weights in two bytes "
        "and computes in float32; default: the target's (cuda: fp16), else fp32; not with quantize",
    )
    threads: Count = Field(1, description="threads of every latency figure")
    data: DataSection = Field(description="samples")
    model: ModelSection = Field(description="starting point")
    train: TrainSection | None = Field(None, description="training or fine-tuning")
    distill: DistillSection | None = Field(None, description="a smaller model in its place")
    surgery: SurgerySection | None = Field(None, description="slow operators replaced")
    prune: PruneSection | None = Field(None, description="removal of channels")
    sparsify: SparsifySection | None = Field(None, description="zeros, for size")
    cluster: ClusterSection | None = Field(None, description="shared weights, for size")
    quantize: QuantizeSection | None = Field(None, description="integer arithmetic")
    verify: VerifySection = Field(VerifySection(), description="proof of the exported model")
    budget: BudgetSection | None = Field(None, description="what must hold")

    @model_validator(mode="after")
    def _ships_one_precision(self) -> Self:
        if self.quantize is None:
            return self
        if self.precision is not None:
            raise ValueError(
                f"precision: expected none beside quantize, which ships int8, got "
                f"{self.precision}; drop one of them"
            )
        target = TARGETS.get(self.target)
        if target is not None and target.precision != "int8":
            raise ValueError(
                f"quantize: expected none for target {target.name}, which has no integer kernels "
                f"and ships {target.precision}; drop it (--set quantize=null), or choose tensorrt"
            )
        return self

    @model_validator(mode="after")
    def _clusters_are_smaller_than_integers(self) -> Self:
        if self.quantize is not None and self.cluster is not None and self.cluster.bits == 8:
            raise ValueError(
                "cluster.bits: expected 2 or 4 beside quantize, whose integers have 8 bits "
                "themselves, got 8; lower it, or drop one of the sections"
            )
        return self

    @property
    def compressors(self) -> tuple[str, ...]:
        """The stages that are asked for, beside the first and the conversion to other floats."""
        return tuple(name for name in COMPRESSORS if getattr(self, name) is not None)

    def precision_on(self, target: Target) -> str:
        """Return what the model computes in that ships to ``target``: int8, fp32, fp16 or bf16."""
        if self.precision is not None:
            return self.precision
        if target.precision != "int8":
            return target.precision
        return "fp32" if self.quantize is None else "int8"
