"""What ships against what was given: the same answers, or how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from deploykit import runtime
from deploykit.artifacts import JsonDict
from deploykit.data.dataset import Split
from deploykit.errors import VerificationError
from deploykit.recipe.sections import VerifySection
from deploykit.targets import Target, resolve_target

SIZES = (1, 2, 7, 64)
LEVELS = 255  # steps that an 8-bit output would have
HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Agreement:
    """Two models on the same samples.

    Attributes:
        between: which two.
        samples: how many.
        agreement: share of equal top-1 answers.
        max_abs: largest difference of an answer.
        scale: 1/255 of the range of the first model's answers.
        max_steps: ``max_abs`` in that scale.
        allowed_steps: what it was held to; None where it was not.
    """

    between: str
    samples: int
    agreement: float
    max_abs: float
    scale: float
    max_steps: float
    allowed_steps: float | None

    def to_json(self) -> JsonDict:
        """Return plain JSON, without what it was not held to."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def answers(
    session: Any,
    split: Split,
    count: int,
    prepare: Callable[[np.ndarray], np.ndarray] = np.asarray,
    sizes: Sequence[int] = SIZES,
) -> np.ndarray:
    """Return a model's answers to the first samples of a split, in batches of several sizes.

    Args:
        session: the model, opened.
        split: samples as a client sends them.
        count: how many.
        prepare: makes of them what the model takes.
        sizes: of the batches in turn, the last one repeated.

    Raises:
        VerificationError: an answer is no number.
    """
    found, start, turn = [], 0, 0
    while start < count:
        size = sizes[min(turn, len(sizes) - 1)]
        batch = prepare(split.load(np.arange(start, min(start + size, count))))
        try:
            found.append(runtime.run_model(session, batch))
        except runtime.RunnerError as error:
            raise VerificationError(f"{split.name}: {error}; export the model anew") from error
        start, turn = start + size, turn + 1
    return np.concatenate(found)


def compare(
    between: str, expected: np.ndarray, answered: np.ndarray, allowed_steps: float | None
) -> Agreement:
    """Compare the answers of two models, ``(N, classes)``."""
    scale = max(float(np.ptp(expected)) / LEVELS, float(np.finfo(np.float32).tiny))
    difference = float(np.abs(expected - answered).max())
    same = float((expected.argmax(1) == answered.argmax(1)).mean())
    return Agreement(
        between, len(expected), same, difference, scale, difference / scale, allowed_steps
    )


def demand(found: Agreement, section: VerifySection, remedy: str) -> None:
    """Hold an agreement to what is allowed.

    Raises:
        VerificationError: they are too far apart.
    """
    allowed = found.allowed_steps
    if found.agreement >= section.min_agreement and (allowed is None or found.max_steps <= allowed):
        return
    within = "" if allowed is None else f" within {allowed:g} steps"
    raise VerificationError(
        f"verify: {found.between}: expected the same answer to at least "
        f"{section.min_agreement:.1%} of {found.samples} samples{within}, got "
        f"{found.agreement:.1%} and {found.max_steps:.1f} steps; {remedy}",
        report=found.to_json(),
    )


def overflow_remedy(target: Target) -> str:
    """Say what helps where integers answer otherwise than their floats do."""
    here = resolve_target("cpu")
    if here.takes_integers_of(target):
        return "ship floats with --quantize none"
    return (
        f"weights of {target.weight_bits} bits can overflow the sums of this CPU ({here.name}): "
        f"export it on x86 with VNNI or on ARM, or with --target {here.name}"
    )


def largest_value(proto: onnx.ModelProto, inputs: np.ndarray, threads: int) -> tuple[float, str]:
    """Return the largest value inside a float model, and the operator that it comes from."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    makers = {name: node for node in watched.graph.node for name in node.output if name}
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in makers)
    session = runtime.open_session(watched.SerializeToString(), threads)
    found = session.run(list(makers), {session.get_inputs()[0].name: inputs})
    sizes = {
        name: float(np.abs(value).max(initial=0))
        for name, value in zip(makers, found, strict=True)
        if isinstance(value, np.ndarray) and value.dtype == np.float32
    }
    name = max(sizes, key=lambda one: sizes[one])
    return sizes[name], f"{makers[name].op_type} {makers[name].name!r}"
