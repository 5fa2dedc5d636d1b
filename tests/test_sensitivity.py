import math

import numpy as np
import pytest
import torch
from tiny_quantized import (
    CHANNELS,
    CLASSES,
    TARGET,
    Net,
    Samples,
    candidate_of,
    conv,
    images,
    pooled,
    settled,
)
from torch import nn
from torch.nn import functional

from deploykit.errors import CompressionError
from deploykit.exporter import export_onnx
from deploykit.fusion import fused_operators
from deploykit.quantization.deployable import candidate_graph, deployable
from deploykit.quantize import calibrate
from deploykit.recipe.sections import VerifySection
from deploykit.sensitivity import Sensitivity, layers_to_keep_float, quantization_sensitivity
from deploykit.verify import verify_onnx

pytestmark = pytest.mark.slow
relu = functional.relu
PIXELS = images(64)[0]


LAYERS = ("c1", "c2", "c3", "c4", "c5")


def forward(net, x):
    for name in LAYERS:
        x = relu(net.get_submodule(name)(x))
    return net.fc(pooled(x))


def chain():
    """Five convolutions; the fourth has one weight that makes all others of its channel small."""
    widths = (CHANNELS, 16, 16, 16, 16)
    layers = {name: conv(width, 16) for name, width in zip(LAYERS, widths, strict=True)}
    net = settled(Net(forward, **layers, fc=nn.Linear(16, CLASSES)))
    with torch.no_grad():
        net.c4.weight[:, 0, 0, 0] = 8.0
    return net


@pytest.fixture(scope="module")
def candidate():
    return candidate_of(chain())


@pytest.fixture(scope="module")
def quantized(candidate):
    return calibrate(candidate, PIXELS, target=TARGET)


@pytest.fixture(scope="module")
def sensitivity(quantized):
    return quantization_sensitivity(quantized, PIXELS)


def decibels(candidate, quantized):
    """Measure signal to quantization noise of the logits."""
    pixels = torch.from_numpy(PIXELS)
    with torch.no_grad():
        expected, answered = (
            deployable(one, candidate_graph(one))(pixels) for one in (candidate, quantized)
        )
    noise = (expected - answered).square().sum()
    return 10 * math.log10(float(expected.square().sum() / noise))


def test_roundings_add_up_to_the_noise_that_is_measured(candidate, quantized, sensitivity):
    noise = sum(sensitivity.weights.values()) + sum(sensitivity.tensors.values())
    assert sensitivity.decibels(noise) == pytest.approx(decibels(candidate, quantized), abs=4)


def test_every_layer_and_tensor_is_measured(quantized, sensitivity):
    assert set(sensitivity.weights) == {*LAYERS, "fc"}
    assert set(sensitivity.tensors) == set(quantized.structure["quantization"]["parameters"])


def test_the_layer_with_an_outlier_is_the_most_sensitive(sensitivity):
    assert max(sensitivity.weights, key=sensitivity.weights.__getitem__) == "c4"
    assert next(iter(sensitivity.to_json()["weights"])) == "c4"


def test_measuring_again_gives_the_same(quantized, sensitivity):
    assert quantization_sensitivity(quantized, PIXELS) == sensitivity


class Counted:
    def __init__(self, values):
        self.values, self.largest = values, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        self.largest = max(self.largest, len(self.values[rows]))
        return self.values[rows]


def test_samples_stream_through_in_small_batches(quantized):
    counted = Counted(PIXELS[:30])
    quantization_sensitivity(quantized, counted)
    assert counted.largest <= 8


def test_the_most_sensitive_layer_is_left_in_float_first(candidate, quantized, sensitivity):
    found = decibels(candidate, quantized)
    kept = layers_to_keep_float(quantized, sensitivity, wanted_db=found + 3)
    assert "c4" in kept
    assert len(kept) < 6
    better = calibrate(candidate, PIXELS, target=TARGET, keep_float=kept)
    assert decibels(candidate, better) > found + 1


def test_calibration_leaves_layers_in_float_until_the_noise_is_as_wanted(candidate, tmp_path):
    mixed = calibrate(candidate, PIXELS, target=TARGET, min_sqnr=45)
    kept = mixed.structure["quantization"]["keep_float"]
    assert "c4" in kept
    assert len(kept) < 6
    assert mixed.notes["rounding"]["sqnr_db"] >= 45
    assert next(iter(mixed.notes["rounding"]["weights"])) == "c4"
    again = calibrate(candidate, PIXELS, target=TARGET, keep_float=kept)
    assert again.structure == mixed.structure
    model = export_onnx(mixed, tmp_path / "m.onnx", name="tiny")
    verify_onnx(mixed, model, Samples(PIXELS), VerifySection(), threads=1)
    report = fused_operators(model, threads=1)
    assert {layer.name for layer in report.floating} == set(kept)


def test_calibration_says_where_no_integers_are_quiet_enough(candidate):
    with pytest.raises(CompressionError, match=r"quantize\.min_sqnr: expected at most"):
        calibrate(candidate, PIXELS, target=TARGET, min_sqnr=200)


def test_a_quiet_model_stays_in_integers(candidate, quantized):
    calm = calibrate(candidate, PIXELS, target=TARGET, min_sqnr=5)
    assert calm.structure == quantized.structure
    assert calm.notes["rounding"]["sqnr_db"] > 5


def test_what_holds_already_needs_no_layer(quantized, sensitivity):
    assert layers_to_keep_float(quantized, sensitivity, wanted_db=0) == ()


def test_what_no_integers_hold_keeps_every_layer(quantized, sensitivity):
    kept = layers_to_keep_float(quantized, sensitivity, wanted_db=math.inf)
    assert set(kept) == set(sensitivity.weights)


def test_a_dear_layer_is_spared(quantized, sensitivity):
    noise = sum(sensitivity.weights.values()) + sum(sensitivity.tensors.values())
    wanted = sensitivity.decibels(noise) + 0.01
    (cheap,) = layers_to_keep_float(quantized, sensitivity, wanted_db=wanted)
    cost = {cheap: 1e9}
    assert cheap not in layers_to_keep_float(quantized, sensitivity, wanted_db=wanted, cost=cost)


def test_no_noise_is_infinitely_good():
    assert Sensitivity(1.0, {}, {}).decibels(0.0) == np.inf
