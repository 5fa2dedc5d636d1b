"""The shared words: what stages hand to each other.

``Recipe -> Candidate -> Candidate ... -> OnnxModel -> Report -> Bundle``. Everything here
is immutable; a stage returns a new value and leaves the one it was given alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

JsonDict = dict[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor at the model's border; ``-1`` in ``shape`` is the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> JsonDict:
        """Return plain JSON."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_json` wrote."""
        return cls(value["name"], value["dtype"], tuple(value["shape"]))


@dataclass(frozen=True)
class Signature:
    """What a deployed model takes and gives.

    ``inputs`` are the tensors that a *client* sends. For images that is raw uint8
    ``(N, H, W, C)``: ``preprocess`` tells how an image file becomes that tensor, and its
    ``mean`` and ``std`` (on the 0 to 1 scale) how the model normalizes it inside.
    ``preprocess`` is ``None`` where arrays are fed as they are.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    preprocess: Mapping[str, Any] | None = None

    @property
    def takes_images(self) -> bool:
        """Whether clients send raw pixels."""
        return self.preprocess is not None

    def to_json(self) -> JsonDict:
        """Return plain JSON."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "labels": list(self.labels),
            "preprocess": None if self.preprocess is None else dict(self.preprocess),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signature:
        """Read what `to_json` wrote."""
        return cls(
            inputs=tuple(TensorSpec.from_json(spec) for spec in value["inputs"]),
            outputs=tuple(TensorSpec.from_json(spec) for spec in value["outputs"]),
            labels=tuple(value["labels"]),
            preprocess=value["preprocess"],
        )


@dataclass(frozen=True)
class Candidate:
    """A model at some stage.

    Attributes:
        module: takes normalized float tensors, ``(N, C, H, W)`` for images, and returns
            logits ``(N, classes)``. Quantization is not in the module but in ``structure``,
            from which the integer model is made when it is exported.
        signature: the border of the deployed model.
        structure: JSON from which the module is rebuilt, without its weights:
            ``{"model": {"name", "arguments"}, "input": ..., "widths": ..., "quantization": ...}``;
            an absent key means that nothing of the kind was done.
        stage: the stage that made it, such as ``train`` or ``prune``.
        notes: what the stage wants the report to say (curves, decisions, layers left alone).
    """

    module: nn.Module
    signature: Signature
    structure: Mapping[str, Any]
    stage: str
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file, the border it keeps and the opset it is written in."""

    path: Path
    signature: Signature
    opset: int


@dataclass(frozen=True)
class Report:
    """What was measured and decided; ``to_json`` is the contract of ``report.json``."""

    name: str
    seed: int
    target: str
    threads: int
    environment: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...]
    baseline: Mapping[str, Any]
    final: Mapping[str, Any]
    drop: Mapping[str, Any]
    budget: Mapping[str, Any]
    decisions: tuple[Mapping[str, Any], ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> JsonDict:
        """Return the content of ``report.json``."""
        return {
            "schema": 1,
            "name": self.name,
            "seed": self.seed,
            "target": self.target,
            "threads": self.threads,
            "environment": dict(self.environment),
            "stages": [dict(stage) for stage in self.stages],
            "baseline": dict(self.baseline),
            "final": dict(self.final),
            "drop": dict(self.drop),
            "budget": dict(self.budget),
            "decisions": [dict(decision) for decision in self.decisions],
            "details": dict(self.details),
        }
