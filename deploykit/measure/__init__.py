"""Measurements of an exported model on the runtime that deploys it."""

from deploykit.cost import count_macs, count_parameters, size_bytes
from deploykit.measure.accuracy import Evaluation, evaluate_onnx
from deploykit.measure.latency import Latency, measure_latency
from deploykit.measure.memory import peak_memory_bytes
from deploykit.measure.normalization import measure_normalization

__all__ = [
    "Evaluation",
    "Latency",
    "count_macs",
    "count_parameters",
    "evaluate_onnx",
    "measure_latency",
    "measure_normalization",
    "peak_memory_bytes",
    "size_bytes",
]
