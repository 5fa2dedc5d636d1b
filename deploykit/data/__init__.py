"""Samples: where they come from, how they are split, read and changed."""

from deploykit.data.dataset import Dataset, Split
from deploykit.data.load import dataset_from_arrays, load_dataset

__all__ = ["Dataset", "Split", "dataset_from_arrays", "load_dataset"]
