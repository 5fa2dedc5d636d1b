"""A file from elsewhere, taken in: examined, tidied, with the samples that judge it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from deploykit.artifacts import OnnxModel, Signature, TensorSpec
from deploykit.data import Dataset
from deploykit.errors import ExportError, first_line
from deploykit.foreign.border import Border, layout_of, opset_of, tidy, without_softmax
from deploykit.foreign.limits import examine
from deploykit.foreign.pixels import AS_THEY_ARE, Normalization, take_pixels, turned
from deploykit.foreign.samples import (
    ARRAYS,
    IMAGES,
    check_fit,
    check_task,
    model_shape,
    read_recipe,
    read_samples,
)
from deploykit.precision import convert_floats
from deploykit.publish import write_atomic
from deploykit.recipe import Recipe
from deploykit.seeds import stable_seed
from deploykit.trim import trim


@dataclass(frozen=True)
class Foreign:
    """A model from elsewhere, and what it is judged by.

    Attributes:
        where: its file, for messages.
        given: the file's bytes.
        border: of the file.
        core: the model without the softmax at its end, of a dynamic batch.
        softmax: whether it ended in one.
        layout: of its images; None where it takes arrays.
        normalization: in front of it; None where it takes pixels or arrays as they are.
        dataset: the samples.
        recipe: whose ``data``, ``seed``, ``threads`` and ``verify`` count.
    """

    where: str
    given: bytes
    border: Border
    core: onnx.ModelProto
    softmax: bool
    layout: str | None
    normalization: Normalization | None
    dataset: Dataset
    recipe: Recipe

    def prepare(self, samples: np.ndarray) -> np.ndarray:
        """Return what the file takes for samples as a client sends them."""
        if self.layout is None:
            return samples
        if self.normalization is None:
            return turned(samples, self.layout)
        return self.normalization.apply(samples)

    def calibration(self, count: int) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
        """Return what loads training samples, chosen by the seed, for ``core``; and how many."""
        train = self.dataset.train
        generator = np.random.default_rng(stable_seed(self.recipe.seed, "quantize", "calibration"))
        rows = np.sort(generator.permutation(len(train))[:count])
        return lambda places: self.prepare(train.load(rows[places])), len(rows)

    def write(
        self,
        core: onnx.ModelProto,
        path: Path,
        name: str,
        *,
        dequantize: bool,
        precision: str = "fp32",
    ) -> OnnxModel:
        """Write a model of this border as it ships: raw pixels or arrays in, logits out.

        Args:
            core: takes what the file took.
            path: the ONNX file to write.
            name: of the model, for the file's metadata.
            dequantize: see `take_pixels`.
            precision: of the floats that it computes in.

        Raises:
            ExportError: ONNX Runtime's converter cannot write it in ``precision``.
        """
        proto = core
        if self.layout is not None:
            proto = take_pixels(
                core,
                self.dataset.sample_shape,
                self.layout,
                self.normalization,
                dequantize=dequantize,
            )
        try:
            proto = trim(convert_floats(proto, precision))
        except Exception as error:  # whatever the converter stumbles over
            raise ExportError(
                f"{self.where}: cannot be written in {precision}: {first_line(error)}; ship fp32 "
                "with --quantize none"
            ) from error
        proto.graph.name, proto.producer_name, proto.producer_version = name, "deploykit", ""
        proto.domain, proto.model_version = "", 1
        write_atomic(path, proto.SerializeToString(deterministic=True))
        return OnnxModel(path, self.signature(proto), opset_of(proto))

    def signature(self, proto: onnx.ModelProto) -> Signature:
        """Return the border of a model that ships."""
        dtype = self.border.input.dtype if self.layout is None else "uint8"
        preprocess = self.dataset.preprocess
        if self.layout is not None and self.normalization is None and preprocess is not None:
            preprocess = {**preprocess, **AS_THEY_ARE}
        return Signature(
            (TensorSpec(proto.graph.input[0].name, dtype, (-1, *self.dataset.sample_shape)),),
            (TensorSpec(proto.graph.output[0].name, "float32", (-1, len(self.dataset.classes))),),
            self.dataset.classes,
            preprocess,
        )


def take_in(given: bytes, where: str, data: str | Path | Dataset, layout: str | None) -> Foreign:
    """Examine a file, read the samples, and tidy the model.

    Args:
        given: the file's bytes, which nobody has parsed yet.
        where: the file, for messages.
        data: see `read_recipe`.
        layout: of its images, where the sizes do not tell.

    Raises:
        ModelError: the file cannot be used.
        DataError: the data cannot, or not by this model.
        RecipeError: the file of the data has faults.
    """
    border = examine(given, where)
    images = len(border.input.shape) == 4
    recipe = read_recipe(data, IMAGES if images else ARRAYS)
    check_task(recipe, border, where)
    found = None
    if recipe.task == IMAGES:
        found = layout_of(border.input.shape[1:], layout, where)
    dataset = data if isinstance(data, Dataset) else read_samples(recipe, border, found)
    check_fit(dataset, border, found, where)
    shape = model_shape(dataset, found)
    if -1 in (*border.input.shape[1:], border.output.shape[1]):
        border = examine(given, where, sample_shape=shape)
        check_fit(dataset, border, found, where)
    core = trim(tidy(onnx.load_model_from_string(given), border, shape, where))
    stripped = without_softmax(core)
    normalization = None
    if found is not None and dataset.preprocess and border.input.dtype == "float32":
        normalization = Normalization.of(dataset.preprocess, found)
    return Foreign(
        where,
        given,
        border,
        core if stripped is None else stripped,
        stripped is not None,
        found,
        normalization,
        dataset,
        recipe,
    )
