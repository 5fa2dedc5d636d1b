"""Sections about training."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, FiniteFloat

from deploykit.recipe.data_sections import ModelSection
from deploykit.recipe.section import (
    Count,
    Fraction,
    NonNegative,
    Patterns,
    Positive,
    Section,
    name_of_bits,
)

# Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): soft answers tell of the smaller
# probabilities, and their gradients are scaled by the square of the temperature.
Temperature = Annotated[
    FiniteFloat,
    Field(gt=0, description="distillation: answers are divided by it before they are compared"),
]
Share = Annotated[
    FiniteFloat,
    Field(ge=0, le=1, description="distillation: share of the loss that is the teacher's"),
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
    precision: Annotated[Literal["32", "bf16", "16"], BeforeValidator(name_of_bits)] = Field(
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
