import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from tiny_quantized import CLASSES, TARGET, Net, Samples, array_candidate, noise_ratio
from torch import nn

from deploykit import work as work_module
from deploykit.errors import CompressionError, VerificationError
from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.measure.session import open_model
from deploykit.quantization.deployable import leave_recurrence_in_float
from deploykit.quantize import calibrate
from deploykit.recipe.sections import VerifySection
from deploykit.targets import TARGETS
from deploykit.verify import verify_onnx

pytestmark = pytest.mark.slow
STEPS, WIDTH = 12, 8
RANDOM = np.random.default_rng(0)
# Each class has steps of its own, so that answers have a margin.
CENTRES = RANDOM.normal(size=(CLASSES, STEPS, WIDTH))[np.arange(64) % CLASSES]
VALUES = (CENTRES + 0.3 * RANDOM.normal(size=CENTRES.shape)).astype(np.float32)


def recurrent(kind, units, **options):
    torch.manual_seed(0)
    ways = 2 if options.get("bidirectional") else 1
    net = Net(
        lambda net, x: net.fc(net.body(net.stem(x))[0][:, -1]),
        stem=nn.Linear(WIDTH, 16),
        body=kind(16, units, batch_first=True, **options),
        fc=nn.Linear(ways * units, CLASSES),
    )
    return array_candidate(net.eval(), (STEPS, WIDTH))


def decided(answers):
    """Choose the samples whose best two answers are more than a step (1/255 of all) apart.

    Nothing is trained here, and where two answers are all but equal the other may win: which
    one does is up to the bits of the weights.
    """
    second, best = np.sort(answers, axis=1)[:, -2:].T
    chosen = best - second > np.ptp(answers) / 255
    assert chosen.sum() > 50  # so one in fifty may still differ
    return chosen


def quantized(candidate, folder, keep_float=()):
    """Write float and int8, verify; return the int8 model, its fusion and the error's power."""
    model = export_onnx(candidate, folder / "float.onnx", name="tiny")
    integers = calibrate(candidate, VALUES, target=TARGET, keep_float=keep_float)
    written = export_onnx(integers, folder / "int8.onnx", name="tiny")
    expected, answered = (
        open_model(one, 1).run(None, {"features": VALUES})[0] for one in (model, written)
    )
    verify_onnx(integers, written, Samples(VALUES[decided(expected)]), VerifySection(), threads=1)
    return written, fused_operators(written, threads=1), noise_ratio(expected, answered)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_a_wide_lstm_runs_in_integers_and_the_rest_too(options, tmp_path):
    candidate = recurrent(nn.LSTM, 128, **options)
    model, report, noise = quantized(candidate, tmp_path)
    assert report.operators["DynamicQuantizeLSTM"] == options.get("num_layers", 1)
    assert report.operators["QGemm"] == 2
    assert report.floating == ()
    assert {"stem", "fc"} <= set(report.integer)
    assert noise < 0.01
    weights = sum(value.numel() for value in candidate.module.parameters())
    assert model.path.stat().st_size < 2 * weights


def test_weights_of_seven_bits_cannot_overflow_where_sums_have_sixteen(tmp_path):
    integers = calibrate(recurrent(nn.LSTM, 128), VALUES, target=TARGETS["cpu-x86-avx2"])
    proto = onnx.load(export_onnx(integers, tmp_path / "m.onnx", name="tiny").path)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    (layer,) = (node for node in proto.graph.node if node.op_type == "DynamicQuantizeLSTM")
    for name in layer.input[1:3]:
        assert np.abs(onnx.numpy_helper.to_array(held[name]).astype(int)).max() == 64


def test_a_narrow_lstm_stays_in_float_where_it_is_faster(tmp_path):
    _, report, _ = quantized(recurrent(nn.LSTM, 32), tmp_path)
    (layer,) = report.floating
    assert layer.operator == "LSTM"
    assert "few units" in layer.why


def test_a_gru_stays_in_float_for_want_of_a_kernel(tmp_path):
    _, report, noise = quantized(recurrent(nn.GRU, 128), tmp_path)
    (layer,) = report.floating
    assert (layer.operator, report.operators["QGemm"]) == ("GRU", 2)
    assert "no integer kernel for GRU" in layer.why
    assert noise < 0.01


def test_an_lstm_is_left_in_float_by_name(tmp_path):
    candidate = recurrent(nn.LSTM, 128)
    _, report, _ = quantized(candidate, tmp_path, keep_float=("body",))
    assert report.operators["LSTM"] == 1
    with pytest.raises(CompressionError, match="near it are body"):
        calibrate(candidate, VALUES, target=TARGET, keep_float=("bdy",))


@pytest.mark.parametrize("name", ["stem", "fc"])
def test_a_wide_lstm_runs_in_integers_beside_a_layer_in_float(name, tmp_path):
    _, report, noise = quantized(recurrent(nn.LSTM, 128), tmp_path, keep_float=(name,))
    assert (report.operators["DynamicQuantizeLSTM"], report.operators["QGemm"]) == (1, 1)
    assert [layer.name for layer in report.floating] == [name]
    assert noise < 0.01


def test_a_wide_lstm_is_enough_to_run_in_integers(tmp_path):
    candidate = recurrent(nn.LSTM, 128)
    integers = calibrate(candidate, VALUES, target=TARGET, keep_float=("stem", "fc"))
    model = export_onnx(integers, tmp_path / "m.onnx", name="tiny")
    assert fused_operators(model, threads=1).operators["DynamicQuantizeLSTM"] == 1


def test_equal_candidates_give_equal_bytes(tmp_path):
    integers = calibrate(recurrent(nn.LSTM, 128), VALUES, target=TARGET)
    first = export_onnx(integers, tmp_path / "a.onnx", name="tiny").path.read_bytes()
    assert export_onnx(integers, tmp_path / "b.onnx", name="tiny").path.read_bytes() == first


def test_an_lstm_that_does_not_answer_alike_in_integers_stays_in_float(monkeypatch, tmp_path):
    integers = calibrate(recurrent(nn.LSTM, 128), VALUES, target=TARGET)
    told, saved = [], []

    def prove(candidate, *_, **__):
        if not candidate.structure["quantization"]["keep_float"]:
            raise VerificationError("quantize: they differ")
        parity = SimpleNamespace(agreement=1.0)
        return SimpleNamespace(
            candidate=candidate,
            name="quantize",
            parity=parity,
            validation=SimpleNamespace(accuracy=1.0),
        )

    monkeypatch.setattr(work_module, "prove", prove)
    run = SimpleNamespace(save_candidate=saved.append)
    work = SimpleNamespace(run=run, recipe=None, dataset=None, say=told.append)
    stage = work_module.proved(work, 0.0, lambda: integers)
    assert stage.candidate.structure["quantization"]["keep_float"] == ["body"]
    assert saved[-1] is stage.candidate
    assert "LSTM layers stay in float" in told[0]
    assert leave_recurrence_in_float(stage.candidate) is None
    model = export_onnx(stage.candidate, tmp_path / "m.onnx", name="tiny")
    assert fused_operators(model, threads=1).operators["LSTM"] == 1


def test_a_model_without_recurrence_fails_as_it_did(monkeypatch):
    def prove(*_, **__):
        raise VerificationError("quantize: they differ")

    monkeypatch.setattr(work_module, "prove", prove)
    run = SimpleNamespace(save_candidate=lambda candidate: None)
    work = SimpleNamespace(run=run, recipe=None, dataset=None)
    integers = calibrate(recurrent(nn.GRU, 128), VALUES, target=TARGET)
    with pytest.raises(VerificationError, match="they differ"):
        work_module.proved(work, 0.0, lambda: integers)


@pytest.mark.parametrize(
    ("imported", "code"),
    [
        ("import onnxruntime.quantization", 1),  # it is as bad as this
        ("from deploykit.quantization.recurrent import ort_quantization as q; q()", 0),
    ],
)
def test_a_path_that_was_put_back_meanwhile_does_no_harm(imported, code):
    """As behind a user's module that imported onnxruntime.transformers and tidied up after it."""
    before = "import sys; path = [*sys.path]; import onnxruntime.transformers; sys.path[:] = path"
    script = f"{before}; {imported}; assert sys.path[: len(path)] == path"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == code
