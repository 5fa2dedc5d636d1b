"""The README.md of a bundle: what it is, how to run it, what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TEMPLATE = """# {name} {version}

A model for {task} on `{target}`, made by deploykit, with the proof that it works.

## Run

```
pip install "numpy" "onnxruntime>={min_onnxruntime}"{pillow}    # Python 3.10 or newer
python run.py selftest
python run.py predict {example}
python run.py bench
```

`selftest` checks every file against `manifest.json` and the model's answers on the golden
samples against those it gave when the bundle was made; it exits 0 only if all of it holds.
`predict --json` prints one JSON array. `run.py` runs nothing before the files are verified.
The hashes stop accidents, not an attacker who writes new ones: a signature stops those.
{site}
## Interface

{interface}

{preprocess}

## Measured

{measured}

{measured_on}

{verified_on}

## Files

{files}
"""


SITE = """
In a browser: `python -m http.server` in this folder, then http://localhost:8000. The module for
a page of your own is `web/deploykit.js`.
"""


def readme(manifest: Mapping[str, Any], files: Sequence[str]) -> str:
    """Return the README of a bundle.

    Args:
        manifest: all but its files and digest.
        files: what else is in the bundle.
    """
    image = manifest["preprocess"] is not None
    return TEMPLATE.format(
        **{key: _plain(manifest[key]) for key in ("name", "version", "task", "target")},
        min_onnxruntime=manifest["min_onnxruntime"],
        pillow=' "pillow>=9.1"' if image else "",
        site=SITE if "index.html" in files else "",
        example=next(file for file in files if file.startswith("golden/000")),
        interface=_interface(manifest),
        preprocess=_preprocess(manifest["preprocess"]),
        measured=_table(manifest["measured"]) or "Nothing was measured.",
        measured_on=_machine("Latencies were measured on", manifest["measured_on"])
        or "No latency was taken on the target.",
        verified_on=_verified(manifest["verified_on"]),
        files="\n".join(f"- `{file}`" for file in sorted([*files, "README.md", "manifest.json"])),
    )


def _plain(text: str) -> str:
    """Keep a value on its line and out of the markup."""
    return " ".join(str(text).replace("|", "/").replace("`", "'").split())


def _interface(manifest: Mapping[str, Any]) -> str:
    rows = ["| tensor | dtype | shape (-1: any batch) |", "|---|---|---|"]
    for kind in ("inputs", "outputs"):
        rows += [
            f"| {kind[:-1]} `{_plain(spec['name'])}` | {spec['dtype']} | {spec['shape']} |"
            for spec in manifest[kind]
        ]
    labels = ", ".join(_plain(label) for label in manifest["labels"][:20])
    more = f" and {len(manifest['labels']) - 20} more" if len(manifest["labels"]) > 20 else ""
    classes = f"\n\nClasses, in the order of the output: {labels}{more}." if labels else ""
    threads = f"\n\nONNX opset {manifest['opset']}; threads: {manifest['threads']}."
    return "\n".join(rows) + classes + threads


def _preprocess(preprocess: Mapping[str, Any] | None) -> str:
    if preprocess is None:
        return "Arrays are fed as they are; a file is a `.npy` of one sample."
    colour = "grey" if preprocess["channels"] == 1 else "RGB"
    fit = "stretched" if preprocess["fit"] == "stretch" else "its centre cropped and scaled"
    antialias = "with" if preprocess["antialias"] else "without"
    return (
        f"Raw pixels go in; normalization is inside the model. A PNG or JPEG file is turned "
        f"upright (EXIF), laid on white, made {colour}, and {fit} to {preprocess['height']} x "
        f"{preprocess['width']} pixels (height x width; {preprocess['filter']} filter "
        f"{antialias} antialiasing): `preprocess` in `manifest.json`, `decode_image` in `run.py`."
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {_plain(key)} | {_plain(value)} |" for key, value in _leaves(values)]
    return "\n".join(["| what | value |", "|---|---|", *rows]) if rows else ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            told = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield f"{prefix}{key}", "not measured" if value is None else told


def _verified(found: Mapping[str, Any]) -> str:
    machine = {key: value for key, value in found.items() if key != "targets"}
    told = _machine("Numerics were verified on", machine)
    names = ", ".join(f"`{_plain(name)}`" for name in found.get("targets", ()))
    if not names:
        return told
    return (
        f"The model is right for {names}. On another kind of CPU than the one below, `run.py` "
        f"tries the golden samples before it answers.\n\n{told}"
    )


def _machine(sentence: str, values: Mapping[str, Any] | None) -> str:
    if not values:
        return ""
    return f"{sentence}: {', '.join(f'{_plain(k)} {_plain(v)}' for k, v in _leaves(values))}."
