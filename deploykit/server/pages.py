"""The pages for people: a fixed table of files, so that no path of a client reaches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGES = {"/": "index.html", "/docs": "docs.html"}
PARTS = (
    *("page.css", "icon.svg", "parts.js", "draw.js"),  # with the page of a web bundle
    *("index.js", "docs.js", "schema.js", "server.js"),
)


def page(path: str) -> tuple[bytes, str] | None:
    """Return the content and the content type of a page or a part of it; None: there is none.

    Args:
        path: of the request, such as ``/`` or ``/static/page.css``.
    """
    return _contents().get(path)


@cache
def _contents() -> Mapping[str, tuple[bytes, str]]:
    """Read every file once."""
    folder = files("deploykit.server") / "static"
    names = PAGES | {f"/static/{name}": name for name in PARTS}
    return {
        path: ((folder / name).read_bytes(), TYPES["." + name.rpartition(".")[2]])
        for path, name in names.items()
    }
