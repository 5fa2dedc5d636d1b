"""Small files of images for the tests of data."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from deploykit.data import load_dataset
from deploykit.recipe.sections import DataSection

IMAGES = "image-classification"
ARRAYS = "classification"


def pixels(count, height=6, width=6, channels=3, seed=0):
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(picture, kind="PNG", **options):
    out = io.BytesIO()
    array = picture[..., 0] if picture.shape[-1] == 1 else picture
    Image.fromarray(array).save(out, format=kind, **options)
    return out.getvalue()


def labels_of(count, classes=2):
    return np.arange(count) % classes


def image_column(images, paths=None):
    paths = [None] * len(images) if paths is None else paths
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        None if image is None and path is None else {"bytes": image, "path": path}
        for image, path in zip(images, paths, strict=True)
    ]
    return pa.array(rows, kind)


def write_parquet(path, images=None, labels=None, metadata=None, **columns):
    images = [png(picture) for picture in pixels(20)] if images is None else images
    labels = labels_of(len(images)) if labels is None else labels
    images = image_column(images) if isinstance(images, list) else images
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def write_folder(path, names=("cat", "dog"), each=8, seed=0):
    for number, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for row, picture in enumerate(pixels(each, seed=seed + number)):
            (path / name / f"{row}.png").write_bytes(png(picture))
    return path


def load(base, source, task=IMAGES, seed=0, **settings):
    section = DataSection(source=source, **settings)
    return load_dataset(section, task=task, seed=seed, base=base)


def everything(split):
    return split.load(np.arange(len(split)))
