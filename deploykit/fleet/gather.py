"""Files of ``bench --json`` to what is known of each model on each device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from deploykit.errors import DataError, UsageError
from deploykit.recipe.wording import shown

MAX_BYTES = 1 << 20
LARGEST, SMALLEST = 2**53, 1e-6  # beyond them no machine measures, and no chart has an axis


def _printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("printable", "Input should be printable text")
    return text


Line = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
Text = Annotated[Line, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Size = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[FiniteFloat, Field(ge=SMALLEST, le=LARGEST)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1), AfterValidator(lambda share: round(share, 9))]
Difference = Annotated[FiniteFloat, Field(ge=0, le=LARGEST)]


class _Printed(BaseModel):
    """What a program printed: values are taken as they are, keys of later versions passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Device(_Printed):
    """A machine; what it could not find out is None or empty."""

    name: Text
    cpu: Line | None
    machine: Line
    cpu_target: Text
    features: tuple[Text, ...]
    cores: Count | None
    os: Line
    python: Text


class Latency(_Printed):
    """Times of one batch size; milliseconds a batch."""

    batch: Count
    threads: Count
    median_ms: Positive
    p90_ms: Positive
    samples_per_second: Positive
    runs: Count


class Memory(_Printed):
    """Resident memory; None where the system does not tell."""

    peak_bytes: Size | None
    model_bytes: Size | None


class Golden(_Printed):
    """How the golden samples were answered."""

    samples: Count
    max_abs: Difference
    grey_levels: Difference
    passed: Literal[True]


class Measurement(_Printed):
    """What one device said of one bundle."""

    schema_version: Literal[1] = Field(alias="schema")
    name: Text
    version: Text
    target: Text
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    device: Device
    onnxruntime: Text
    provider: Text
    threads: Count
    latency: tuple[Latency, ...] = Field(min_length=1)
    memory: Memory
    golden: Golden
    accuracy: Share | None

    @field_validator("latency")
    @classmethod
    def _times_each_batch_once(
        cls, rows: tuple[Latency, ...], info: ValidationInfo
    ) -> tuple[Latency, ...]:
        threads = {row.threads for row in rows} | {info.data.get("threads")}
        if len({row.batch for row in rows}) < len(rows) or len(threads) > 1:
            raise PydanticCustomError("rows", "Input should be one row a batch, of equal threads")
        return rows

    def at_batch(self, batch: int) -> Latency | None:
        """Return the times of a batch size, None where it was not timed."""
        return next((one for one in self.latency if one.batch == batch), None)


@dataclass(frozen=True)
class Told:
    """One file.

    Attributes:
        file: its name, for messages.
        value: what it holds.
    """

    file: str
    value: Measurement


@dataclass(frozen=True)
class DeployedModel:
    """One bundle on its devices, the fastest first.

    Attributes:
        label: its name and version; part of its digest too where another is called the same.
        told: of each device, at least one; name, version, digest, target and accuracy are equal.
    """

    label: str
    told: tuple[Told, ...]

    @property
    def bundle(self) -> Measurement:
        """What is equal in all of them may be read here."""
        return self.told[0].value


def gather(files: Sequence[Path]) -> list[DeployedModel]:
    """Read files and put those of one bundle together.

    Args:
        files: what ``bench --json`` printed; each device at most once a bundle and thread count.

    Returns:
        The bundles by name, version and digest.

    Raises:
        DataError: a file cannot be used, or contradicts another.
        UsageError: there are none.
    """
    if not files:
        raise UsageError("report --devices: expected at least one file, got none; name some")
    groups: dict[tuple[str, str, str], list[Told]] = {}
    for path in files:
        told = _read(path)
        value = told.value
        group = groups.setdefault((value.name, value.version, value.digest), [])
        for other in group:
            _refuse_contradiction(told, other)
        group.append(told)
    names = Counter((name, version) for name, version, _ in groups)
    return [
        DeployedModel(
            f"{name} {version}" + (f" ({digest[:12]})" if names[name, version] > 1 else ""),
            tuple(sorted(group, key=_speed)),
        )
        for (name, version, digest), group in sorted(groups.items())
    ]


def _speed(told: Told) -> tuple[float, str]:
    first = told.value.at_batch(1)
    return (float("inf") if first is None else first.median_ms), told.value.device.name


def _refuse_contradiction(told: Told, other: Told) -> None:
    """Refuse a device that is there twice, and two files that cannot both be of one bundle."""
    new, old = told.value, other.value
    if (new.device.name, new.threads) == (old.device.name, old.threads):
        raise DataError(
            f"{told.file}: expected one file a device, got {shown(new.device.name)} with "
            f"{new.threads} threads again, as in {other.file}; name devices with bench --device"
        )
    for key in ("target", "accuracy"):
        if getattr(new, key) != getattr(old, key):
            raise DataError(
                f"{told.file}: {key}: expected {shown(getattr(old, key))} as in {other.file}, "
                f"whose bundle is the same, got {shown(getattr(new, key))}; measure again"
            )


def _read(path: Path) -> Told:
    where = str(path) if str(path).isprintable() else repr(str(path))
    try:
        return Told(where, Measurement.model_validate_json(_bytes_of(path, where)))
    except ValidationError as error:
        why = next(_faults(error))
        raise DataError(
            f"{where}: {why}; measure again: python run.py bench --json > FILE"
        ) from error


def _bytes_of(path: Path, where: str) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never end
            raise DataError(
                f"{where}: expected a file that bench --json printed, got something else"
            )
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where}: cannot be read: {reason}; check the path") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{where}: expected at most {MAX_BYTES} bytes, got more; check the path")
    return data


def _faults(error: ValidationError) -> Iterator[str]:
    """Say what is wrong, the schema first."""
    for fault in error.errors(include_url=False):
        if fault["type"] == "json_invalid":
            yield "expected the JSON that bench --json prints, got something else"
            continue
        place = ".".join(map(str, fault["loc"])) or "the file"
        message = fault["msg"]
        if fault["type"] == "missing":
            yield f"{place}: expected it, found none"
        elif message.startswith("Input should be "):
            expected = message.removeprefix("Input should be ")
            yield f"{place}: expected {expected}, got {shown(fault['input'])}"
        else:
            yield f"{place}: {message[0].lower()}{message[1:]}, got {shown(fault['input'])}"
