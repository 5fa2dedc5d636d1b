from dataclasses import replace

import pytest
from tiny_quantized import (
    CHANNELS,
    CLASSES,
    TARGET,
    Net,
    candidate_of,
    conv,
    images,
    pooled,
    settled,
)
from torch import nn
from torch.nn import functional

from deploykit.errors import ModelError
from deploykit.exporter import export_onnx
from deploykit.measure.layers import measure_layers
from deploykit.quantize import calibrate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    net = settled(
        Net(
            lambda net, x: net.fc(
                pooled(net.small(functional.hardswish(net.norm(net.large(net.stem(x))))))
            ),
            stem=conv(CHANNELS, 64),
            large=conv(64, 256, 5),
            norm=nn.BatchNorm2d(256),
            small=conv(256, 4, 1),
            fc=nn.Linear(4, CLASSES),
        )
    )
    folder, candidate = tmp_path_factory.mktemp("layers"), candidate_of(net)
    integers = calibrate(candidate, images(32)[0], target=TARGET)
    return {
        "float": export_onnx(candidate, folder / "float.onnx", name="tiny"),
        "int8": export_onnx(integers, folder / "int8.onnx", name="tiny"),
    }


def test_every_layer_has_its_time_in_float_and_in_integers(models):
    found = measure_layers(models, threads=1, rounds=10)
    for layers in found.values():
        assert {"stem", "large", "small", "fc"} <= set(layers)
        assert max(layers, key=layers.__getitem__) == "large"
        assert all(milliseconds >= 0 for milliseconds in layers.values())
    # What is before the first layer, such as reading the pixels, has no name.
    assert set(found["int8"]) - {""} == set(found["float"]) - {""}


def test_a_missing_model_is_refused(models, tmp_path):
    gone = replace(models["float"], path=tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match="cannot open"):
        measure_layers({"float": gone}, threads=1)
