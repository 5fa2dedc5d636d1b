"""Models: a name, a file or a library becomes a module, with weights if they are given."""

from deploykit.models.build import build_model
from deploykit.models.normalization import fold_normalization
from deploykit.models.weights import load_weights

__all__ = ["build_model", "fold_normalization", "load_weights"]
