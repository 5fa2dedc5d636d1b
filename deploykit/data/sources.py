"""Sources of one table each: scikit-learn's digits, folders of images, numpy files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploykit.data.arrays import make_table
from deploykit.data.table import Table
from deploykit.errors import DataError

_DIGIT_LEVELS = 16
# Key of the array in a .npy file, which gives it no name.
_ONLY = ""


def read_digits(*, as_images: bool) -> Table:
    """Return scikit-learn's 1,797 scanned digits, which need no download.

    Args:
        as_images: uint8 ``(n, 8, 8, 1)`` with the 16 grey levels spread over 0 to 255;
            else float32 ``(n, 64)``, 0 to 1.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    if as_images:
        x = np.rint(digits.images * (255 / _DIGIT_LEVELS)).astype(np.uint8)[..., np.newaxis]
    else:
        x = (digits.data / _DIGIT_LEVELS).astype(np.float32)
    return make_table("digits", x, digits.target, tuple(str(number) for number in range(10)))


def existing_path(key: str, name: str, base: Path) -> Path:
    """Return the path of a file or folder that the recipe names.

    Raises:
        DataError: there is nothing at that path.
    """
    path = base / name
    if not path.exists():
        raise DataError(f"data.{key}: expected a file or folder, got {name!r}; {path} is missing")
    return path


def require_file(name: str, path: Path) -> None:
    """Check that a path is a regular file, which reading cannot block on.

    Raises:
        DataError: it is a folder, a pipe or a device.
    """
    if not path.is_file():
        raise DataError(f"{name}: expected a regular file, got something else")


def read_imagefolder(name: str, path: Path) -> Table:
    """Return the images of a folder that has one folder for each class, nested at will.

    Hidden files are passed over; every other file must be an image.

    Raises:
        DataError: there is no class folder, one is empty, or holds what is no file.
    """
    if not path.is_dir():
        raise DataError(f"{name}: expected a folder with one folder for each class, got a file")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and _visible(entry, path))
    if not folders:
        raise DataError(f"{name}: expected one folder for each class, got no folder")
    files: list[Path] = []
    labels: list[str] = []
    for folder in folders:
        found = sorted(
            file for file in folder.rglob("*") if _visible(file, path) and not file.is_dir()
        )
        if not found:
            raise DataError(f"{name}/{folder.name}: expected images of the class, got none")
        files += found
        labels += [folder.name] * len(found)
    for file in files:
        require_file(f"{name}/{file.relative_to(path)}", file)
    return Table(
        name,
        tuple(labels),
        content=lambda row: files[row].read_bytes(),
        origin=lambda row: f"{name}/{files[row].relative_to(path)}",
    )


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def read_numpy(name: str, path: Path) -> Table:
    """Return the arrays ``x`` and ``y`` of an .npz file, or of x.npy and y.npy in a folder.

    Raises:
        DataError: an array is missing, damaged, holds objects or does not fit the other.
    """
    if path.is_dir():
        arrays = {
            key: _load_arrays(f"{name}/{key}.npy", path / f"{key}.npy").get(_ONLY)
            for key in ("x", "y")
        }
    else:
        arrays = dict(_load_arrays(name, path))
    for key in ("x", "y"):
        if arrays.get(key) is None:
            raise DataError(
                f"{name}: expected an .npz file with the arrays x and y, or a folder with x.npy "
                f"and y.npy, got no {key}"
            )
    return make_table(name, arrays["x"], arrays["y"])


def _load_arrays(name: str, path: Path) -> dict[str, np.ndarray]:
    """Return x and y of an archive, as far as it has them, or the only array of a .npy file."""
    if not path.exists():
        raise DataError(f"{name}: expected a file, got none; a numpy folder holds x.npy and y.npy")
    require_file(name, path)
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {_ONLY: loaded}
            return {key: loaded[key] for key in ("x", "y") if key in loaded.files}
    except Exception as error:  # numpy and zipfile raise a dozen types on damaged bytes
        if "allow_pickle" in str(error):  # numpy's advice would have the user run a pickle
            raise DataError(
                f"{name}: expected plain numbers or strings, got objects, which only a pickle "
                "could hold; save the array with a number or string dtype"
            ) from error
        raise DataError(
            f"{name}: expected a numpy file, got one that cannot be read ({error})"
        ) from error
