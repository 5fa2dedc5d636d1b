"""Build, prune by half, save, rebuild: models of the libraries, without their weights."""

import pytest
import torch

from deploykit.artifacts import Candidate, Signature, TensorSpec
from deploykit.errors import ModelError
from deploykit.models import build_model, fold_normalization
from deploykit.models.surgery import count_slow_activations, find_gates, replace_operators
from deploykit.prune import prune_channels
from deploykit.recipe.sections import ModelSection, SurgerySection
from deploykit.structure import example_input, load_candidate, save_candidate
from deploykit.surgery import replaced
from deploykit.widths import changed_widths, read_widths, set_widths

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
    ("name", "narrowed", "whole"),
    [
        ("timm:vit_tiny_patch16_224", {"blocks.0.attn.qkv": 384, "patch_embed.proj": 96}, ()),
        ("timm:convnext_atto", {"stem.0": 20, "stages.0.blocks.0.mlp.fc1": 80}, ()),
        ("timm:resmlp_12_224", {"blocks.0.mlp_channels.fc1": 768}, ()),
        (
            "torchvision:vit_b_32",
            {"conv_proj": 384, "encoder.layers.encoder_layer_0.mlp.0": 1536},
            (),
        ),
        ("torchvision:mobilenet_v3_small", {"features.1.block.1.fc1": 4}, ()),
        ("torchvision:shufflenet_v2_x0_5", {"conv1.0": 12}, ("stage3.0.branch1.2",)),
        (
            "torchvision:swin_t",
            {"features.1.0.mlp.0": 192},
            ("features.0.0", "features.1.0.attn.qkv"),
        ),
        ("torchvision:densenet121", {"features.denseblock1.denselayer1.conv2": 16}, ()),
    ],
)
def test_model_of_many_operations_is_pruned_rightly_or_left_alone(tmp_path, name, narrowed, whole):
    """Attention, norms, shuffles, joins: half of all that can be proven, the rest named."""
    sized = {"image_size": SIZE} if "torchvision:vit" in name else {}
    sized = {"img_size": SIZE} if name.startswith(("timm:vit", "timm:resmlp")) else sized
    module = build(name, tmp_path, **sized)
    pruned, notes = prune_channels(
        module, torch.randn(2, 3, SIZE, SIZE), channel_ratio=0.5, scope="uniform"
    )
    assert {layer: notes.widths[layer][1] for layer in narrowed} == narrowed
    left = {layer for label in notes.left_alone for layer in label.split(", ")}
    assert left >= set(whole)
    fresh = build(name, tmp_path, **sized).eval()
    set_widths(fresh, changed_widths(read_widths(module), read_widths(pruned)))
    fresh.load_state_dict(pruned.state_dict())
    sample = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(fresh(sample), pruned(sample))


def test_whole_heads_of_library_models_go(tmp_path):
    x = torch.randn(2, 3, SIZE, SIZE)
    module = build("timm:vit_tiny_patch16_224", tmp_path, img_size=SIZE)
    pruned, _ = prune_channels(module, x, channel_ratio=0.4, scope="uniform")
    assert [block.attn.num_heads for block in pruned.blocks] == [2] * 12
    module = build("torchvision:vit_b_32", tmp_path, image_size=SIZE)
    pruned, _ = prune_channels(module, x, channel_ratio=0.5, scope="uniform")
    assert [layer.self_attention.num_heads for layer in pruned.encoder.layers] == [6] * 12
    assert pruned.hidden_dim == pruned.class_token.shape[-1] == 384


def test_segmentation_model_of_named_outputs_is_pruned(tmp_path):
    arguments = {"weights_backbone": None, "aux_loss": True}
    module = build("torchvision:deeplabv3_mobilenet_v3_large", tmp_path, **arguments).eval()
    pruned, notes = prune_channels(
        module, torch.randn(2, 3, SIZE, SIZE), channel_ratio=0.5, scope="uniform"
    )
    assert notes.parameters[1] < 0.4 * notes.parameters[0]
    assert set(pruned(torch.randn(1, 3, SIZE, SIZE))) == {"out", "aux"}
    assert set(notes.left_alone) == {"classifier.4", "aux_classifier.4"}


@pytest.mark.parametrize(
    ("name", "removed", "relu6"),
    [
        ("torchvision:mobilenet_v3_small", 9, 19),
        ("torchvision:efficientnet_b0", 16, 33),
        ("torchvision:regnet_y_400mf", 16, 0),
        ("timm:mobilenetv3_small_100", 9, 19),
        ("timm:efficientnet_b0", 16, 33),
        ("timm:seresnet18", 8, 0),
    ],
)
def test_slow_operators_of_library_models_give_way(tmp_path, name, removed, relu6):
    torch.manual_seed(0)
    module = build(name, tmp_path).eval()
    signature = Signature(
        (TensorSpec("image", "uint8", (-1, SIZE, SIZE, 3)),),
        (TensorSpec("logits", "float32", (-1, 7)),),
        tuple("abcdefg"),
        PREPROCESS,
    )
    structure = {"model": {"name": name, "arguments": {}}, "sample_shape": [SIZE, SIZE, 3]}
    candidate = Candidate(module, signature, structure, "train")
    batch = torch.randn(4, 3, SIZE, SIZE)
    operated, left_alone = replaced(candidate, SurgerySection(), [batch])
    assert left_alone == {}
    surgery = operated.structure["surgery"]
    assert (len(surgery["removed"]), len(surgery["relu6"])) == (removed, relu6)
    assert find_gates(operated.module, [batch]) == {}
    assert count_slow_activations(operated.module, batch) == 0
    fresh = build(name, tmp_path)
    replace_operators(fresh, surgery)
    fresh.load_state_dict(operated.module.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(batch), operated.module.eval()(batch))
