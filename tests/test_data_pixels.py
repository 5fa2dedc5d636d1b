import numpy as np
import pytest
import torch
from data_samples import pixels

from deploykit.data.pixels import normalize
from deploykit.runtime import zero_point_and_scale


def spec(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return {"channels": channels, "mean": list(mean), "std": list(std)}


def test_normalization_is_the_runtimes_affine_map():
    batch = pixels(4, 5, 7)
    zero_point, scale = zero_point_and_scale(spec())
    expected = ((batch.astype(np.float32) - zero_point) * scale).astype(np.float32)
    out = normalize(torch.from_numpy(batch), spec())
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert np.array_equal(out.numpy(), expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_one_mean_and_std_serve_all_channels(channels):
    batch = torch.from_numpy(pixels(2, channels=channels))
    out = normalize(batch, spec(channels, (0.5,), (0.25,)))
    assert out.shape == (2, channels, 6, 6)
    torch.testing.assert_close(out, (batch.permute(0, 3, 1, 2) - 128.0) / 63.75)


def test_augmented_pixels_normalize_as_stored_ones_do():
    batch = torch.from_numpy(pixels(3))
    augmented = batch.permute(0, 3, 1, 2).float()
    assert torch.equal(normalize(augmented, spec()), normalize(batch, spec()))


def test_features_pass_as_float32():
    features = torch.arange(6, dtype=torch.float64).view(2, 3)
    out = normalize(features, None)
    assert out.dtype == torch.float32
    assert torch.equal(out.double(), features)
