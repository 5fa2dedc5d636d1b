"""What a section of a recipe is, and the kinds of values that its keys take."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

Fraction = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Patterns = tuple[str, ...]


def _whole(value: object) -> object:
    if isinstance(value, bool | float):  # which equal 1 and so pass for it
        raise ValueError("expected an integer")
    return value


def name_of_bits(value: object) -> object:
    """Let a number of bits pass for its name."""
    return str(value) if type(value) is int else value


Whole = BeforeValidator(_whole)


class Section(BaseModel):
    """Frozen, and a stranger to unknown keys and to silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
