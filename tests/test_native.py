import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_bundle import PREPROCESS, make_bundle, png_bytes

from deploykit import runtime
from deploykit.bundle import load_bundle, verify_bundle
from deploykit.bundle_files import npz_bytes
from deploykit.native import _cpp_string, header, native_files, readme

NAMES = {
    "native/README.md",
    "native/cpp/main.cpp",
    "native/cpp/CMakeLists.txt",
    "native/cpp/bundle.h",
    "native/android/Classifier.kt",
    "native/ios/Classifier.swift",
}


@pytest.fixture
def tiny(tmp_path):
    return make_bundle(tmp_path, companions=[native_files])


def manifest_of(bundle):
    return runtime.read_bundle(bundle)[0]


# what ships


def test_samples_ship_below_one_folder_and_are_hashed(tiny):
    manifest = manifest_of(tiny)
    assert {name for name in manifest["files"] if name.startswith("native")} == NAMES
    assert all(runtime.FILE_NAME.fullmatch(name) for name in NAMES)
    verify_bundle(tiny)
    (tiny / "native/cpp/bundle.h").write_text("#error")
    with pytest.raises(runtime.BrokenBundleError, match=r"native/cpp/bundle\.h"):
        runtime.read_bundle(tiny)


def test_equal_bundles_have_equal_samples(tiny):
    manifest, contents = runtime.read_bundle(tiny)
    assert native_files(manifest, contents) == native_files(manifest, {})
    assert all(native_files(manifest, {})[name] == contents[name] for name in NAMES)


@pytest.mark.parametrize(
    "text", ["star", 'a "quoted" \\ label', "what??!", "é9", "\U0001f600", "a\n\tb", "日本", ""]
)
def test_labels_are_spelled_so_that_cpp_reads_the_same_bytes(text):
    spelled = _cpp_string(text)
    assert spelled.isascii()
    assert spelled.isprintable()
    assert "?" not in spelled  # two of them may begin a trigraph
    assert ast.literal_eval(f"b{spelled}") == text.encode()  # Python's octal is that of C++


def test_header_tells_the_tolerance_to_the_bit(tiny):
    manifest = manifest_of(tiny)
    manifest["tolerance"] |= {"max_abs": 0.1, "scale": 0.3}
    text = header(manifest)
    (allowed,) = re.findall(r"kMaxAbs = (\S+);", text)
    (near,) = re.findall(r"kNear = (\S+);", text)
    assert (float.fromhex(allowed), float.fromhex(near)) == (0.1, 0.3)
    assert "kTop1 = true" in text
    assert "kLabelCount = 3" in text
    manifest["tolerance"]["scale"] = None
    (near,) = re.findall(r"kNear = (\S+);", header(manifest))
    assert float.fromhex(near) == 0.1


def test_readme_tells_how_an_image_becomes_pixels(tiny):
    manifest = manifest_of(tiny)
    text = readme(manifest)
    assert "4 x 4 (height x width) with a bilinear filter, which is widened" in text
    assert "it is stretched" in text
    assert "19595 R" in text
    changed = {**PREPROCESS, "channels": 3, "fit": "cover", "antialias": False}
    text = readme({**manifest, "preprocess": changed})
    assert "RGB, red first" in text
    assert "largest box of the target's shape" in text
    assert "without antialiasing" in text
    assert "The model takes arrays" in readme({**manifest, "preprocess": None})


def test_grey_of_the_samples_is_that_of_the_decoder():
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    decoded = runtime.decode_image(png_bytes(colours), PREPROCESS)[..., 0]
    red, green, blue = colours.astype(int).transpose(2, 0, 1)
    assert np.array_equal((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16, decoded)


# what is compiled


HEADER = "onnxruntime_cxx_api.h"


def include_folder():
    """Find the headers of ONNX Runtime; no wheel brings them."""
    places = [os.environ.get("ONNXRUNTIME_INCLUDE", "")]
    for root in ("/usr/include", "/usr/local/include"):
        places += [f"{root}/onnxruntime", f"{root}/onnxruntime/core/session", root]
    return next((place for place in places if place and (Path(place) / HEADER).exists()), None)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder like an unpacked release: those headers, and the library that the wheel brings."""
    include = include_folder()
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if not include or not library or not shutil.which("g++"):
        pytest.skip(f"needs g++, {HEADER} (ONNXRUNTIME_INCLUDE=FOLDER) and libonnxruntime.so")
    root = tmp_path_factory.mktemp("onnxruntime")
    (root / "lib").mkdir()
    (root / "include").symlink_to(include)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(library)
    return root


@pytest.fixture(scope="module")
def sample(release, tmp_path_factory):
    """The C++ sample of one bundle, compiled; and that bundle."""
    folder = tmp_path_factory.mktemp("native")
    bundle = make_bundle(folder, companions=[native_files])
    program, library = folder / "sample", release / "lib"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-isystem{release / 'include'}"]
    link = [f"-L{library}", "-lonnxruntime", f"-Wl,-rpath,{library}"]
    source = bundle / "native/cpp/main.cpp"
    subprocess.run(["g++", *flags, source, *link, "-o", program], check=True)
    return program, bundle


def run(program, *arguments):
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def golden_of(bundle):
    with np.load(bundle / "golden/expected.npz") as arrays:
        return arrays["inputs"], arrays["outputs"]


@pytest.fixture
def copied(sample, tmp_path):
    """The compiled sample, and a bundle of the same to alter."""
    program, bundle = sample
    return program, Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.mark.slow
def test_cpp_sample_answers_the_golden_samples_and_tells_the_latency(sample):
    done = run(*sample)
    assert (done.returncode, done.stderr) == (0, "")
    proof, one, many = done.stdout.splitlines()
    assert proof.startswith("3 golden samples answer as they did (largest difference 0,")
    assert re.fullmatch(r"batch 1: median \S+ ms, p90 \S+ ms \(1 threads, \d+ runs\)", one)
    assert many.startswith("batch 32: ")


@pytest.mark.slow
def test_cpp_sample_takes_models_of_arrays(sample, tmp_path):
    done = run(sample[0], make_bundle(tmp_path, arrays=True))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_cpp_sample_classifies_as_python_does(sample, tmp_path):
    program, bundle = sample
    pixels = np.random.default_rng(7).integers(0, 256, (4, 4, 1), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    done = run(program, bundle, tmp_path / "x.npy")
    answer = load_bundle(bundle).predict(pixels).top(1)[0][0]
    told = f"{tmp_path / 'x.npy'}: {answer['label']} {answer['probability']:.4f}"
    assert done.stdout.splitlines()[1:] == [told]


@pytest.mark.slow
def test_cpp_sample_sees_other_answers(copied):
    program, bundle = copied
    inputs, outputs = golden_of(bundle)
    outputs[-1, 0] += 2e-4
    (bundle / "golden/expected.npz").write_bytes(npz_bytes(inputs=inputs, outputs=outputs))
    done = run(program, bundle)
    assert (done.returncode, done.stdout) == (4, "")
    assert "outputs differ by 0.0002" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["model.onnx", "golden/expected.npz"])
def test_cpp_sample_refuses_what_is_no_bundle(copied, missing):
    program, bundle = copied
    (bundle / missing).unlink()
    done = run(program, bundle)
    assert done.returncode == 4
    assert f"{missing}: cannot be read" in done.stderr
    (bundle / missing).write_bytes(b"PK\3\4" + b"\xff" * 100)
    assert run(program, bundle).returncode == 4


@pytest.mark.slow
def test_cpp_sample_refuses_compressed_arrays(copied):
    program, bundle = copied
    inputs, outputs = golden_of(bundle)
    np.savez_compressed(bundle / "golden/expected.npz", inputs=inputs, outputs=outputs)
    assert "expected a stored inputs.npy" in run(program, bundle).stderr


@pytest.mark.slow
def test_cpp_sample_survives_every_truncation_of_the_golden_archive(copied):
    program, bundle = copied
    archive = bundle / "golden/expected.npz"
    data = archive.read_bytes()
    stored = len(data) - 22 - 2 * 80  # the directory behind the entries is not read
    for length in range(0, stored, 37):
        archive.write_bytes(data[:length])
        assert run(program, bundle).returncode == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((4, 4, 1), np.float32), "type and shape of a golden input"),
        (np.zeros((4, 4), np.uint8), "type and shape of a golden input"),
        (np.zeros((4, 4, 1), np.complex64), "its type is none that models take"),
        (np.zeros((4, 4, 3), np.uint8, order="F"), "its columns lie one after the other"),
        (np.zeros((0, 4, 1), np.uint8), "its size is not what its header says"),
        (b"", "does not begin as one"),
        (b"\x93NUMPY\1\0\xff\xff{'descr'", "it is cut off"),
        (b"\x93NUMPY\1\0\3\0{}\n", "its header lacks descr"),
    ],
)
def test_cpp_sample_refuses_other_arrays(sample, tmp_path, array, told):
    path = tmp_path / "x.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)
    done = run(*sample, path)
    assert done.returncode == 3
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_cpp_sample_tells_how_it_is_used(sample):
    done = run(sample[0])
    assert done.returncode == 2
    assert "sample BUNDLE" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_cmake_builds_the_sample(release, sample, tmp_path):
    source, build = sample[1] / "native/cpp", tmp_path / "build"
    configure = ["cmake", "-S", source, "-B", build, f"-DONNXRUNTIME_ROOT={release}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    done = run(build / "sample", sample[1])
    assert (done.returncode, done.stderr) == (0, "")
