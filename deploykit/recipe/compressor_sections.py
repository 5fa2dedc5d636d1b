"""Sections that each make a stage out of the one before."""

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from deploykit.recipe.data_sections import ModelSection
from deploykit.recipe.section import Count, Fraction, Patterns, Positive, Section, Whole
from deploykit.recipe.train_sections import ScheduleSection, Share, Temperature

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
        "l2", description="what makes a channel worth keeping; taylor: with channel_ratio only"
    )
    scope: Literal["global", "uniform"] = Field(
        "global",
        description="channel_ratio: rank channels over all layers, or take the same share of each",
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
        description="squeeze-and-excite goes; its mean effect moves to the weights beside it",
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
        False,
        description="layers that are not faster in integers stay in float as well, by measurement, "
        "where this machine is the target; a trial for min_speedup may turn it on",
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

    @model_validator(mode="after")
    def _training_takes_epochs(self) -> Self:
        if self.mode == "qat" and not self.epochs:
            raise ValueError(
                "quantize.epochs: expected at least 1 with mode: qat, got 0; raise it, or choose "
                "mode: ptq, which trains nothing"
            )
        return self
