"""Sections about samples and about the model that takes them."""

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from deploykit.recipe.section import Count, Fraction, NonNegative, Positive, Section, Whole


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
        0.15, description="fraction above 0 cut from train, or a file or folder of its own"
    )
    test: Fraction | str = Field(
        0.15, description="fraction above 0 cut from train, or a file or folder of its own"
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
