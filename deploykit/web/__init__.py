"""What a bundle for browsers holds beside the model: a page, its scripts, onnxruntime-web.

A browser runs what it is sent, so the page, the ES module for pages of one's own and the runtime
travel in the bundle, under its manifest. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from deploykit.errors import ExportError
from deploykit.web.vendored import MAX_OPSET, read_record, vendored_files

FOLDER, RUNTIME = "web", "web/onnxruntime"
PAGE = "index.html"
SCRIPTS = (
    *("deploykit.js", "site.js", "golden.js", "images.js", "png.js", "preprocess.js"),
    *("arrays.js", "refusal.js", "page.js", "camera.js"),
)
SHARED = ("page.css", "parts.js", "draw.js", "icon.svg")  # with the page of the server


def site_files(manifest: Mapping[str, Any], contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return what makes a folder with a model a page that serves as it stands.

    Args:
        manifest: of the bundle that is being written; ``opset`` is read.
        contents: its other files, by name.

    Returns:
        The bytes of the further files by name; equal calls give equal bytes.

    Raises:
        ExportError: onnxruntime-web does not implement the model's opset yet.
        BundleError: a file of onnxruntime-web in this installation was altered.
        ValueError: a name is taken.
    """
    if manifest["opset"] > MAX_OPSET:
        version = read_record()["version"]
        raise ExportError(
            f"opset: expected at most {MAX_OPSET}, which onnxruntime-web {version} implements, "
            f"got {manifest['opset']}; export the model with an older one",
            opset=manifest["opset"],
        )
    own, server = files("deploykit.web") / "static", files("deploykit.server") / "static"
    found = {PAGE: (own / PAGE).read_bytes()}
    found |= {f"{FOLDER}/{name}": (own / name).read_bytes() for name in (*SCRIPTS, "style.css")}
    found |= {f"{FOLDER}/{name}": (server / name).read_bytes() for name in SHARED}
    found |= {f"{RUNTIME}/{name}": data for name, data in vendored_files().items()}
    if taken := sorted(set(found) & set(contents)):
        raise ValueError(f"site: expected names that are free, got {', '.join(taken)}")
    return found
