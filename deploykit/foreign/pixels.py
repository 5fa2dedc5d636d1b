"""Raw pixels in front of a model that takes normalized floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploykit.foreign.border import BATCH, constants_of
from deploykit.runtime import zero_point_and_scale
from deploykit.trim import graphs_of

# Nothing is known of the inside of a model that takes pixels: to it they are what they are.
AS_THEY_ARE = {"mean": [0.0], "std": [1 / 255]}


@dataclass(frozen=True)
class Normalization:
    """How pixels become what a model takes: ``(pixel - zero_point) * scale``.

    Attributes:
        zero_point: int32 ``(1,)`` or ``(channels,)``.
        scale: float32, of the same shape.
        layout: of the model's images, ``nchw`` or ``nhwc``.
    """

    zero_point: np.ndarray
    scale: np.ndarray
    layout: str

    @classmethod
    def of(cls, preprocess: Mapping[str, Any], layout: str) -> Normalization:
        """Read the numbers that the manifest tells."""
        return cls(*zero_point_and_scale(preprocess), layout)

    @property
    def pair(self) -> tuple[float, int] | None:
        """Scale and zero point, if one pair holds for all channels."""
        if len(set(self.scale.tolist())) > 1 or len(set(self.zero_point.tolist())) > 1:
            return None
        return float(self.scale[0]), int(self.zero_point[0])

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the model takes, float32, for uint8 pixels ``(N, H, W, C)``."""
        values = (pixels.astype(np.float32) - self.zero_point.astype(np.float32)) * self.scale
        return turned(values, self.layout)


def turned(images: np.ndarray, layout: str) -> np.ndarray:
    """Return images ``(N, H, W, C)`` as the model lays them out."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if layout == "nchw" else images


def take_pixels(
    proto: onnx.ModelProto,
    sample_shape: tuple[int, ...],
    layout: str,
    normalization: Normalization | None,
    *,
    dequantize: bool,
) -> onnx.ModelProto:
    """Return the model with raw pixels, uint8 ``(N, H, W, C)``, as its input.

    Normalization is the dequantization of the pixels. Where the model begins by quantizing its
    input to the very integers that pixels are, they go in as they come.

    Args:
        proto: takes images in ``layout``; left as it is.
        sample_shape: ``(H, W, C)``.
        layout: ``nchw`` or ``nhwc``.
        normalization: None where the model takes pixels already.
        dequantize: False for runtimes that know no such integers: normalization is arithmetic.
    """
    grafted = onnx.ModelProto()
    grafted.CopyFrom(proto)
    graph = grafted.graph
    taken = graph.input[0].name
    if normalization is None and layout == "nhwc":
        return grafted
    image = _fresh("image", graph)
    pixels = image if layout == "nhwc" else _fresh("image_turned", graph)
    front = []
    if layout == "nchw":
        name = taken if normalization is None else pixels
        front.append(helper.make_node("Transpose", [image], [name], image, perm=[0, 3, 1, 2]))
    if normalization is not None:
        if dequantize:
            _skip_quantization(graph, taken, pixels, normalization)
            front.append(_dequantized(graph, pixels, taken, normalization))
        else:
            front += _computed(graph, pixels, taken, normalization)
    nodes = [*front, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input[0].CopyFrom(
        helper.make_tensor_value_info(image, TensorProto.UINT8, [BATCH, *sample_shape])
    )
    return grafted


def _fresh(name: str, graph: onnx.GraphProto) -> str:
    """Return ``name``, or one like it that no tensor has."""
    taken: set[str] = set()
    for one in graphs_of(graph):  # those inside of nodes share its names
        taken |= {tensor for node in one.node for tensor in [*node.input, *node.output]}
        taken |= {value.name for value in [*one.input, *one.output, *one.initializer]}
    while name in taken:
        name += "_"
    return name


def _constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    name = _fresh(name, graph)
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _dequantized(
    graph: onnx.GraphProto, pixels: str, taken: str, normalization: Normalization
) -> onnx.NodeProto:
    zero_point = normalization.zero_point.astype(np.uint8)
    scale = normalization.scale
    channels: dict[str, Any] = {}
    if normalization.pair is None:
        channels = {"axis": 1 if normalization.layout == "nchw" else 3}
        scale, zero_point = np.broadcast_arrays(scale, zero_point)
    else:
        scale, zero_point = scale[0], zero_point[0]
    inputs = [
        pixels,
        _constant(graph, "image_scale", np.asarray(scale)),
        _constant(graph, "image_zero_point", np.asarray(zero_point)),
    ]
    return helper.make_node("DequantizeLinear", inputs, [taken], "normalize", **channels)


def _computed(
    graph: onnx.GraphProto, pixels: str, taken: str, normalization: Normalization
) -> list[onnx.NodeProto]:
    shape = (1, -1, 1, 1) if normalization.layout == "nchw" else (1, 1, 1, -1)
    zero_point = normalization.zero_point.astype(np.float32).reshape(shape)
    scale = normalization.scale.reshape(shape)
    floats, centred = _fresh("image_floats", graph), _fresh("image_centred", graph)
    names = (
        _constant(graph, "image_zero_point", zero_point),
        _constant(graph, "image_scale", scale),
    )
    return [
        helper.make_node("Cast", [pixels], [floats], "normalize_cast", to=TensorProto.FLOAT),
        helper.make_node("Sub", [floats, names[0]], [centred], "normalize_centre"),
        helper.make_node("Mul", [centred, names[1]], [taken], "normalize"),
    ]


def _skip_quantization(
    graph: onnx.GraphProto, taken: str, pixels: str, normalization: Normalization
) -> None:
    """Let pixels stand where the model quantizes its input to just these integers."""
    constants = constants_of(graph)
    for node in list(graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] != taken or len(node.input) < 3:
            continue
        scale, zero_point = (constants.get(name) for name in node.input[1:3])
        if scale is None or zero_point is None or zero_point.dtype != np.uint8 or scale.size > 1:
            continue
        if (float(scale.item()), int(zero_point.item())) == normalization.pair:
            graph.node.remove(node)
            for reader in graph.node:
                for place, name in enumerate(reader.input):
                    if name == node.output[0]:
                        reader.input[place] = pixels
