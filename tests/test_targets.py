"""What a target fixes, and how this machine is known."""

import pytest

from deploykit import targets
from deploykit.errors import UsageError
from deploykit.runtime import cpu_flags, detect_cpu
from deploykit.targets import (
    TARGETS,
    about_integers,
    integers_for,
    resolve_target,
    suited_targets,
    why_not_here,
)

PLAIN = {"sse2", "avx", "avx2", "fma"}


@pytest.mark.parametrize(
    ("flags", "machine", "name"),
    [
        (PLAIN, "x86_64", "cpu-x86-avx2"),
        (PLAIN | {"avx512f"}, "x86_64", "cpu-x86-avx2"),
        (PLAIN | {"avx512_vnni"}, "x86_64", "cpu-x86-vnni"),
        (PLAIN | {"avx_vnni"}, "AMD64", "cpu-x86-vnni"),
        ((), "AMD64", "cpu-x86-avx2"),
        ({"asimd"}, "aarch64", "cpu-arm64"),
        ((), "arm64", "cpu-arm64"),
        ({"neon"}, "armv7l", "cpu-armv7l"),
        ((), "riscv64", "cpu-riscv64"),
    ],
)
def test_features_tell_the_kind_of_cpu(flags, machine, name):
    assert detect_cpu(flags, machine) == name


def test_this_machine_is_the_target_called_cpu(monkeypatch):
    assert resolve_target("cpu").name == detect_cpu()
    for flags in (PLAIN, PLAIN | {"avx512_vnni"}):
        monkeypatch.setattr("deploykit.runtime.cpu_flags", lambda flags=flags: flags)
        assert resolve_target("cpu").name == detect_cpu(flags)


def test_machine_that_is_no_target_is_told(monkeypatch):
    monkeypatch.setattr("deploykit.runtime.platform.machine", lambda: "riscv64")
    with pytest.raises(UsageError, match=r"target: expected one of cpu-arm64, .*, got 'cpu'"):
        resolve_target("cpu")
    assert resolve_target("cpu-arm64").name == "cpu-arm64"
    assert integers_for(TARGETS["web"]) == TARGETS["web"]


@pytest.mark.parametrize("flags", [PLAIN, PLAIN | {"avx512_vnni"}])
def test_integers_are_made_as_wide_as_this_cpu_can_prove(monkeypatch, flags):
    monkeypatch.setattr("deploykit.runtime.cpu_flags", lambda: flags)
    monkeypatch.setattr("deploykit.runtime.platform.machine", lambda: "x86_64")
    narrow = "avx512_vnni" not in flags
    for name in ("cpu-x86-vnni", "cpu-arm64", "web"):
        target = TARGETS[name]
        assert integers_for(target) == (TARGETS["cpu-x86-avx2"] if narrow else target)
        assert bool(about_integers(target)) is narrow
        assert target.takes_integers_of(integers_for(target))
    for name in ("cpu-x86-avx2", "tensorrt", "cuda"):  # its own; what nothing here is right for
        assert integers_for(TARGETS[name]) == TARGETS[name]
        assert about_integers(TARGETS[name]) == ""


def test_flags_are_read_once_and_from_one_core():
    assert cpu_flags() is cpu_flags()


def test_unknown_target_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"target: expected one of cpu, .*web, got 'toaster'"):
        resolve_target("toaster")


def test_sums_of_unsigned_by_signed_bytes_stay_within_16_bits_without_vnni():
    for target in TARGETS.values():
        widens = target.name != "cpu-x86-avx2"
        limit = 2 ** (target.weight_bits - 1) - 1
        assert widens or 2 * 255 * limit <= 32767
        assert widens or 2 * 255 * (2 * limit + 1) > 32767  # a bit more would not fit


def test_tensorrt_is_symmetric_and_cuda_ships_halves():
    assert (TARGETS["tensorrt"].activation_dtype, TARGETS["tensorrt"].symmetric) == ("int8", True)
    assert {name: one.precision for name, one in TARGETS.items() if one.precision != "int8"} == {
        "cuda": "fp16"
    }


def test_integers_are_right_where_nothing_overflows_and_the_scheme_is_known():
    def suited(name):
        return set(suited_targets("int8", TARGETS[name]))

    unsigned = {"cpu-x86-vnni", "cpu-arm64", "web"}
    assert suited("cpu-x86-vnni") == suited("cpu-arm64") == suited("web") == unsigned
    assert suited("cpu-x86-avx2") == {*unsigned, "cpu-x86-avx2"}
    assert suited("tensorrt") == {*unsigned, "tensorrt"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_floats_are_right_everywhere(precision):
    assert suited_targets(precision, TARGETS["cpu-x86-vnni"]) == list(TARGETS)


def test_only_this_cpu_is_here(monkeypatch):
    monkeypatch.setattr("deploykit.runtime.cpu_flags", lambda: PLAIN)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert why_not_here(TARGETS["cpu-x86-avx2"]) is None
    assert why_not_here(TARGETS["cpu-x86-vnni"]) == "this CPU is cpu-x86-avx2"
    assert why_not_here(TARGETS["web"]) == "a browser runs it"


@pytest.mark.parametrize("opens", [True, False])
def test_a_gpu_is_here_if_a_model_opens_on_it(monkeypatch, opens):
    monkeypatch.setattr(targets, "_opens", lambda provider: opens)
    for name in ("cuda", "tensorrt"):
        why = why_not_here(TARGETS[name])
        assert why is None if opens else TARGETS[name].providers[0] in why


def test_a_provider_counts_only_if_the_session_has_it(capfd):
    assert targets._opens("CPUExecutionProvider")
    assert not targets._opens("NoSuchExecutionProvider")
    for name in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        assert targets._opens(name) in {True, False}
    assert capfd.readouterr() == ("", "")
