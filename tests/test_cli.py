"""The commands: what they offer, what they print, how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from interrupted import interrupted
from tiny_bundle import make_bundle
from tiny_run import CALIBRATED, snapshot

import deploykit as package
from deploykit import cli
from deploykit.recipe.schema import keys

PROGRAM = [sys.executable, "-c", "from deploykit.cli import main; main()"]
COMMANDS = {
    "compress": {"--out", "--set", "--resume", "--force", "--check", "--latency-table"},
    "export": {
        *("--target", "--version", "--out", "--force", "--format", "--native", "--mobile"),
        *("--data", "--quantize", "--max-drop", "--layout", "--name"),
    },
    "sign": {"--key", "--force"},
    "verify": {"--key"},
    "predict": {"--json"},
    "bench": {"--json"},
    "inspect": set(),
    "report": {"--devices", "--out", "--force"},
    "serve": {
        *("--host", "--port", "--workers", "--threads", "--require-gpu"),
        *("--max-batch", "--batch-window-us", "--queue", "--timeout", "--max-body"),
        *("--max-pixels", "--token-file", "--cors-origin", "--access-log", "--no-access-log"),
        *("--tracing", "--grace", "--drain", "--tls-cert", "--tls-key"),
    },
    "doctor": set(),
}
ARGUMENTS = {
    "compress": "RECIPE",
    "export": "RUN|MODEL.onnx",
    "sign": "BUNDLE",
    "verify": "BUNDLE",
    "predict": "FILE...",
    "bench": "BUNDLE",
    "inspect": "RUN|BUNDLE",
    "report": "FILE...",
    "serve": "BUNDLE...",
}


# help


def test_help_names_every_command(deploykit):
    done = deploykit("--help")
    assert done.code == 0
    assert re.findall(r"^  ([a-z]+) ", done.out.partition("Commands:")[2], re.M) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_the_options_of_the_contract(deploykit, command):
    done = deploykit(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert COMMANDS[command] <= set(re.findall(r"--[a-z-]+", done.out))
    assert ARGUMENTS.get(command, "") in done.out


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 300])
def test_a_name_that_no_report_could_show_is_refused(deploykit, tmp_path, name):
    done = deploykit("bench", tmp_path, "--device", name)
    assert (done.code, "--device: expected 1 to" in done.err) == (2, True)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_fits_a_terminal(deploykit, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for flag in ("--help", "-h"):
        lines = deploykit(*command, flag).out.splitlines()
        assert [line for line in lines if len(line) > 80] == []


def test_help_of_compress_lists_every_key_of_a_recipe(deploykit):
    text = deploykit("compress", "--help").out
    paths = [key.path for key in keys() if not key.is_section]
    assert len(paths) > 60
    assert [path for path in paths if f"  {path}: " not in text] == []
    assert "train.epochs: integer >= 0; default 10" in text


def loaded_by(*arguments):
    """Return the modules that a command has loaded when it ends."""
    code = (
        "import sys\nfrom deploykit.cli import main\n"
        "try:\n    main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stderr.split()}


HEAVY = {
    *("torch", "onnxruntime", "numpy", "onnx", "sklearn", "lightning_fabric"),
    *("bentoml", "uvicorn", "prometheus_client"),
}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["export", "--help"], ["serve", "--help"]]
)
def test_help_loads_nothing_heavy(arguments):
    assert loaded_by(*arguments) & HEAVY == set()


def test_help_of_compress_loads_no_torch_and_heavy_loads_would_be_seen():
    loaded = loaded_by("compress", "--help")
    assert "pydantic" in loaded
    assert loaded & HEAVY == set()


def test_predict_loads_no_torch(tmp_path):
    bundle = make_bundle(tmp_path)
    loaded = loaded_by("predict", str(bundle), str(bundle / "golden/000.png"))
    assert "onnxruntime" in loaded
    assert "torch" not in loaded


def test_version_is_the_packages(deploykit):
    done = deploykit("--version")
    assert (done.code, done.out) == (0, f"deploykit {package.__version__}\n")


# ends


def test_debug_shows_the_traceback_and_keeps_the_exit_code(deploykit, tmp_path):
    plain = deploykit("compress", tmp_path / "no.yaml", "--out", tmp_path / "run")
    shown = deploykit("--debug", "compress", tmp_path / "no.yaml", "--out", tmp_path / "run")
    assert (plain.code, shown.code) == (2, 2)
    assert "Traceback" not in plain.err
    assert "Traceback" in shown.err
    assert shown.err.endswith(plain.err)


def test_error_that_nobody_thought_of_is_one_sentence(deploykit, tmp_path, monkeypatch):
    def fail(_folder):
        raise KeyError("x")

    monkeypatch.setattr("deploykit.inspection.inspect_folder", fail)
    done = deploykit("inspect", tmp_path)
    assert (done.code, done.err) == (1, "error: unexpected KeyError: 'x'; see --debug\n")


def test_ctrl_c_outside_of_a_training_is_130(deploykit, tmp_path, monkeypatch):
    def fail(_folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("deploykit.inspection.inspect_folder", fail)
    done = deploykit("inspect", tmp_path)
    assert (done.code, done.err) == (130, "error: stopped by SIGINT\n")


def test_reader_that_goes_away_ends_a_command_quietly():
    read, write = os.pipe()
    os.close(read)
    command = subprocess.Popen([*PROGRAM, "doctor"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, err = command.communicate(timeout=60)
    assert err == b""
    assert command.returncode == 1


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_told_in_one_sentence(bundle, buffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    with Path("/dev/full").open("w") as full:
        command = [*PROGRAM, "predict", bundle, bundle / "golden/000.png"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True
        )
    assert done.stderr == "error: the output: no space is left; send it elsewhere\n"
    assert done.returncode == 2


def test_interrupt_amid_the_imports_ends_quietly(tmp_path):
    (tmp_path / "typer.py").write_text(
        "import time; print('importing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-m", "deploykit", "doctor"]
    assert interrupted(command, PYTHONPATH=str(tmp_path)) == (-signal.SIGINT, b"")


def test_sigterm_leaves_nothing_behind(tmp_path):
    """As Ctrl-C: temporary folders go."""
    program = (
        "import tempfile, time; from deploykit import cli, inspection\n"
        "def wait(_):\n"
        "    with tempfile.TemporaryDirectory():\n"
        "        print('waiting', flush=True)\n"
        "        time.sleep(60)\n"
        "inspection.inspect_folder = wait\n"
        "cli.main()"
    )
    (tmp_path / "temporary").mkdir()
    command = subprocess.Popen(
        [sys.executable, "-c", program, "inspect", tmp_path],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert command.stdout.readline() == b"waiting\n"
    command.terminate()
    assert command.communicate(timeout=20)[1] == b"error: stopped by SIGTERM\n"
    assert command.returncode == 143
    assert list((tmp_path / "temporary").iterdir()) == []


# --check


def test_check_says_what_a_run_does_and_how_long_it_takes_and_writes_nothing(
    deploykit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        CALIBRATED
        + "train: {epochs: 3}\nprune: {channel_ratio: 0.25}\n"
        + "budget: {max_drop: 0.1}\n"
    )
    before = snapshot(tmp_path)
    done = deploykit("compress", recipe, "--out", tmp_path / "run", "--check")
    assert (done.code, done.err) == (0, "")
    assert snapshot(tmp_path) == before
    for words in (
        "data: digits: train 218, validation 41, test 41 samples of 10 classes",
        "model: mlp, 1,210 parameters",
        "target: cpu-",
        "train: 3 epochs",
        "prune: 25% of the channels in 1 step(s), 3 epochs of recovery each",
        "quantize: ptq",
        "budget: up to 3 trials until it holds; the time below is of one",
        "the recipe is sound; nothing was written",
    ):
        assert words in done.out
    assert re.search(r"it will take about \d+ (seconds|minutes) on this machine", done.out)


def test_check_needs_no_place_to_write(deploykit, tmp_path):
    (tmp_path / "recipe.yaml").write_text(CALIBRATED)
    assert deploykit("compress", tmp_path / "recipe.yaml", "--check").code == 0


def test_check_times_no_training_that_nobody_asked_for(deploykit, tmp_path):
    """As of a model in which nothing can learn."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(False)\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(CALIBRATED.replace("mlp, arguments: {hidden: [16]}", "'net.py:net'"))
    done = deploykit("compress", recipe, "--check")
    assert (done.code, done.err) == (0, "")
    done = deploykit("compress", recipe, "--check", "--set", "train={epochs: 1}")
    assert done.code == 3


def test_check_finds_what_the_run_would_meet(deploykit, tmp_path):
    (tmp_path / "recipe.yaml").write_text(CALIBRATED)
    for override, code, words in (
        ("target=abacus", 2, "abacus"),
        ("model.weights=w.pt", 3, "w.pt"),
        ("prune.protect=[none]", 3, "prune.protect"),
    ):
        done = deploykit("compress", tmp_path / "recipe.yaml", "--check", "--set", override)
        assert (done.code, done.out) == (code, "")
        assert words in done.err


# commands on a bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_verify_says_what_was_verified(deploykit, bundle):
    done = deploykit("verify", bundle)
    assert (done.code, done.err) == (0, "")
    assert "tiny 1.0 for cpu-x86-avx2: verified" in done.out
    assert "no signature" in done.out


def test_predict_answers_one_line_a_file(deploykit, bundle):
    files = [bundle / "golden/000.png", bundle / "golden/001.png"]
    done = deploykit("predict", bundle, *files)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(file) for file in files]
    answers = json.loads(deploykit("predict", bundle, *files, "--json").out)
    assert [answer["file"] for answer in answers] == [str(file) for file in files]
    assert {"circle", "square", "star"} & set(done.out.replace(",", " ").split())


def test_names_of_any_bytes_are_told(bundle, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(bundle / "golden/000.png", name)
    done = subprocess.run([*PROGRAM, "predict", bundle, name], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf\\udce9.png: " in done.stdout


def test_answers_are_json_whatever_the_terminal_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_bundle.LABELS", ("café", "\U0001f600", "c"))
    folder = make_bundle(tmp_path)
    done = subprocess.run(
        [sys.executable, folder / "run.py", "predict", folder / "golden/000.png", "--json"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    (answer,) = json.loads(done.stdout)
    assert {one["label"] for one in answer["top"]} == {"café", "\U0001f600", "c"}


def test_command_of_any_bytes_can_be_reported(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deploykit", "compress", os.fsdecode(b"caf\xe9")])
    assert cli._command().encode() == rb"deploykit compress 'caf\udce9'"


def test_predict_takes_arrays(deploykit, tmp_path):
    bundle = make_bundle(tmp_path, arrays=True)
    np.save(tmp_path / "one.npy", np.ones(3, np.float32))
    assert deploykit("predict", bundle, tmp_path / "one.npy").code == 0


def test_bench_tells_a_latency_for_each_batch(deploykit, bundle, monkeypatch):
    monkeypatch.setattr("deploykit.runtime.bench.__defaults__", (0.05,))
    done = deploykit("bench", bundle, "--json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out)["latency"]
    assert len(rows) >= 2
    done = deploykit("bench", bundle, "--threads", "2")
    assert "batch" in done.out


def test_inspect_shows_a_bundle(deploykit, bundle):
    done = deploykit("inspect", bundle)
    assert (done.code, done.err) == (0, "")
    for words in ("bundle: tiny 1.0", "input: image uint8 [-1, 4, 4, 1]", "circle, square, star"):
        assert words in done.out
    assert "latency at batch 4: not measured on the target" in done.out


@pytest.mark.slow
def test_inspect_shows_a_run(deploykit, tiny_run):
    done = deploykit("inspect", tiny_run.path)
    assert (done.code, done.err) == (0, "")
    for words in (
        "run: tiny, seed 0, target cpu",
        "finished; stages: train, prune, quantize",
        "on the test split",
        "latency at batch 32",
        "prune: kept: against train",
        "budget: holds",
    ):
        assert words in done.out


@pytest.mark.slow
def test_inspect_shows_how_far_an_unfinished_run_is(deploykit, tiny_run, tmp_path):
    copy = tiny_run.copy(tmp_path / "run")
    (copy / "report.json").unlink()
    (copy / "onnx/quantize.onnx").unlink()
    done = deploykit("inspect", copy)
    assert done.code == 0
    assert "unfinished; stages done: train, prune; --resume continues it" in done.out


def test_doctor_tells_of_this_machine(deploykit):
    done = deploykit("doctor")
    assert (done.code, done.err) == (0, "")
    for row in ("cpu ", "cores ", "target ", "providers ", "onnxruntime "):
        assert re.search(f"^{row}", done.out, re.M)
    assert json.loads(deploykit("doctor", "--json").out)["target"] in done.out
