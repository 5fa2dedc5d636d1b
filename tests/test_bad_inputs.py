"""Whatever a user gets wrong: one clear sentence, the documented exit code, nothing lost."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import pixels, png, write_folder, write_parquet
from safetensors.torch import save_file
from tiny_bundle import make_bundle
from tiny_run import CALIBRATED, RECIPE, snapshot

ARRAYS = RECIPE.replace("image-classification", "classification").replace(
    "{name: digits-cnn, arguments: {widths: [16, 16, 16]}}", "{name: mlp}"
)
CODES = {2, 3, 4, 5}


def faults_of(code: int, out: str, err: str) -> list[str]:
    """Return what about the end of a command a user should not have to see."""
    faults = []
    lines = err.strip().splitlines()
    if "Traceback" in out + err or 'File "' in err:
        faults.append("traceback")
    if "see --debug" in err:
        faults.append("an error that nobody thought of")
    if code not in CODES:
        faults.append(f"exit code {code}")
    if not lines or not lines[0].startswith("error: "):
        faults.append("no sentence")
    if out.strip():
        faults.append("talk on standard output")
    if any(len(line) > 600 for line in lines):
        faults.append("a sentence without end")
    return faults


@pytest.mark.parametrize(
    ("code", "out", "err"),
    [
        (3, "", 'Traceback (most recent call last):\n  File "x.py", line 1\nKeyError'),
        (1, "", "error: unexpected KeyError: 3; see --debug"),
        (0, "", "error: x"),
        (3, "", ""),
        (3, "accuracy: 3%", "error: x"),
        (3, "", "error: " + "x" * 700),
    ],
)
def test_checker_sees_what_it_looks_for(code, out, err):
    assert faults_of(code, out, err)
    assert faults_of(3, "", "error: data: expected, got") == []


# what is wrong with a recipe, its data, its model: each makes files and returns the recipe


@dataclass(frozen=True)
class Place:
    """Where one case plays."""

    path: Path

    def recipe(self, text: str = RECIPE, *changes: tuple[str, str]) -> list[object]:
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        file = self.path / "recipe.yaml"
        file.write_text(text)
        return ["compress", file, "--out", self.path / "run"]

    def data(self, section: str, text: str = CALIBRATED) -> list[object]:
        return self.recipe(text, ("{source: digits, limit: 300}", section))

    def model(self, section: str, text: str = CALIBRATED) -> list[object]:
        return self.recipe(text, ("{name: mlp, arguments: {hidden: [16]}}", section))

    def weights(self, name: str) -> list[object]:
        return self.model(f"{{name: mlp, arguments: {{hidden: [16]}}, weights: {name}}}")

    def code(self, body: str) -> list[object]:
        (self.path / "mine.py").write_text(body)
        return self.model("{name: mine.py:net}")


def raw_recipe(data: bytes) -> Callable[[Place], list[object]]:
    def make(place: Place) -> list[object]:
        arguments = place.recipe()
        (place.path / "recipe.yaml").write_bytes(data)
        return arguments

    return make


def changed(old: str, new: str, text: str = RECIPE) -> Callable[[Place], list[object]]:
    return lambda place: place.recipe(text, (old, new))


def with_set(*overrides: str) -> Callable[[Place], list[object]]:
    return lambda place: [
        *place.recipe(),
        *(word for one in overrides for word in ("--set", one)),
    ]


def fifo_recipe(place: Place) -> list[object]:
    arguments = place.recipe()
    (place.path / "recipe.yaml").unlink()
    os.mkfifo(place.path / "recipe.yaml")
    return arguments


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n"
RECIPES = {
    "missing": (lambda place: ["compress", place.path / "no.yaml", "--out", "run"], "no such"),
    "folder": (lambda place: ["compress", place.path, "--out", "run"], "got a folder"),
    "fifo": (fifo_recipe, "something else"),
    "empty": (raw_recipe(b""), "expected a recipe"),
    "binary": (raw_recipe(bytes(range(256))), "recipe.yaml"),
    "huge": (raw_recipe(b"# " + b"x" * (1 << 21)), "at most 1 MiB"),
    "alias bomb": (raw_recipe(BOMB.encode()), "anchors|aliases"),
    "python object": (raw_recipe(b"name: !!python/object:os.system x"), "tag"),
    "deep": (raw_recipe(b"[" * 10000), "recipe.yaml"),
    "list": (raw_recipe(b"[1, 2]"), "expected a recipe's keys"),
    "unknown key": (changed("train: {epochs", "train: {epoch"), "did you mean .*epochs"),
    "twice": (changed("name: tiny", "name: tiny\nname: other"), "name"),
    "wrong type": (changed("epochs: 1, batch", "epochs: many, batch"), "expected .*got 'many'"),
    "nan": (changed("lr: 0.01", "lr: .nan"), "lr"),
    "negative": (changed("epochs: 1, batch", "epochs: -1, batch"), "epochs"),
    "ratio": (changed("ratio: 0.3", "ratio: 1.5"), "channel_ratio: expected .*got 1.5"),
    "name with path": (changed("name: tiny", "name: ../tiny"), "name"),
    "schema": (changed("schema: 1", "schema: 2"), "schema"),
    "target": (changed("model:", "target: abacus\nmodel:"), "target: expected one of"),
    "bad set": (with_set("train.epochs"), "--set"),
    "unknown set": (with_set("train.epoch=3"), "did you mean"),
    "augmented arrays": (
        changed("limit: 300", "limit: 300, augment: [{name: flip}]", ARRAYS),
        "expected images to augment",
    ),
}


def array_file(place: Place, **arrays: object) -> list[object]:
    np.savez(place.path / "d.npz", **arrays)
    return place.data("{source: numpy, train: d.npz}")


def parquet_cut(place: Place) -> list[object]:
    write_parquet(place.path / "d.parquet")
    data = (place.path / "d.parquet").read_bytes()
    (place.path / "d.parquet").write_bytes(data[: len(data) // 2])
    return place.data("{source: parquet, train: d.parquet}")


def parquet_bad_image(place: Place) -> list[object]:
    images = [png(one) for one in pixels(20)]
    images[13] = images[13][:40]
    write_parquet(place.path / "d.parquet", images)
    return place.data("{source: parquet, train: d.parquet}")


def parquet_columns(place: Place) -> list[object]:
    write_parquet(place.path / "d.parquet")
    return place.data("{source: parquet, train: d.parquet, label_column: y}")


def folder_with_text(place: Place) -> list[object]:
    write_folder(place.path / "d")
    (place.path / "d/cat/3.png").write_text("not an image")
    return place.data("{source: imagefolder, train: d}")


def csv_short(place: Place) -> list[object]:
    (place.path / "d.csv").write_text("a,b,label\n1,2,0\n3,1\n")
    text = CALIBRATED.replace("image-classification", "classification")
    return place.data("{source: csv, train: d.csv}", text)


def function_raises(place: Place) -> list[object]:
    (place.path / "mine.py").write_text("def data():\n    return {}['x']\n")
    return place.data("{source: 'mine.py:data'}")


class Canary:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


IMAGES = np.zeros((40, 8, 8), np.uint8)
LABELS = np.arange(40) % 2
DATA = {
    "unknown source": (lambda place: place.data("{source: cloud}"), "data.source"),
    "no path": (lambda place: place.data("{source: parquet}"), "data.train: expected the path"),
    "missing": (lambda place: place.data("{source: numpy, train: no.npz}"), "no.npz"),
    "truncated parquet": (parquet_cut, "d.parquet"),
    "bad image": (parquet_bad_image, "row 13"),
    "no column": (parquet_columns, "y"),
    "text in a folder": (folder_with_text, "d/cat/3.png"),
    "short row": (csv_short, "d.csv"),
    "counts": (lambda place: array_file(place, x=IMAGES, y=LABELS[:30]), "40 samples and 30"),
    "objects": (
        lambda place: array_file(place, x=np.array([{}] * 4, object), y=LABELS[:4]),
        "d.npz",
    ),
    "floats as images": (lambda place: array_file(place, x=IMAGES / 2, y=LABELS), "uint8"),
    "rare class": (
        lambda place: array_file(place, x=IMAGES, y=np.array([0] * 39 + [1])),
        "class|sample",
    ),
    "function raises": (function_raises, "mine.py:data.*KeyError: 'x'"),
    "too few": (
        lambda place: place.data("{source: digits, limit: 10}"),
        "at least 3 rows of class",
    ),
}


def weights_of(
    change: Callable[[dict[str, torch.Tensor]], None],
) -> Callable[[Place], list[object]]:
    def make(place: Place) -> list[object]:
        from deploykit.models.build import call_factory

        module = call_factory(
            "mlp", {"hidden": [16]}, classes=10, sample_shape=(8, 8, 1), base=Path()
        )
        state = {name: value.clone() for name, value in module.state_dict().items()}
        change(state)
        save_file(state, place.path / "w.safetensors")
        return place.weights("w.safetensors")

    return make


def damaged_weights(damage: Callable[[bytes], bytes]) -> Callable[[Place], list[object]]:
    def make(place: Place) -> list[object]:
        arguments = weights_of(lambda state: None)(place)
        file = place.path / "w.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        return arguments

    return make


def rename_key(state: dict[str, torch.Tensor]) -> None:
    name = next(iter(state))
    state["stranger.weight"] = state.pop(name)


def first(state: dict[str, torch.Tensor], value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = next(name for name in state if name.endswith("weight"))
    state[name] = value(state[name])


def pickled(place: Place) -> list[object]:
    torch.save({"w": Canary(place.path / "canary")}, place.path / "w.pt")
    return place.weights("w.pt")


def fifo_weights(place: Place) -> list[object]:
    os.mkfifo(place.path / "w.safetensors")
    return place.weights("w.safetensors")


NET = "import torch\nfrom torch import nn\n"
MODELS = {
    "unknown": (lambda place: place.model("{name: resnet57}"), "resnet56"),
    "unknown argument": (
        lambda place: place.model("{name: mlp, arguments: {depth: 3}}"),
        "model.arguments",
    ),
    "missing file": (lambda place: place.model("{name: 'no.py:net'}"), "no such file"),
    "missing function": (lambda place: place.code("x = 3"), "expected a function 'net'"),
    "file raises": (lambda place: place.code("1 / 0"), "ZeroDivisionError"),
    "forward raises": (
        lambda place: place.code(NET + "def net(): return nn.Linear(3, 10)"),
        r"expected a forward pass on input \(2, 1, 8, 8\)",
    ),
    "too few logits": (
        lambda place: place.code(
            NET + "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))"
        ),
        r"expected logits \(2, 10\), one a class, got \(2, 7\)",
    ),
    "branch on values": (
        lambda place: place.code(
            NET
            + "class Net(nn.Module):\n"
            + "    def __init__(self):\n        super().__init__()\n"
            + "        self.a = nn.Linear(64, 10)\n"
            + "    def forward(self, x):\n        y = self.a(x.flatten(1))\n"
            + "        return y if y.sum() > 0 else -y\n"
            + "def net(): return Net()\n"
        ),
        "torch.export can trace",
    ),
    "unknown group": (
        changed("batch_size: 16", "batch_size: 16, groups: [{modules: [layer9]}]"),
        "layer9",
    ),
    "unknown protected": (changed("ratio: 0.3", "ratio: 0.3, protect: [layer9]"), "layer9"),
    "no weights": (lambda place: place.weights("no.safetensors"), "no.safetensors"),
    "folder as weights": (lambda place: place.weights("."), "weights"),
    "fifo as weights": (fifo_weights, "w.safetensors"),
    "other suffix": (lambda place: place.weights("recipe.yaml"), "recipe.yaml"),
    "empty weights": (damaged_weights(lambda data: b""), "w.safetensors"),
    "half the weights": (damaged_weights(lambda data: data[: len(data) // 2]), "w.safetensors"),
    "giant header": (
        damaged_weights(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
        "w.safetensors",
    ),
    "flipped header": (
        damaged_weights(lambda data: data[:12] + bytes([data[12] ^ 255]) + data[13:]),
        "w.safetensors",
    ),
    "pickle": (pickled, "w.pt"),
    "wrong key": (weights_of(rename_key), "stranger"),
    "wrong shape": (weights_of(lambda state: first(state, lambda one: one[:3])), "shape|expected"),
    "nan": (weights_of(lambda state: first(state, lambda one: one * float("nan"))), "NaN"),
}


def check_compress(deploykit, tmp_path, make, code, words):
    import re

    place = Place(tmp_path)
    arguments = make(place)
    before = snapshot(tmp_path)
    done = deploykit(*arguments)
    assert faults_of(done.code, done.out, done.err) == [], done.err
    assert done.code == code, done.err
    assert re.search(words, done.err.replace("\n", " ")), done.err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe_is_refused(deploykit, tmp_path, name):
    check_compress(deploykit, tmp_path, RECIPES[name][0], 2, RECIPES[name][1])


@pytest.mark.parametrize("name", DATA)
def test_bad_data_are_refused(deploykit, tmp_path, name):
    check_compress(deploykit, tmp_path, DATA[name][0], 3, DATA[name][1])


@pytest.mark.parametrize("name", MODELS)
def test_bad_model_is_refused(deploykit, tmp_path, name):
    check_compress(deploykit, tmp_path, MODELS[name][0], 3, MODELS[name][1])


def test_canary_would_be_seen(tmp_path):
    """Read as a pickle, the file does leave its mark."""
    pickled(Place(tmp_path))
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


# bundles


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def linked(bundle: Path) -> None:
    (bundle / "model.onnx").rename(bundle.parent / "elsewhere.onnx")
    (bundle / "model.onnx").symlink_to(bundle.parent / "elsewhere.onnx")


BUNDLES = {
    "gone": (lambda bundle: shutil.rmtree(bundle), "tiny"),
    "empty": (lambda bundle: [shutil.rmtree(bundle), bundle.mkdir()], "manifest"),
    "a file": (lambda bundle: [shutil.rmtree(bundle), bundle.write_text("x")], "tiny"),
    "altered model": (lambda bundle: flip(bundle / "model.onnx"), "model.onnx"),
    "altered runner": (lambda bundle: flip(bundle / "run.py"), "run.py"),
    "altered golden": (lambda bundle: flip(bundle / "golden/000.png"), "golden/000.png"),
    "short model": (
        lambda bundle: rewrite(bundle / "model.onnx", lambda data: data[:-1]),
        "model.onnx",
    ),
    "extra file": (lambda bundle: (bundle / "extra").touch(), "extra"),
    "missing file": (lambda bundle: (bundle / "README.md").unlink(), "README.md"),
    "linked model": (linked, "model.onnx"),
    "manifest is text": (
        lambda bundle: (bundle / "manifest.json").write_text("hello"),
        "manifest",
    ),
    "deep manifest": (
        lambda bundle: (bundle / "manifest.json").write_text("[" * 100000),
        "manifest",
    ),
    "spaced manifest": (
        lambda bundle: rewrite(bundle / "manifest.json", lambda data: data + b" "),
        "canonical",
    ),
    "newer schema": (
        lambda bundle: rewrite(
            bundle / "manifest.json", lambda data: data.replace(b'"schema":1', b'"schema":9')
        ),
        "schema|digest",
    ),
}


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize("command", ["verify", "predict", "bench", "inspect"])
def test_broken_bundle_is_refused_by_every_command(deploykit, tmp_path, name, command):
    bundle = make_bundle(tmp_path)
    (tmp_path / "one.png").write_bytes((bundle / "golden/000.png").read_bytes())
    damage, words = BUNDLES[name]
    damage(bundle)
    before = snapshot(tmp_path)
    done = deploykit(command, bundle, *([tmp_path / "one.png"] if command == "predict" else []))
    assert faults_of(done.code, done.out, done.err) == [], done.err
    assert done.code == 4, done.err
    assert any(word in done.err for word in words.split("|")), done.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.png", None, "gone.png"),
        ("folder.png", "folder", "folder.png"),
        ("text.png", b"hello", "expected a PNG or JPEG"),
        ("empty.png", b"", "expected a PNG or JPEG"),
        ("cut.png", png(pixels(1)[0])[:50], "PNG or JPEG"),
        ("array.npy", b"\x93NUMPY\x01\x00", "array.npy"),
    ],
)
def test_bad_sample_is_refused(deploykit, tmp_path, name, content, words):
    bundle = make_bundle(tmp_path)
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    done = deploykit("predict", bundle, bundle / "golden/000.png", tmp_path / name)
    assert faults_of(done.code, done.out, done.err) == [], done.err
    assert done.code == 3
    assert words in done.err


# runs


def report_of(run: Path, change: Callable[[dict], object]) -> None:
    report = json.loads((run / "report.json").read_text())
    change(report)
    (run / "report.json").write_text(json.dumps(report))


RUNS = {
    "gone": (shutil.rmtree, 3, "run"),
    "empty": (lambda run: [shutil.rmtree(run), run.mkdir()], 3, "expected a run with recipe.yaml"),
    "unfinished": (lambda run: (run / "report.json").unlink(), 3, "expected a finished run"),
    "report is text": (lambda run: (run / "report.json").write_text("x"), 3, "report.json"),
    "report is a list": (lambda run: (run / "report.json").write_text("[]"), 3, "report.json"),
    "report is short": (
        lambda run: report_of(run, lambda report: report.pop("final")),
        3,
        "without final",
    ),
    "budget broken": (
        lambda run: report_of(run, lambda report: report["budget"].update(passed=False)),
        4,
        "budget does not hold",
    ),
    "no model": (lambda run: (run / "onnx/quantize.onnx").unlink(), 3, "quantize.onnx"),
    "altered model": (lambda run: flip(run / "onnx/quantize.onnx"), 4, "quantize.onnx"),
    "no golden": (lambda run: shutil.rmtree(run / "golden"), 3, "golden"),
    "altered golden": (lambda run: flip(run / "golden/expected.npz"), 3, "golden"),
    "broken recipe": (lambda run: (run / "recipe.yaml").write_text("x: 1"), 2, "recipe.yaml"),
}
RETARGETED = {
    "no calibration": (lambda run: (run / "calibration.npy").unlink(), 3, "calibration.npy"),
    "cut calibration": (
        lambda run: rewrite(run / "calibration.npy", lambda data: data[:200]),
        3,
        "calibration.npy",
    ),
    "other calibration": (
        lambda run: np.save(run / "calibration.npy", np.zeros((3, 4, 4, 1), np.uint8)),
        3,
        r"got uint8 (3, 4, 4, 1)",
    ),
    "altered candidate": (
        lambda run: flip(run / "candidates/prune/model.safetensors"),
        3,
        "not the weights",
    ),
    "no candidate": (lambda run: shutil.rmtree(run / "candidates"), 3, "no such candidate"),
}


def check_export(deploykit, tiny_run, tmp_path, damage, code, words, *options):
    run = tiny_run.copy(tmp_path / "run")
    damage(run)
    before = snapshot(tmp_path)
    done = deploykit("export", run, "--out", tmp_path / "bundle", *options)
    assert faults_of(done.code, done.out, done.err) == [], done.err
    assert done.code == code, done.err
    assert words in done.err
    assert snapshot(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_broken_run_is_not_exported(deploykit, tiny_run, tmp_path, name):
    check_export(deploykit, tiny_run, tmp_path, *RUNS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RETARGETED)
def test_broken_run_is_not_made_anew_for_another_target(deploykit, tiny_run, tmp_path, name):
    made_for = tiny_run.report["details"]["model"]["target"]
    # Without VNNI every other CPU gets the same integers.
    other = "tensorrt" if made_for == "cpu-x86-avx2" else "cpu-x86-avx2"
    damage, code, words = RETARGETED[name]
    check_export(deploykit, tiny_run, tmp_path, damage, code, words, "--target", other)


@pytest.mark.slow
def test_unknown_target_is_refused(deploykit, tiny_run, tmp_path):
    done = deploykit("export", tiny_run.path, "--out", tmp_path / "b", "--target", "abacus")
    assert done.code == 2
    assert "expected one of cpu, cpu-arm64" in done.err
    assert not (tmp_path / "b").exists()


# command lines


def taken(place: Path, kind: str) -> Path:
    out = place / "run"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        (place / "real").mkdir()
        (place / "real/recipe.yaml").write_text("mine")
        out.symlink_to(place / "real")
    elif kind == "below a file":
        out.write_text("mine")
        out = out / "run"
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    return out


@pytest.mark.parametrize("kind", ["file", "link", "folder", "below a file"])
@pytest.mark.parametrize("how", [[], ["--force"]])
def test_place_that_is_taken_is_left_alone(deploykit, tmp_path, kind, how):
    (tmp_path / "recipe.yaml").write_text(CALIBRATED)
    out = taken(tmp_path, kind)
    before = snapshot(tmp_path)
    done = deploykit("compress", tmp_path / "recipe.yaml", "--out", out, *how)
    assert faults_of(done.code, done.out, done.err) == [], done.err
    assert done.code == 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", [None, "x", "[]", "{}", '{"stages": {"train": {}}}', "folder"])
def test_bad_latency_table_is_refused(deploykit, tmp_path, content):
    arguments = Place(tmp_path).recipe()
    table = tmp_path / "m.json"
    if content == "folder":
        table.mkdir()
    elif content is not None:
        table.write_text(content)
    done = deploykit(*arguments, "--latency-table", table)
    assert faults_of(done.code, done.out, done.err) == [], done.err
    assert done.code == 2
    assert "--latency-table" in done.err
    assert not (tmp_path / "run").exists()


def test_latency_table_of_other_stages_is_refused_before_any_work(deploykit, tmp_path):
    from test_decisions import figures

    arguments = Place(tmp_path).recipe()
    table = tmp_path / "m.json"
    table.write_text(json.dumps({"stages": {"train": figures(1.0)}}))
    done = deploykit(*arguments, "--latency-table", table)
    assert done.code == 2
    assert "expected measurements of prune, quantize, got only train" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress"],
        ["compress", "r.yaml"],
        ["compress", "r.yaml", "--out"],
        ["compress", "r.yaml", "--out", "x", "--resume", "--force"],
        ["compress", "r.yaml", "--out", "x", "--fast"],
        ["export", "run"],
        ["predict", "bundle"],
        ["bench", "bundle", "--threads", "0"],
        ["bench", "bundle", "--threads", "many"],
        ["compres"],
        ["--fast"],
    ],
    ids=" ".join,
)
def test_bad_command_line_is_usage(deploykit, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = deploykit(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


# as a process of its own


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from deploykit.cli import main; main()"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("case", ["unknown key", "missing", "alias bomb"])
def test_bad_recipe_ends_a_process_with_its_code(tmp_path, case):
    done = process(*RECIPES[case][0](Place(tmp_path)), cwd=tmp_path)
    assert done.returncode == 2
    assert faults_of(done.returncode, done.stdout, done.stderr) == []


def test_broken_bundle_ends_a_process_with_its_code(tmp_path):
    bundle = make_bundle(tmp_path)
    flip(bundle / "model.onnx")
    done = process("verify", bundle)
    assert done.returncode == 4
    assert faults_of(done.returncode, done.stdout, done.stderr) == []


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from deploykit.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 4000])
def test_full_disk_ends_a_run_with_one_sentence_and_no_broken_file(tmp_path, limit):
    """The recipe alone fits into 4,000 bytes; its splits or a candidate do not."""
    arguments = Place(tmp_path).recipe(CALIBRATED)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written: File too large" in done.stderr
    for file in (tmp_path / "run").rglob("*.json"):
        json.loads(file.read_text())
    assert not list((tmp_path / "run").rglob("*.tmp"))
