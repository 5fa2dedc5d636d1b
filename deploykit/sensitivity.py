"""What each rounding costs at the logits: which layers of a quantized model to leave in float."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph

from deploykit.artifacts import Candidate, JsonDict
from deploykit.data.pixels import normalize
from deploykit.quantization.canonical import decompose
from deploykit.quantization.deployable import candidate_graph, deployable, quantized_with
from deploykit.quantization.graphs import quiet, rounding_graph, trace
from deploykit.quantization.layers import module_of
from deploykit.quantization.operators import WEIGHTED
from deploykit.quantization.rules import activations, integer_kernels, quantized_tensors
from deploykit.seeds import stable_seed

BATCH, DRAWS = 4, 4


@dataclass(frozen=True)
class Sensitivity:
    """Powers at the logits, summed over the logits and averaged over samples.

    Attributes:
        signal: of the float model's logits.
        weights: noise of rounding the weights of a layer, by module.
        tensors: noise of rounding a tensor, by the key of its parameters.
    """

    signal: float
    weights: Mapping[str, float]
    tensors: Mapping[str, float]

    @property
    def noise(self) -> float:
        """Power of all roundings together, taken as independent."""
        return sum(self.weights.values()) + sum(self.tensors.values())

    def decibels(self, noise: float) -> float:
        """Return the signal-to-noise ratio, in dB."""
        return 10 * math.log10(self.signal / noise) if noise > 0 < self.signal else math.inf

    def to_json(self) -> JsonDict:
        """Return signal-to-noise ratios in dB: together, and each alone, the worst first."""
        parts = {
            kind: {
                name: round(self.decibels(noise), 2)
                for name, noise in sorted(noises.items(), key=lambda item: -item[1])
                if noise > 0 < self.signal
            }
            for kind, noises in (("weights", self.weights), ("tensors", self.tensors))
        }
        together = self.decibels(self.noise)
        return {"together": round(together, 2) if math.isfinite(together) else None, **parts}


def quantization_sensitivity(
    candidate: Candidate, samples: np.ndarray, *, seed: int = 0
) -> Sensitivity:
    """Measure what rounding every weight and every tensor alone adds to the logits as noise.

    To first order a small error ``e`` inside the model moves the logits by ``J e``. Its power is
    the mean of ``(v J e)^2`` over random signs ``v`` (Hutchinson 1990), and one pass backward
    gives ``v J e`` for all roundings at once: the derivative of ``v`` times the logits by how
    much of each rounding is let through.

    Args:
        candidate: quantized.
        samples: as a client sends them, ``(n, ...)``; 32 rank layers well. They stream through
            in small batches.
        seed: of the signs.
    """
    graph, roundings = _rounding_graph(candidate)
    generator = torch.Generator().manual_seed(stable_seed(seed, "sensitivity"))
    noise, signal = torch.zeros(len(roundings)), 0.0
    for start in range(0, len(samples), BATCH):
        batch = torch.from_numpy(np.array(samples[start : start + BATCH]))
        with quiet():
            logits = graph(normalize(batch, candidate.signature.preprocess))
        signal += float(logits.detach().square().sum())
        for draw in range(DRAWS):
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1
            gradients = torch.autograd.grad(
                (signs * logits).sum(),
                [one.share for one in roundings.values()],
                retain_graph=draw + 1 < DRAWS,
                allow_unused=True,
            )
            noise += torch.stack(
                [torch.zeros(()) if one is None else one.square() for one in gradients]
            )
    powers = dict(zip(roundings, (noise / (DRAWS * len(samples))).tolist(), strict=True))
    return Sensitivity(
        signal / len(samples),
        {name: power for (kind, name), power in powers.items() if kind == "weight"},
        {name: power for (kind, name), power in powers.items() if kind == "tensor"},
    )


def signal_to_noise(candidate: Candidate, quantized: Candidate, samples: np.ndarray) -> float:
    """Return the ratio of the logits' power to that of what integers change in them, in dB.

    Args:
        candidate: the float one.
        quantized: made from it.
        samples: as a client sends them, ``(n, ...)``.
    """
    models = [deployable(one, candidate_graph(one)) for one in (candidate, quantized)]
    signal = noise = 0.0
    for start in range(0, len(samples), BATCH):
        batch = torch.from_numpy(np.array(samples[start : start + BATCH]))
        with torch.no_grad(), quiet():
            expected, answered = (model(batch) for model in models)
        signal += float(expected.square().sum())
        noise += float((expected - answered).square().sum())
    return Sensitivity(signal, {}, {}).decibels(noise)


class Rounding(nn.Module):
    """Lets a share of a rounding through: none, but its derivative tells what it would do."""

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.share = torch.zeros((), requires_grad=True)
        self.scale, self.zero_point, self.limits = scale.float(), zero_point.int(), (low, high)

    def forward(self, value: Tensor) -> Tensor:
        """Return ``value``."""
        with torch.no_grad():
            if len(self.scale) == 1:
                scale, zero_point = self.scale[0], self.zero_point[0]
                rounded = torch.fake_quantize_per_tensor_affine(
                    value, scale, zero_point, *self.limits
                )
            else:
                rounded = torch.fake_quantize_per_channel_affine(
                    value, self.scale, self.zero_point, 0, *self.limits
                )
            error = rounded - value
        return value + self.share * error


def _rounding_graph(candidate: Candidate) -> tuple[Any, dict[tuple[str, str], Rounding]]:
    """Return the float graph with a `Rounding` wherever integers round, by kind and name."""
    graph = rounding_graph(*quantized_with(candidate), moved=False)
    roundings: dict[tuple[str, str], Rounding] = {}
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        observer: Any = graph.get_submodule(node.target)
        key = getattr(observer, "tensor_key", None)
        layer = next((user for user in node.users if user.target in WEIGHTED), None)
        name = ("tensor", key) if key else ("weight", module_of(layer)) if layer else None
        if name is None:
            continue
        scale, zero_point = observer.calculate_qparams()
        rounding = Rounding(
            scale.reshape(-1), zero_point.reshape(-1), observer.quant_min, observer.quant_max
        )
        graph.set_submodule(node.target, rounding)
        roundings[name] = rounding
    return graph, roundings


def layers_to_keep_float(
    candidate: Candidate,
    sensitivity: Sensitivity,
    *,
    wanted_db: float,
    cost: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """Choose layers to leave in float until the logits' signal-to-noise ratio is as wanted.

    Roundings are taken as independent, so that their powers add up. One layer is added after the
    other: the one around which most noise is left, for its cost. The choice is an estimate; measure
    the model that comes of it, and ask for more where it falls short.

    Args:
        candidate: the one that was measured; what it keeps in float already stays so.
        sensitivity: of ``candidate``.
        wanted_db: signal-to-noise ratio.
        cost: what a layer in float costs over one in integers, by module, such as milliseconds;
            equal where left out.

    Returns:
        Names of modules, for ``keep_float``; all of them where nothing less suffices.
    """
    module, example, _, _, exact, keep_float = quantized_with(candidate)
    graph, kept = decompose(trace(module, example)).graph, set(keep_float)
    around = _tensors_around(graph)
    while True:
        left = {tensor.key for tensor in quantized_tensors(graph, frozenset(kept))} - set(exact)
        tensors = {key: sensitivity.tensors.get(key, 0.0) for key in left}
        weights = {name: one for name, one in sensitivity.weights.items() if name not in kept}
        noise = sum(tensors.values()) + sum(weights.values())
        if not weights or sensitivity.decibels(noise) >= wanted_db:
            return tuple(sorted(kept))
        gain = {
            name: (own + sum(tensors.get(key, 0.0) for key in around.get(name, ())))
            / (cost or {}).get(name, 1.0)
            for name, own in weights.items()
        }
        kept.add(max(gain, key=lambda name: (gain[name], name)))


def _tensors_around(graph: Graph) -> dict[str, set[str]]:
    """Return the keys of the tensors that the layers of a module read and write."""
    tensors = {tensor.node: tensor.key for tensor in quantized_tensors(graph)}
    around: dict[str, set[str]] = {}
    for head, tail in integer_kernels(graph).items():
        if head.target in WEIGHTED:
            nodes = [tail, *activations(head)]
            around.setdefault(module_of(head), set()).update(
                tensors[node] for node in nodes if node in tensors
            )
    return around
