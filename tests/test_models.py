import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deploykit.errors import MissingDependency, ModelError
from deploykit.models import build_model, load_weights
from deploykit.recipe.sections import ModelSection

IMAGE = (8, 8, 1)


def build(name, base=Path(), *, classes=10, sample_shape=IMAGE, weights=None, **arguments):
    section = ModelSection(name=name, weights=weights, arguments=arguments)
    return build_model(section, classes=classes, sample_shape=sample_shape, base=base)


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


def tensors_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(tensors, **changes):
    """Return ``tensors`` with some replaced; a value of None drops one."""
    return {k: v for k, v in {**tensors, **changes}.items() if v is not None}


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 20, 3), (2, 2, 4)])
def test_digits_cnn_takes_any_image_size_and_channel_count(shape):
    module = build("digits-cnn", sample_shape=shape, classes=7).eval()
    assert module(torch.randn(2, shape[2], *shape[:2])).shape == (2, 7)


def test_digits_cnn_takes_its_widths_from_the_recipe():
    module = build("digits-cnn", widths=[16, 32])
    assert [conv.out_channels for conv in module.convs] == [16, 32]


@pytest.mark.parametrize("shape", [(5,), (8, 8, 3), (2, 3, 4, 5)])
def test_mlp_takes_samples_of_any_shape(shape):
    module = build("mlp", sample_shape=shape, classes=3, hidden=[6])
    assert module(torch.randn(2, *shape)).shape == (2, 3)


def test_mlp_without_hidden_layers_is_linear():
    assert len(build("mlp", hidden=[]).layers) == 1


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5), (44, 7), (56, 9)])
def test_resnet_has_the_published_names_and_shapes(depth, blocks):
    state = build(f"resnet{depth}", sample_shape=(32, 32, 3)).state_dict()
    expected = {"conv1.weight": (16, 3, 3, 3), "bn1.weight": (16,)}
    expected |= {"linear.weight": (10, 64), "linear.bias": (10,)}
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(blocks):
            before = width // 2 if stage > 1 and block == 0 else width
            prefix = f"layer{stage}.{block}"
            expected[f"{prefix}.conv1.weight"] = (width, before, 3, 3)
            expected[f"{prefix}.conv2.weight"] = (width, width, 3, 3)
            expected |= {f"{prefix}.bn{i}.running_var": (width,) for i in (1, 2)}
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert sum("conv" in key for key in state) == depth - 1
    assert not any("shortcut" in key or "downsample" in key for key in state)


def test_resnet_shortcut_pads_channels_evenly_and_skips_pixels():
    block = build("resnet20", sample_shape=(32, 32, 3)).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_model_of_the_user_is_found_relative_to_the_recipe(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "parts.py").write_text("from torch import nn\nlayer = nn.Linear\n")
    (folder / "mine.py").write_text(
        "from parts import layer\ndef net(classes, width):\n    return layer(width, classes)\n"
    )
    module = build("mine.py:net", folder, classes=3, width=5)
    assert (module.in_features, module.out_features) == (5, 3)


def test_function_of_the_user_imports_its_neighbours_when_it_is_called(tmp_path):
    (tmp_path / "late_parts.py").write_text("from torch import nn\nlayer = nn.Linear\n")
    text = "def net(classes):\n    from late_parts import layer\n    return layer(4, classes)\n"
    (tmp_path / "mine.py").write_text(text)
    assert build("mine.py:net", tmp_path, classes=3).out_features == 3
    (tmp_path / "mine.py").write_text("def net():\n    import parts_that_are_not_there\n")
    with pytest.raises(ModelError, match=r"mine\.py:net: its code raised ModuleNotFoundError"):
        build("mine.py:net", tmp_path)


def test_two_files_of_one_name_are_two_models(tmp_path):
    for folder, width in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        text = f"from torch import nn\ndef net():\n    return nn.Linear({width}, 1)\n"
        (tmp_path / folder / "m.py").write_text(text)
    widths = [build(f"{folder}/m.py:net", tmp_path).in_features for folder in "ab"]
    assert widths == [3, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.py:net", None, "no such file"),
        ("m.py:net", "def other(): pass", "expected a function 'net' in m.py, got none"),
        ("m.py:net", "net = 3", "expected a function 'net' in m.py, got none"),
        ("m.py:net", "raise KeyError('x')", "KeyError"),
        ("m.py:net", "def net(:", "SyntaxError"),
        ("m.py:net", "def net(): return 3", "expected a torch.nn.Module, got int"),
        ("m.py:net", "def net(depth): return 3", "missing a required argument: 'depth'"),
        ("m.py:net", "def net(): raise ValueError('odd width')", "odd width"),
        ("m.py:net", "def net(): return {}['w']", "KeyError: 'w'"),
        (
            "m.py:net",
            "from torch import nn\ndef net(): return nn.Sequential(nn.LazyLinear(3))",
            r"got lazy ones \(0\.weight, 0\.bias\); say how many inputs",
        ),
    ],
)
def test_bad_model_of_the_user_is_one_clear_error(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / "m.py").write_text(text)
    with pytest.raises(ModelError, match=message):
        build(name, tmp_path)


def test_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"digits-cnn.*resnet56.*got 'resnet57'"):
        build("resnet57")


def test_unknown_argument_is_refused_with_what_is_taken():
    with pytest.raises(ModelError, match=r"model.arguments: digits-cnn.*'depth'"):
        build("digits-cnn", depth=3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digits-cnn", {"widths": [0, 4]}, "widths: expected positive"),
        ("digits-cnn", {"widths": []}, "widths: expected positive"),
        ("digits-cnn", {"widths": "wide"}, "could not be built"),
        ("mlp", {"hidden": [-1]}, "hidden: expected positive"),
        ("mlp", {"dropout": 1.5}, "dropout: expected 0 <= x < 1"),
    ],
)
def test_bad_argument_is_one_clear_error(name, arguments, message):
    with pytest.raises(ModelError, match=message):
        build(name, **arguments)


def test_arguments_cannot_contradict_the_data(tmp_path):
    section = ModelSection(name="mlp", arguments={"classes": 3})
    with pytest.raises(ModelError, match=r"arguments\.classes: the data decide it"):
        build_model(section, classes=10, sample_shape=IMAGE, base=tmp_path)


@pytest.mark.parametrize("name", ["digits-cnn", "resnet20"])
def test_image_model_refuses_arrays(name):
    with pytest.raises(ModelError, match="expected images"):
        build(name, sample_shape=(64,))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library_names_the_install_command(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingDependency, match=r"pip install 'deploykit\[vision\]'"):
        build(f"{library}:resnet18")


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",)])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_weights_load_through_nests_and_prefixes(tmp_path, nest, prefix):
    source, module = tiny(), tiny()
    nn.init.zeros_(module[0].weight)
    content = {prefix + key: value for key, value in source.state_dict().items()}
    for key in nest:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    load_weights(module, tmp_path / "w.pth")
    assert all(torch.equal(a, b) for a, b in zip(*map(_values, (source, module)), strict=True))


def _values(module):
    return list(module.state_dict().values())


def test_prefix_that_belongs_to_the_model_stays(tmp_path):
    module = nn.ModuleDict({"model": nn.Linear(2, 2)})
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")


def test_weights_of_old_torch_lack_batch_counters(tmp_path):
    module = tiny()
    tensors = {k: v for k, v in tensors_of(module).items() if "num_batches" not in k}
    save_file(tensors, tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")


def test_half_precision_weights_widen_exactly(tmp_path):
    module = nn.Linear(3, 3)
    save_file({k: v.half() for k, v in tensors_of(module).items()}, tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert module.weight.dtype == torch.float32


def test_every_fault_of_the_weights_is_listed_and_nothing_is_loaded(tmp_path):
    module = tiny()
    before = tensors_of(module)
    wrong = {key: torch.zeros_like(value) for key, value in before.items()}
    wrong = changed(
        wrong,
        **{
            "0.weight": None,
            "extra.weight": torch.zeros(1),
            "0.bias": torch.zeros(5),
            "1.weight": torch.zeros(4, dtype=torch.int64),
            "1.bias": torch.full((4,), torch.nan),
            "1.running_mean": torch.full((4,), torch.inf),
            "3.bias": torch.zeros(10, dtype=torch.float64),
        },
    )
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as caught:
        load_weights(module, tmp_path / "w.safetensors")
    for part in (
        "missing 0.weight",
        "unknown extra.weight",
        "0.bias: expected shape (4,), got (5,)",
        "1.weight: expected torch.float32, got torch.int64",
        "1.bias: holds NaN",
        "1.running_mean: holds NaN or infinity",
        "3.bias: expected torch.float32, got torch.float64",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_classifier_of_another_class_count_is_named(tmp_path):
    save_file(tensors_of(build("mlp", classes=100)), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="tells 100 classes apart, the data have 10"):
        build("mlp", tmp_path, weights="w.safetensors")


def test_weights_path_is_relative_to_the_recipe(tmp_path):
    source = build("mlp")
    save_file(tensors_of(source), tmp_path / "w.safetensors")
    module = build("mlp", tmp_path, weights="w.safetensors")
    assert torch.equal(module.layers[0].weight, source.layers[0].weight)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"0.weight": torch.zeros(1), "x": Canary(canary)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="more than plain tensors"):
        load_weights(tiny(), tmp_path / "w.pt")
    assert not canary.exists()
    # The control: read without the safeguard, the same file does run code.
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_cut_anywhere_are_refused(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    save = torch.save if suffix == ".pt" else save_file
    save(tensors_of(tiny()), path)
    whole = path.read_bytes()
    for percent in range(0, 100, 4):
        path.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(ModelError, match=r"model.weights: .*w\."):
            load_weights(tiny(), path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, torch.zeros(3), {"a": 3}])
def test_torch_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"expected tensors by name|does not fit"):
        load_weights(tiny(), tmp_path / "w.pt")


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_no_file_are_refused(tmp_path, kind, suffix):
    path = tmp_path / f"w{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(ModelError, match="no such file"):
        load_weights(tiny(), path)


@pytest.mark.slow
def test_digits_cnn_learns_the_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    y = torch.tensor(digits.target)[order]
    torch.manual_seed(0)
    module = build("digits-cnn")
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=1e-4)
    steps = 6 * -(-1260 // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(6):
        for rows in torch.randperm(1260).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = module.eval()(x[1530:]).argmax(1) == y[1530:]
    assert right.float().mean() >= 0.97
