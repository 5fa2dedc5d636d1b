"""The sections of a recipe, in the order in which they run, and the recipe itself.

Each class is one section of the YAML; ``docs/recipe.md`` and the help texts are generated
from the descriptions, so they are written for the reader of those.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from deploykit.recipe.compressor_sections import (
    BOUNDS,
    ClusterSection,
    DistillSection,
    Judged,
    PruneSection,
    QuantizeSection,
    RecoverySection,
    SparsifySection,
    SurgerySection,
)
from deploykit.recipe.data_sections import (
    AugmentSection,
    DataSection,
    ModelSection,
    NormalizeSection,
    ResizeSection,
)
from deploykit.recipe.section import Count, NonNegative, Positive, Section, Whole
from deploykit.recipe.train_sections import (
    AverageSection,
    EarlyStoppingSection,
    GroupSection,
    OptimizerSection,
    ScheduleSection,
    TeacherSection,
    TrainSection,
)
from deploykit.targets import TARGETS, Target

__all__ = [
    "BOUNDS",
    "COMPRESSORS",
    "AugmentSection",
    "AverageSection",
    "BudgetSection",
    "ClusterSection",
    "DataSection",
    "DistillSection",
    "EarlyStoppingSection",
    "GroupSection",
    "Judged",
    "ModelSection",
    "NormalizeSection",
    "OptimizerSection",
    "PruneSection",
    "QuantizeSection",
    "Recipe",
    "RecoverySection",
    "ResizeSection",
    "ScheduleSection",
    "Section",
    "SparsifySection",
    "SurgerySection",
    "TeacherSection",
    "TrainSection",
    "VerifySection",
]


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
        "cpu-arm64, cuda (without quantize), tensorrt, web",
    )
    precision: Literal["fp32", "fp16", "fp16-weights", "bf16"] | None = Field(
        None,
        description="floats that ship: fp16 computes in halves, fp16-weights and bf16 store "
        "weights in two bytes and compute in float32; default: the target's (cuda: fp16), else "
        "fp32; not with quantize",
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
        """Return what the model is made of that ships to ``target``: int8, or a `precision`."""
        if self.precision is not None:
            return self.precision
        if target.precision != "int8":
            return target.precision
        return "fp32" if self.quantize is None else "int8"
