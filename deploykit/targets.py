"""Where a model will run, and so how it is quantized, rounded and executed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from deploykit.errors import UsageError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True)
class Target:
    """One deployment runtime.

    Attributes:
        name: the word of the recipe, the command line and the manifest.
        activation_dtype: integer type of quantized activations, ``uint8`` or ``int8``.
        weight_bits: width of quantized weights; 7 where 8 would overflow the kernels'
            16-bit sums (x86 without VNNI).
        channel_multiple: channels the kernels compute at once; narrower is not faster.
        providers: ONNX Runtime execution providers, best first.
        symmetric: whether the zero point of activations must be 0.
        precision: what its fastest kernels compute in, ``int8`` or ``fp16``.
        provider_options: of the first provider.
    """

    name: str
    activation_dtype: str
    weight_bits: int
    channel_multiple: int
    providers: tuple[str, ...] = (CPU,)
    symmetric: bool = False
    precision: str = "int8"
    provider_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def scheme(self) -> tuple[str, bool, int]:
        """What decides which answers integers give."""
        return self.activation_dtype, self.symmetric, self.weight_bits

    def takes_integers_of(self, other: "Target") -> bool:
        """Whether a model quantized for ``other`` has kernels here that answer the same.

        Signed activations overflow like unsigned ones: on x86 ONNX Runtime makes them unsigned
        when it opens a model, unless the session has ``session.qdqisint8allowed``.
        """
        overflows = other.weight_bits > self.weight_bits
        symmetric = other.symmetric or not self.symmetric
        return self.precision == "int8" and symmetric and not overflows


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("cpu-x86-vnni", activation_dtype="uint8", weight_bits=8, channel_multiple=16),
        Target("cpu-x86-avx2", activation_dtype="uint8", weight_bits=7, channel_multiple=8),
        Target("cpu-arm64", activation_dtype="uint8", weight_bits=8, channel_multiple=8),
        # ONNX Runtime's CUDA provider has no integer convolution: int8 there is slower than fp16.
        Target(
            "cuda",
            activation_dtype="int8",
            weight_bits=8,
            channel_multiple=8,  # halves in 16 bytes, as tensor cores load them
            providers=(CUDA, CPU),
            symmetric=True,
            precision="fp16",
        ),
        Target(
            "tensorrt",
            activation_dtype="int8",
            weight_bits=8,
            channel_multiple=16,
            providers=("TensorrtExecutionProvider", CUDA, CPU),
            symmetric=True,
            provider_options={"trt_int8_enable": "1", "trt_fp16_enable": "1"},
        ),
        # WebAssembly: its kernels widen to 16 bits before they multiply, so nothing overflows.
        Target("web", activation_dtype="uint8", weight_bits=8, channel_multiple=8),
    )
}


def resolve_target(name: str) -> Target:
    """Return the target called ``name``; ``cpu`` is this machine's own CPU.

    Raises:
        UsageError: there is no such target.
    """
    from deploykit.runtime import detect_cpu

    known = dict(TARGETS)
    if detect_cpu() in TARGETS:
        known["cpu"] = TARGETS[detect_cpu()]
    if name not in known:
        raise UsageError(f"target: expected one of {', '.join(sorted(known))}, got {name!r}")
    return known[name]


def integers_for(target: Target) -> Target:
    """Return the target whose integers are made for ``target`` on this machine.

    Where this CPU would overflow the sums of 8-bit weights, and so could prove none, it is this
    one's, if they are right on ``target`` too: a bit of the weights is given for the proof.
    """
    from deploykit.runtime import detect_cpu

    here = TARGETS.get(detect_cpu(), target)
    provable = here.takes_integers_of(target) or not target.takes_integers_of(here)
    return target if provable else here


def about_integers(target: Target) -> str:
    """Say that integers for ``target`` have fewer bits here than there; nothing where not."""
    made = integers_for(target)
    if made.weight_bits == target.weight_bits:
        return ""
    return (
        f"weights of {made.weight_bits} bits, right on {target.name} too: this CPU ({made.name}) "
        f"would overflow the sums of {target.weight_bits} bits, and cannot prove them"
    )


def suited_targets(precision: str, made_for: Target) -> list[str]:
    """Name the targets that a model is right for.

    Args:
        precision: of the model: ``int8``, or a float's, which every runtime computes.
        made_for: decided the model's integers.
    """
    if precision != "int8":
        return list(TARGETS)
    return [target.name for target in TARGETS.values() if target.takes_integers_of(made_for)]


def why_not_here(target: Target) -> str | None:
    """Say what this machine lacks to be the target; None where it is the target.

    A GPU counts only if ONNX Runtime really opens a model on it.
    """
    from deploykit.runtime import detect_cpu

    if target.name == "web":
        return "a browser runs it"
    provider = target.providers[0]
    if provider != CPU:
        return None if _opens(provider) else f"onnxruntime cannot use its {provider}"
    here = detect_cpu()
    return None if here == target.name else f"this CPU is {here}"


def can_be_profiled(target: Target) -> bool:
    """Whether this machine is the target, and one whose nodes can be timed."""
    return target.providers == (CPU,) and why_not_here(target) is None


@cache
def _opens(provider: str) -> bool:
    """Whether a session asked for this provider is not quietly one of the CPU's."""
    import onnxruntime
    from onnx import TensorProto, helper

    if provider not in onnxruntime.get_available_providers():
        return False
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    node = helper.make_node("Identity", ["x"], ["y"])
    model = helper.make_model(
        helper.make_graph([node], "one", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnxruntime.set_default_logger_severity(4)  # a missing driver is an answer, not an error
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=[provider], enable_fallback=0
        )
    except (RuntimeError, ValueError):
        return False
    finally:
        onnxruntime.set_default_logger_severity(3)
    opened: bool = session.get_providers()[0] == provider
    return opened
