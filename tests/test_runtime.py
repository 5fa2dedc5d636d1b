import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from interrupted import interrupted
from PIL import Image
from tiny_bundle import PREPROCESS, make_bundle, png_bytes

from deploykit import runtime
from deploykit.runtime import (
    ImageError,
    InputError,
    check_preprocess,
    decode_image,
    parse_npy,
    softmax,
    zero_point_and_scale,
)

GREY = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8)
COLOUR = {**PREPROCESS, "channels": 3}


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def sized(**changes):
    return {**PREPROCESS, **changes}


# Pixels.


def test_image_of_the_right_size_keeps_every_pixel():
    assert np.array_equal(decode_image(png_bytes(GREY), PREPROCESS)[..., 0], GREY)
    colour = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    for antialias in (True, False):
        pixels = decode_image(png_bytes(colour), {**COLOUR, "antialias": antialias})
        assert np.array_equal(pixels, colour)


def test_grey_becomes_colour_with_equal_channels():
    pixels = decode_image(png_bytes(GREY), COLOUR)
    assert all(np.array_equal(pixels[..., channel], GREY) for channel in range(3))


def test_colour_becomes_grey_by_luma():
    red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    assert np.all(decode_image(png_bytes(red), PREPROCESS) == 76)


def test_palette_and_bilevel_images_are_expanded():
    image = Image.fromarray(GREY)
    assert np.array_equal(decode_image(encode(image.convert("P")), PREPROCESS)[..., 0], GREY)
    assert set(np.unique(decode_image(encode(image.convert("1")), PREPROCESS))) <= {0, 255}


def test_16_bit_grey_keeps_its_high_byte():
    deep = np.random.default_rng(2).integers(0, 65536, (4, 4), dtype=np.uint16)
    pixels = decode_image(encode(Image.fromarray(deep)), PREPROCESS)
    assert np.array_equal(pixels[..., 0], deep >> 8)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new(mode, (4, 4), 0)
    assert np.all(decode_image(encode(clear), COLOUR) == 255)


def test_transparent_palette_and_grey_values_are_laid_on_white():
    palette = Image.fromarray(GREY).convert("P")
    assert np.all(decode_image(encode(palette, transparency=bytes(256)), PREPROCESS) == 255)
    for image in (Image.new("L", (4, 4), 7), Image.fromarray(np.full((4, 4), 7, np.uint16))):
        assert np.all(decode_image(encode(image, transparency=7), PREPROCESS) == 255)
        assert np.all(decode_image(encode(image, transparency=8), PREPROCESS) < 8)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).T),
        (8, np.rot90),
        (99, lambda a: a),
    ],
)
def test_exif_orientation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(GREY), exif=exif)
    assert np.array_equal(decode_image(data, PREPROCESS)[..., 0], turn(GREY))


def test_cover_keeps_the_centre_and_stretch_keeps_all():
    stripes = np.repeat(np.array([0, 100, 100, 0], np.uint8), 4)[np.newaxis].repeat(8, axis=0)
    covered = decode_image(png_bytes(stripes), sized(fit="cover", filter="nearest"))
    stretched = decode_image(png_bytes(stripes), sized(filter="nearest"))
    assert np.all(covered == 100)
    assert stretched[0, :, 0].tolist() == [0, 100, 100, 0]


def test_cover_of_an_extreme_shape_takes_no_memory():
    line = png_bytes(np.full((1, 60_000), 9, np.uint8))
    pixels = decode_image(line, sized(fit="cover", height=512, width=512))
    assert pixels.shape == (512, 512, 1)
    assert np.all(pixels == 9)


@pytest.mark.parametrize("filter_name", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("fit", ["stretch", "cover"])
def test_resizing_a_flat_image_keeps_it_flat(filter_name, fit):
    flat = png_bytes(np.full((9, 13), 120, np.uint8))
    for antialias in (True, False) if filter_name != "lanczos" else (True,):
        spec = sized(filter=filter_name, fit=fit, antialias=antialias)
        assert np.all(decode_image(flat, spec) == 120)


def test_antialias_averages_and_its_absence_samples():
    fine = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (16, 16))
    smooth = decode_image(png_bytes(fine), PREPROCESS).astype(int)
    rough = decode_image(png_bytes(fine), sized(antialias=False, filter="nearest")).astype(int)
    assert np.all(np.abs(smooth - 128) <= 1)
    assert set(np.unique(rough)) <= {0, 255}


# Damaged images.


def jpeg_bytes():
    return encode(Image.fromarray(np.tile(GREY, (8, 8))), "JPEG")


@pytest.mark.parametrize(
    "data", [png_bytes(np.tile(GREY, (4, 4))), jpeg_bytes()], ids=["png", "jpeg"]
)
def test_damaged_images_are_image_errors_or_images(data):
    generator = np.random.default_rng(3)
    damaged = [data[:length] for length in range(len(data))]
    for _ in range(500):
        broken = bytearray(data)
        broken[generator.integers(len(data))] ^= 1 << generator.integers(8)
        damaged.append(bytes(broken))
    refused = 0
    for candidate in damaged:
        try:
            assert decode_image(candidate, PREPROCESS).shape == (4, 4, 1)
        except ImageError:
            refused += 1
    assert refused > len(data) / 2


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"])
def test_other_formats_are_refused(format):
    with pytest.raises(ImageError, match="PNG or JPEG"):
        decode_image(encode(Image.fromarray(np.tile(GREY, (8, 8))), format), PREPROCESS)


@pytest.mark.parametrize("data", [b"", b"x", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\0" * 100])
def test_no_image_is_an_image_error(data):
    with pytest.raises(ImageError):
        decode_image(data, PREPROCESS)


def bomb(side):
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)

    return (
        png_bytes(GREY)[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    )


@pytest.mark.parametrize("side", [6000, 20_000, 2**31 - 1])
def test_large_images_are_refused_before_they_are_decoded(side):
    with pytest.raises(ImageError, match=r"at most|damaged"):
        decode_image(bomb(side) + png_bytes(GREY)[33:], PREPROCESS)


def test_pixel_cap_is_the_callers():
    with pytest.raises(ImageError, match=r"at most 15 pixels, got 4 x 4"):
        decode_image(png_bytes(GREY), PREPROCESS, max_pixels=15)


# Specification.


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0},
        {"height": 4.0},
        {"channels": 2},
        {"channels": True},
        {"filter": "box"},
        {"antialias": 1},
        {"fit": "pad"},
        {"exif": False},
        {"alpha": "black"},
        {"mean": [0.5, 0.5]},
        {"mean": [1.5]},
        {"mean": ["a"]},
        {"std": [0]},
        {"std": [float("nan")]},
        {"colour": "bgr"},
        {"filter": "lanczos", "antialias": False},
    ],
)
def test_specification_that_would_not_be_followed_is_refused(change):
    check_preprocess(PREPROCESS)
    with pytest.raises(ValueError, match=r"preprocess|could not convert"):
        check_preprocess({**PREPROCESS, **change})


def test_zero_point_is_a_pixel_and_scale_single_precision():
    zero_point, scale = zero_point_and_scale(
        sized(channels=3, mean=[0.485, 0.456, 0.406], std=[0.25])
    )
    assert zero_point.tolist() == [124, 116, 104]
    assert zero_point.dtype == np.int32
    assert scale.dtype == np.float32
    assert np.allclose(scale * 255 * 0.25, 1)
    assert scale.shape == zero_point.shape == (3,)


# Arrays.


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.float32(3), np.zeros((0, 2))])
def test_npy_round_trip(array):
    for order in "CF":
        file = io.BytesIO()
        np.save(file, np.asarray(array, order=order), allow_pickle=False)
        found = parse_npy(file.getvalue())
        assert np.array_equal(found, array)
        assert found.dtype == np.asarray(array).dtype


def npy_with(header):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + bytes(100),
        npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"),
        npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}") + bytes(4),
        npy_with("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + bytes(8),
        npy_with("{'descr': '<f4', 'fortran_order': False}"),
        npy_with("[" * 100),
        npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}") + bytes(5),
    ],
)
def test_damaged_npy_is_an_input_error(data):
    with pytest.raises(InputError, match="npy"):
        parse_npy(data)


def test_softmax_neither_overflows_nor_loses_its_sum():
    probabilities = softmax(np.array([[1e4, 0, -1e4], [1e-4, 0, 0]], np.float32))
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    assert probabilities[0, 0] == 1


# The shipped runner.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def tiny_arrays(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("array"), arrays=True)


def test_runner_is_this_module_byte_for_byte(tiny):
    assert (tiny / "run.py").read_bytes() == Path(runtime.__file__).read_bytes()


def test_selftest_passes(tiny, tiny_arrays, capsys):
    assert runtime.main(["selftest"], tiny) == 0
    assert runtime.main(["selftest"], tiny_arrays) == 0
    assert "3 golden samples answer as they did" in capsys.readouterr().out


def test_predict_prints_file_label_probability_and_others(tiny, capsys):
    file = str(tiny / "golden/000.png")
    assert runtime.main(["predict", file], tiny) == 0
    assert capsys.readouterr().out == f"{file}: star 0.7931 (circle 0.1394, square 0.0675)\n"


def test_predict_json_is_one_array(tiny, tiny_arrays, capsys):
    files = [str(tiny / f"golden/00{i}.png") for i in range(3)]
    assert runtime.main(["predict", "--json", *files], tiny) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["file"] for answer in answers] == files
    assert all(set(answer) == {"file", "label", "probability", "top"} for answer in answers)
    assert all(abs(sum(one["probability"] for one in a["top"]) - 1) < 1e-9 for a in answers)
    assert (
        runtime.main(["predict", "--json", str(tiny_arrays / "golden/000.npy")], tiny_arrays) == 0
    )
    assert json.loads(capsys.readouterr().out)[0]["label"] in {"0", "1"}


def test_bench_tells_threads_and_both_batch_sizes(tiny, capsys):
    runtime.bench(tiny, threads=2, as_json=False, seconds=0.01)
    out = capsys.readouterr().out
    assert "batch 1:" in out
    assert "batch 32:" in out
    assert "2 threads" in out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["predict"], ["bench", "--threads", "0"]])
def test_bad_usage_exits_2(tiny, arguments):
    with pytest.raises(SystemExit) as caught:
        runtime.main(arguments, tiny)
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["absent.png", "text.png", "", "folder"])
def test_unusable_input_exits_3_and_names_the_file(tiny, tmp_path, capsys, name):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / name)
    assert runtime.main(["predict", str(tiny / "golden/000.png"), path], tiny) == 3
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {path}: ")
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_array_of_another_shape_or_dtype_exits_3(tiny_arrays, tmp_path, capsys):
    for array in (np.zeros(4, np.float32), np.zeros(3, complex), np.array(["a", "b", "c"])):
        np.save(tmp_path / "x.npy", array)
        assert runtime.main(["predict", str(tmp_path / "x.npy")], tiny_arrays) == 3
        assert "expected float32 of shape (3,)" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_array_that_holds_no_number_exits_3_and_names_the_file(
    tiny_arrays, tmp_path, capsys, value
):
    path = tmp_path / "x.npy"
    np.save(path, np.array([0, value, 0]))
    assert runtime.main(["predict", str(path)], tiny_arrays) == 3
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {path}: expected finite numbers, got NaN or infinity")
    assert (told.err.count("\n"), told.out) == (1, "")


@pytest.mark.parametrize("threads", ["0", "1025", "-1", "1.5", "many"])
def test_threads_out_of_range_are_refused_in_a_few_words(tiny, capsys, threads):
    with pytest.raises(SystemExit):
        runtime.main(["bench", f"--threads={threads}"], tiny)
    *_, told = capsys.readouterr().err.splitlines()
    assert told.endswith(f"argument --threads: expected 1 to 1024, got '{threads}'")


def test_interrupt_exits_130(tiny, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "selftest", interrupt)
    assert runtime.main(["selftest"], tiny) == 130


def test_too_old_onnxruntime_exits_5_with_the_remedy(tiny, monkeypatch, capsys):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    assert runtime.main(["selftest"], tiny) == 5
    assert "pip install 'onnxruntime>=1.17.0'" in capsys.readouterr().err


def test_too_old_pillow_exits_5_and_calls_no_image_damaged(tiny, monkeypatch, capsys):
    monkeypatch.delattr("PIL.Image.Transpose")
    assert runtime.main(["selftest"], tiny) == 5
    assert "image files need pillow 9.1 or newer" in capsys.readouterr().err


def test_too_old_python_is_told_in_one_sentence(tiny):
    code = (
        "import sys, runpy; sys.version_info = (3, 9, 18); sys.argv = ['run.py', 'selftest']; "
        f"runpy.run_path({str(tiny / 'run.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr == (
        "error: expected Python 3.10 or newer; name another: python3.12 run.py\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_told_in_one_sentence(tiny):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, str(tiny / "run.py"), "selftest", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the output: No space left on device\n"


def test_interrupt_amid_the_imports_ends_quietly(tiny, tmp_path):
    (tmp_path / "numpy.py").write_text(
        "import time; print('importing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, tiny / "run.py", "selftest"]
    assert interrupted(command, PYTHONPATH=str(tmp_path)) == (-signal.SIGINT, b"")


def test_absent_provider_is_named():
    with pytest.raises(runtime.PackageError, match="NoSuchProvider"):
        runtime.open_session(b"", providers=["NoSuchProvider"])


def test_file_name_that_is_not_utf8_is_printed(tiny, tmp_path):
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    shutil.copy(tiny / "golden/000.png", name)
    command = [sys.executable, str(tiny / "run.py"), "predict", name, "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)[0]["file"] == str(name)


@pytest.mark.parametrize("error", ["ModuleNotFoundError('none')", "ImportError('no GLIBC_2.28')"])
@pytest.mark.parametrize("package", ["numpy", "onnxruntime", "PIL"])
def test_missing_package_exits_5_in_one_sentence(tiny, tmp_path, package, error):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {error}")
    command = [sys.executable, str(tiny / "run.py"), "predict", str(tiny / "golden/000.png")]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert "pip install" in done.stderr
    assert done.stderr.count("\n") == 1


def test_runtime_loads_neither_torch_nor_deploykit_nor_onnxruntime(tiny):
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]); "
        "sys.exit(bool({'torch', 'deploykit', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tiny / "run.py")]
    assert subprocess.run(command, check=False).returncode == 0


# Another kind of CPU


def on_cpu(monkeypatch, name):
    monkeypatch.setattr(runtime, "detect_cpu", lambda: name)


def portable(folder, *names, **changes):
    """A bundle that names these targets, verified on this machine."""
    return make_bundle(folder, verified_on={"targets": list(names)}, **changes)


OTHER = "cpu-arm64" if runtime.detect_cpu() != "cpu-arm64" else "cpu-x86-vnni"


def answering_otherwise(monkeypatch):
    true_run = runtime.run_model
    monkeypatch.setattr(runtime, "run_model", lambda *given: true_run(*given) + 1.0)


def test_nothing_is_run_where_the_bundle_was_verified(tiny, monkeypatch):
    manifest, contents = runtime.read_bundle(tiny)
    assert manifest["verified_on"]["cpu_target"] == runtime.detect_cpu()
    monkeypatch.setattr(runtime, "check_golden", None)
    runtime.open_bundle(manifest, contents, 1)


def test_a_named_cpu_that_answers_the_same_is_silent(tmp_path, monkeypatch, capsys):
    bundle = portable(tmp_path, OTHER)
    capsys.readouterr()
    on_cpu(monkeypatch, OTHER)
    assert runtime.main(["predict", str(bundle / "golden/000.png")], bundle) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["selftest", "predict", "bench"])
def test_another_cpu_that_answers_the_same_is_told_in_one_line(
    tmp_path, monkeypatch, capsys, command
):
    bundle = portable(tmp_path, "cpu-x86-avx2")
    monkeypatch.setattr(runtime, "_time", lambda *_: dict.fromkeys(TIMED, 1.0))
    capsys.readouterr()
    on_cpu(monkeypatch, OTHER)
    files = [str(bundle / "golden/000.png")] if command == "predict" else []
    assert runtime.main([command, *files], bundle) == 0
    told = capsys.readouterr().err
    assert told == (
        f"warning: tiny: made for cpu-x86-avx2, and this CPU is {OTHER}; "
        "the golden samples hold here\n"
    )


TIMED = ("median_ms", "p90_ms", "samples_per_second", "runs")


@pytest.mark.parametrize("named", [True, False])
def test_another_cpu_that_answers_otherwise_is_refused(tmp_path, monkeypatch, capsys, named):
    bundle = portable(tmp_path, "cpu-x86-avx2", *([OTHER] if named else []))
    capsys.readouterr()
    on_cpu(monkeypatch, OTHER)
    answering_otherwise(monkeypatch)
    for arguments in (["predict", str(bundle / "golden/000.png")], ["selftest"], ["bench"]):
        assert runtime.main(arguments, bundle) == 4
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"made for cpu-x86-avx2, and this CPU is {OTHER}, which answers otherwise" in told
        assert f"export it with --target {OTHER}" in told


def test_a_bundle_that_names_no_cpus_is_right_for_its_target_alone(tmp_path, monkeypatch, capsys):
    bundle = make_bundle(tmp_path, verified_on={"cpu_target": "elsewhere"}, target=OTHER)
    capsys.readouterr()
    manifest, contents = runtime.read_bundle(bundle)
    for name, warned in ((OTHER, False), ("cpu-x86-avx2", True)):
        on_cpu(monkeypatch, name)
        runtime.open_bundle(manifest, contents, 1)
        assert bool(capsys.readouterr().err) is warned
