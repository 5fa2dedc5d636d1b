"""Build, prune by half, save, rebuild: models of the libraries, without their weights."""

import pytest
import torch

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.errors import CompressionError, ModelError
from deploykit.models import build_model, fold_normalization
from deploykit.prune import prune_channels
from deploykit.recipe.sections import ModelSection
from deploykit.structure import example_input, load_candidate, save_candidate
from deploykit.widths import changed_widths, read_widths

pytestmark = pytest.mark.vision

SIZE = 64
PREPROCESS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "channels": 3}


def build(name, base, classes=7, **arguments):
    section = ModelSection(name=name, arguments=arguments)
    return build_model(section, classes=classes, sample_shape=(SIZE, SIZE, 3), base=base)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("torchvision:resnet18", 0.35),
        ("torchvision:mobilenet_v2", 0.45),
        ("timm:resnet18", 0.35),
        ("timm:efficientnet_lite0", 0.45),
    ],
)
def test_library_model_is_pruned_by_half_saved_and_rebuilt_bit_equal(tmp_path, name, share):
    torch.manual_seed(0)
    module = build(name, tmp_path).eval()
    module, preprocess, note = fold_normalization(module, PREPROCESS, torch.randn(2, 3, SIZE, SIZE))
    assert note["folded"]
    pruned, notes = prune_channels(
        module, torch.randn(2, 3, SIZE, SIZE), channel_ratio=0.5, scope="uniform"
    )
    assert list(notes.left_alone.values()) == ["it carries the model's output"]
    assert notes.parameters[1] < share * notes.parameters[0]
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, SIZE, SIZE, 3)),),
        (TensorSpec("logits", "float32", (-1, 7)),),
        tuple("abcdefg"),
        preprocess,
    )
    structure = {
        "model": {"name": name, "arguments": {}},
        "classes": 7,
        "sample_shape": [SIZE, SIZE, 3],
        "input": note,
        "widths": changed_widths(read_widths(module), read_widths(pruned)),
    }
    candidate = Candidate(pruned, signature, structure, "prune")
    save_candidate(candidate, tmp_path / "c")
    loaded = load_candidate(tmp_path / "c", base=tmp_path)
    sample = example_input(candidate, batch=2, seed=5)
    with torch.no_grad():
        assert torch.equal(loaded.module(sample), pruned.eval()(sample))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_unknown_library_model_is_refused(tmp_path, library):
    with pytest.raises(ModelError, match="has no such model"):
        build(f"{library}:resnet17", tmp_path)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_unknown_argument_of_a_library_model_is_refused(tmp_path, library):
    with pytest.raises(ModelError, match="could not be built"):
        build(f"{library}:resnet18", tmp_path, hair="long")


@pytest.mark.parametrize(
    ("name", "narrowed", "left_alone", "arguments"),
    [
        ("timm:vit_tiny_patch16_224", "blocks.0.mlp.fc1", "patch_embed", {"img_size": SIZE}),
        ("timm:convnext_atto", "stages.0.blocks.0.mlp.fc1", "stem.0", {}),
        ("torchvision:mobilenet_v3_small", "features.1.block.1.fc1", "classifier.3", {}),
    ],
)
def test_model_of_many_operations_is_pruned_rightly_or_left_alone(
    tmp_path, name, narrowed, left_alone, arguments
):
    """Attention, layer norm, squeeze-excite: the trial decides, group by group."""
    module = build(name, tmp_path, **arguments)
    _, notes = prune_channels(
        module, torch.randn(2, 3, SIZE, SIZE), channel_ratio=0.3, scope="uniform"
    )
    assert narrowed in notes.widths
    assert any(left_alone in label for label in notes.left_alone)


def test_model_that_the_dependency_graph_cannot_hold_is_refused(tmp_path):
    module = build("torchvision:shufflenet_v2_x0_5", tmp_path)
    with pytest.raises(CompressionError, match="cannot be traced"):
        prune_channels(module, torch.randn(2, 3, SIZE, SIZE), channel_ratio=0.3)
