"""Sample code that ships with a bundle: C++ to compile, Kotlin and Swift to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

FOLDER = "native"
# What ships as it stands, by its place in the bundle.
SAMPLES = {
    "cpp/main.cpp": "main.cpp",
    "cpp/CMakeLists.txt": "CMakeLists.txt",
    "android/Classifier.kt": "Classifier.kt",
    "ios/Classifier.swift": "Classifier.swift",
}


def native_files(manifest: Mapping[str, Any], contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the sample code of a bundle.

    The samples are the same in every bundle; what differs is in ``bundle.h`` and the README.

    Args:
        manifest: of the bundle, its files and digest aside.
        contents: the bundle's other files, of which none is read.

    Returns:
        The files by their names in the bundle, all below ``native/``.
    """
    made = {name: _resource(source) for name, source in SAMPLES.items()}
    made["cpp/bundle.h"] = header(manifest)
    made["README.md"] = readme(manifest)
    return {f"{FOLDER}/{name}": text.encode() for name, text in made.items()}


def header(manifest: Mapping[str, Any]) -> str:
    """Write what the C++ sample knows of its bundle: threads, tolerance, class names."""
    tolerance = manifest["tolerance"]
    near = tolerance.get("scale") or tolerance["max_abs"]
    labels = "".join(f"    {_cpp_string(label)},\n" for label in manifest["labels"])
    return _resource("bundle.h.in").format(
        threads=manifest["threads"],
        max_abs=float(tolerance["max_abs"]).hex(),
        near=float(near).hex(),
        top1="true" if tolerance.get("top1") else "false",
        labels=labels,
        count=len(manifest["labels"]),
    )


def readme(manifest: Mapping[str, Any]) -> str:
    """Say how the samples are built, and how an image becomes the model's pixels."""
    spec, output = manifest["inputs"][0], manifest["outputs"][0]
    return _resource("README.md.in").format(
        min_onnxruntime=manifest["min_onnxruntime"],
        input=f"`{_plain(spec['name'])}`: {spec['dtype']} {_shape(spec['shape'])}",
        output=f"`{_plain(output['name'])}`: {output['dtype']} {_shape(output['shape'])}",
        preprocess=_preprocess(manifest["preprocess"]),
    )


def _resource(name: str) -> str:
    return files("deploykit.native").joinpath(name).read_text(encoding="utf-8")


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join('N' if size == -1 else str(size) for size in shape)})"


def _plain(text: str) -> str:
    """Keep a name on its line and out of the markup."""
    return " ".join(text.replace("`", "'").split())


def _cpp_string(text: str) -> str:
    """Spell text as a C++ literal: bytes beyond plain ASCII as three octal digits each."""
    spelled = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}"
        for byte in text.encode("utf-8", "surrogatepass")
    )
    return f'"{spelled}"'


NO_IMAGE = "The model takes arrays, not images: feed what the training data held, batch first."
STEPS = """An image becomes pixels in this order; `decode_image` in `run.py` is the definition, and
the inputs in `golden/expected.npz` are what it makes of the files in `golden/`:

1. Decode the PNG or JPEG file; turn it upright by its EXIF orientation. Of 16-bit grey keep the
   high byte.
2. Lay what is transparent on white.
3. Make it {colour}.
4. {fit}
5. Resize it to {height} x {width} (height x width) with a {filter} filter, {antialias}.
6. Lay the rows out one after the other, {layout}. No normalization: that is inside the model.

A decoder or a resize that differs by one grey level gives other logits, so compare with the golden
inputs. Where the source has the target's size already, steps 4 and 5 change nothing."""


def _preprocess(preprocess: Mapping[str, Any] | None) -> str:
    if preprocess is None:
        return NO_IMAGE
    grey = preprocess["channels"] == 1
    cover = preprocess["fit"] == "cover"
    return STEPS.format(
        colour="grey: (19595 R + 38470 G + 7471 B + 32768) >> 16" if grey else "RGB, red first",
        fit="Cut the largest box of the target's shape out of its centre."
        if cover
        else "Take all of it: it is stretched.",
        height=preprocess["height"],
        width=preprocess["width"],
        filter=preprocess["filter"],
        antialias="which is widened by the scale when it shrinks, as Pillow's `resize` does"
        if preprocess["antialias"]
        else "sampled at the pixels' centres, without antialiasing",
        layout="one byte a pixel" if grey else "three bytes a pixel",
    )
