"""OnnxModel against Candidate: does ONNX Runtime answer what torch answers?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from torch.fx import GraphModule, Interpreter, Node

from deploykit import runtime
from deploykit.artifacts import Candidate, JsonDict, OnnxModel
from deploykit.errors import VerificationError
from deploykit.precision import EXACTNESS, HalfArithmetic, precision_of
from deploykit.quantization.deployable import candidate_graph, deployable
from deploykit.quantization.layers import kernels, module_of
from deploykit.quantization.operators import NORM
from deploykit.quantization.rules import moves
from deploykit.recipe.sections import VerifySection
from deploykit.targets import resolve_target

if TYPE_CHECKING:
    from deploykit.data.dataset import Split

BATCH_SIZES = (1, 2, 7, 64)
FEW = 8  # samples that tell of single values
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


@dataclass(frozen=True)
class Parity:
    """How closely ONNX Runtime agrees with torch on real samples.

    Attributes:
        samples: how many were compared.
        agreement: share of equal top-1 answers.
        max_abs: largest difference of a logit.
        scale: one step of the output: the scale of its integers, or 1/255 of its range.
        max_steps: ``max_abs`` in those steps.
        allowed_steps: what it was held to.
    """

    samples: int
    agreement: float
    max_abs: float
    scale: float
    max_steps: float
    allowed_steps: float

    def to_json(self) -> JsonDict:
        """Return plain JSON for the report."""
        return asdict(self)


def verify_onnx(
    candidate: Candidate, model: OnnxModel, split: Split, section: VerifySection, *, threads: int
) -> Parity:
    """Compare ``model`` with ``candidate`` on samples of ``split``, in batches of several sizes.

    Returns:
        The measured parity.

    Raises:
        VerificationError: they disagree; names the first layer that diverges.
    """
    graph, precision = candidate_graph(candidate), precision_of(candidate)
    reference = deployable(candidate, HalfArithmetic(graph) if precision == "fp16" else graph)
    expected, answered = [], []
    try:
        session = runtime.open_session(model.path.read_bytes(), threads, runtime.CPU)
        for indices in _batches(min(section.samples, len(split))):
            inputs = split.load(indices)
            with torch.no_grad():
                expected.append(reference(torch.from_numpy(inputs)).numpy())
            answered.append(runtime.run_model(session, inputs))
    except runtime.RunnerError as error:
        raise VerificationError(f"{candidate.stage}: {error}; export the model anew") from error
    exactness = EXACTNESS[precision]
    rounded = any(node.target is QUANTIZE for node in graph.graph.nodes)
    parity = _compare(
        np.concatenate(expected),
        np.concatenate(answered),
        _output_step(candidate, graph, split),
        # Integers differ by a step here and there, and carry that into floats behind them.
        section.max_steps if rounded else min(section.max_steps, exactness.steps),
    )
    # Written so that a comparison with NaN fails.
    if not (parity.agreement >= section.min_agreement and parity.max_steps <= parity.allowed_steps):
        layer = first_divergence(
            candidate, graph, model, split, threads=threads, relative=exactness.relative
        )
        raise VerificationError(
            f"{candidate.stage}: expected ONNX Runtime to agree with torch on at least "
            f"{section.min_agreement:.1%} of {parity.samples} samples within "
            f"{parity.allowed_steps:g} steps, got {parity.agreement:.1%} and "
            f"{parity.max_steps:.1f} steps{exactness.remedy}{_overflow(candidate)}; "
            f"the first layer that diverges is {layer}",
            report={**parity.to_json(), "layer": layer},
        )
    return parity


def _overflow(candidate: Candidate) -> str:
    """Say what to do if this CPU may compute the candidate's integers wrongly, else nothing."""
    quantization = candidate.structure.get("quantization")
    if not quantization:
        return ""
    here, target = resolve_target("cpu"), resolve_target(quantization["target"])
    if here.takes_integers_of(target):
        return ""
    return (
        f"; weights of {target.weight_bits} bits can overflow the sums of this CPU ({here.name}): "
        "verify it on x86 with VNNI or on ARM"
    )


def _batches(count: int) -> list[np.ndarray]:
    """Cut ``range(count)`` into batches of every size that must work, the largest repeated."""
    batches: list[np.ndarray] = []
    start = 0
    while start < count:
        size = BATCH_SIZES[min(len(batches), len(BATCH_SIZES) - 1)]
        batches.append(np.arange(start, min(start + size, count)))
        start += size
    return batches


def _compare(
    expected: np.ndarray,
    answered: np.ndarray,
    step: float | None,
    allowed: float,
) -> Parity:
    numbers = np.where(np.isfinite(expected), expected, 0)  # fp16 can overflow
    scale = step or max(float(np.ptp(numbers)) / 255, float(np.finfo(np.float32).tiny))
    difference = float(np.abs(expected - answered).max())
    return Parity(
        samples=len(expected),
        agreement=float((expected.argmax(1) == answered.argmax(1)).mean()),
        max_abs=difference,
        scale=scale,
        max_steps=difference / scale,
        allowed_steps=allowed,
    )


def _output_step(candidate: Candidate, graph: GraphModule, split: Split) -> float | None:
    """Return how far the output moves where the integers that it is made from move by a step.

    None where it is not made from integers, or by a layer.
    """
    layers, only_moved = set(kernels(graph.graph)), True
    node = next(iter(graph.graph.output_node().all_input_nodes), None)
    while node is not None and node.op == "call_function" and node not in layers:
        if "dequantize_per_tensor" in str(node.target):
            scale = float(node.args[1])  # type: ignore[arg-type]
            inputs = split.load(np.arange(min(FEW, len(split))))
            return scale if only_moved else _carried(candidate, graph, node, scale, inputs)
        only_moved = only_moved and moves(node)
        sources = [one for one in node.all_input_nodes if one.op != "get_attr"]
        node = sources[0] if len(sources) == 1 else None
    return None


def _carried(
    candidate: Candidate, graph: GraphModule, source: Node, scale: float, inputs: np.ndarray
) -> float | None:
    """Return the largest change of the output when values of ``source`` rise or fall by ``scale``.

    A softmax or a temperature behind the last integers makes steps smaller or larger.
    """
    from deploykit.data.pixels import normalize

    class Nudged(Interpreter):
        by = 0.0

        def run_node(self, node: Node) -> object:
            value = super().run_node(node)
            if node is not source:
                return value
            signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(0))
            return value + self.by * (2.0 * signs - 1)

    answers = []
    with torch.no_grad():
        for by in (0.0, scale):
            nudged = Nudged(graph)
            nudged.by = by
            answers.append(
                nudged.run(normalize(torch.from_numpy(inputs), candidate.signature.preprocess))
            )
    return float((answers[1] - answers[0]).abs().max()) or None


def first_divergence(
    candidate: Candidate,
    graph: GraphModule,
    model: OnnxModel,
    split: Split,
    *,
    threads: int,
    relative: float = EXACTNESS["fp32"].relative,
) -> str:
    """Name the first layer whose values differ, most of them by more than rounding.

    Integers are compared where the graph quantizes, so that ONNX Runtime still fuses as it does
    when the model ships; float models are compared at the outputs of their layers.
    """
    inputs = split.load(np.arange(min(FEW, len(split))))
    nodes, names, tensors = _probes(graph, onnx.load(model.path))
    values = _torch_values(candidate, graph, inputs, nodes)
    answers = _runtime_values(model, tensors, inputs, threads) if tensors else {}
    for node, name, tensor in zip(nodes, names, tensors, strict=True):
        expected, answered = values[node].numpy(), answers[tensor]
        if expected.shape != answered.shape:
            return name
        difference = np.abs(expected.astype(np.float64) - answered.astype(np.float64))
        allowed = 2 if expected.dtype.kind in "iu" else relative * (np.abs(expected).max() + 1e-6)
        if difference.max() > allowed:
            return name
    return "none of the inner ones: only the output differs"


def _probes(graph: GraphModule, proto: onnx.ModelProto) -> tuple[list[Node], list[str], list[str]]:
    """Pair places in the torch graph with tensors in the ONNX graph."""
    quantized = [node for node in graph.graph.nodes if node.target is QUANTIZE]
    if quantized:
        tensors = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        names = [_layer_name(node.all_input_nodes[0]) for node in quantized]
        if len(tensors) == len(quantized):
            return quantized, names, tensors
    written = {node.name: node for node in proto.graph.node}
    layers = [node for node in kernels(graph.graph) if module_of(node) in written]
    names = [module_of(node) for node in layers]
    ends = [_ends(layer, written[name], proto) for layer, name in zip(layers, names, strict=True)]
    return [node for node, _ in ends], names, [tensor for _, tensor in ends]


def _ends(layer: Node, written: onnx.NodeProto, proto: onnx.ModelProto) -> tuple[Node, str]:
    """Return where a float layer ends, in torch and in the file.

    The exporter folds a BatchNorm into the layer before it, and writes the bias of a linear
    layer as an addition where the layer has more than two axes.
    """
    tensor: str = written.output[0]
    readers = [node for node in proto.graph.node if tensor in node.input]
    after = readers[0].op_type if len(readers) == 1 else ""
    if after == "Add" and written.op_type == "MatMul" and len(layer.all_input_nodes) == 3:
        tensor = readers[0].output[0]
    norm = next(iter(layer.users))
    folded = len(layer.users) == 1 and norm.target is NORM and after != "BatchNormalization"
    return (norm if folded else layer), tensor


def _layer_name(node: Node) -> str:
    """Name the layer whose fused group ends in ``node``, or the node where there is none."""
    layers = set(kernels(node.graph))
    head = node
    while head not in layers and len(head.all_input_nodes) == 1 and head.target is not DEQUANTIZE:
        head = head.all_input_nodes[0]
    if head in layers and module_of(head):
        return module_of(head)
    return f"{module_of(node) or 'the model'} ({node.name})"


def _torch_values(
    candidate: Candidate, graph: GraphModule, inputs: np.ndarray, nodes: list[Node]
) -> Mapping[Node, torch.Tensor]:
    from deploykit.data.pixels import normalize

    values: dict[Node, torch.Tensor] = {}
    wanted = set(nodes)

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> object:
            value = super().run_node(node)
            if node in wanted:
                values[node] = value
            return value

    with torch.no_grad():
        Recorder(graph).run(normalize(torch.from_numpy(inputs), candidate.signature.preprocess))
    return values


def _runtime_values(
    model: OnnxModel, tensors: list[str], inputs: np.ndarray, threads: int
) -> Mapping[str, np.ndarray]:
    proto = onnx.load(model.path)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    session = runtime.open_session(proto.SerializeToString(), threads, runtime.CPU)
    answers = session.run(tensors, {session.get_inputs()[0].name: inputs})
    return dict(zip(tensors, answers, strict=True))
