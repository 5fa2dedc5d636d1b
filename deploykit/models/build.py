"""From the recipe's ``model`` section to a module."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from deploykit.errors import DeploykitError, MissingDependency, ModelError
from deploykit.models.digits_cnn import digits_cnn
from deploykit.models.mlp import mlp
from deploykit.models.resnet_cifar import RESNETS
from deploykit.models.weights import load_weights
from deploykit.recipe.sections import ModelSection
from deploykit.user_code import load_function

Factory = Callable[..., nn.Module]

FACTORIES: Mapping[str, Factory] = {"digits-cnn": digits_cnn, "mlp": mlp, **RESNETS}


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Draw what a factory draws from ``seed``, and leave the caller's numbers as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def build_model(
    section: ModelSection, *, classes: int, sample_shape: tuple[int, ...], base: Path
) -> nn.Module:
    """Build the model that ``section`` names and load its weights, if it names some.

    Args:
        section: name, weights and factory arguments.
        classes: number of logits.
        sample_shape: ``(H, W, C)`` for images, else the shape of one array.
        base: folder that relative paths start from; the recipe's.

    Raises:
        ModelError: the name, an argument or the weights do not fit.
        MissingDependency: the name needs a library that is not installed.
    """
    module = call_factory(
        section.name, section.arguments, classes=classes, sample_shape=sample_shape, base=base
    )
    if section.weights is not None:
        load_weights(module, base / section.weights, classes=classes)
    return module


def call_factory(
    name: str,
    arguments: Mapping[str, Any],
    *,
    classes: int,
    sample_shape: tuple[int, ...],
    base: Path,
) -> nn.Module:
    """Build the module called ``name`` with fresh weights.

    A user's function gets of ``classes`` and ``sample_shape`` what its signature names.

    Raises:
        ModelError: there is no such model, or an argument does not fit.
        MissingDependency: the name needs a library that is not installed.
    """
    factory = find_factory(name, base)
    offered: dict[str, Any] = {"classes": classes, "sample_shape": tuple(sample_shape)}
    if clash := sorted(offered.keys() & arguments.keys()):
        raise ModelError(f"model.arguments.{clash[0]}: the data decide it; remove it")
    taken = inspect.signature(factory).parameters
    given = {key: value for key, value in offered.items() if key in taken} | dict(arguments)
    _check_arguments(name, factory, given)
    try:
        module = factory(**given)
    except DeploykitError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ModelError(
            f"model.name: {name}: could not be built with {given}: "
            f"{type(error).__name__}: {error}; mend model.arguments"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model.name: {name}: expected a torch.nn.Module, got {type(module).__name__}"
        )
    lazy = [key for key, tensor in module.state_dict(keep_vars=True).items() if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"model.name: {name}: expected layers that know their sizes, got lazy ones "
            f"({', '.join(lazy[:3])}); say how many inputs they have"
        )
    return module


def find_factory(name: str, base: Path) -> Factory:
    """Return the function behind ``name``.

    Raises:
        ModelError: there is no such model, file or function.
        MissingDependency: the library that holds it is not installed.
    """
    if name in FACTORIES:
        return FACTORIES[name]
    library, _, model = name.partition(":")
    if library == "torchvision":
        return _torchvision_factory(model)
    if library == "timm":
        return _timm_factory(model)
    if ".py:" in name:
        return load_function(name, base, key="model.name", error=ModelError)
    raise ModelError(
        f"model.name: expected one of {', '.join(FACTORIES)}, torchvision:NAME, timm:NAME or "
        f"path/to/file.py:function, got {name!r}"
    )


def _torchvision_factory(model: str) -> Factory:
    models = _import_library("torchvision", "torchvision.models")
    if model not in models.list_models():
        raise ModelError(
            f"model.name: torchvision:{model}: torchvision {_version('torchvision')} has no such "
            "model; torchvision.models.list_models() lists them"
        )

    def factory(*, classes: int, **arguments: Any) -> nn.Module:
        module: nn.Module = models.get_model(model, num_classes=classes, **arguments)
        return module

    return factory


def _timm_factory(model: str) -> Factory:
    timm = _import_library("timm", "timm")
    if not timm.is_model(model):
        raise ModelError(
            f"model.name: timm:{model}: timm {_version('timm')} has no such model; "
            "timm.list_models() lists them"
        )

    def factory(*, classes: int, sample_shape: tuple[int, ...], **arguments: Any) -> nn.Module:
        settings = {"in_chans": sample_shape[-1], **arguments}
        module: nn.Module = timm.create_model(
            model, pretrained=False, num_classes=classes, **settings
        )
        return module

    return factory


def _import_library(library: str, module: str) -> Any:
    try:
        import_module(library)
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise MissingDependency(
            f"model.name: {library} is not installed; pip install 'deploykit[vision]'"
        ) from error


def _version(library: str) -> str:
    return str(getattr(import_module(library), "__version__", ""))


def _check_arguments(name: str, factory: Factory, given: Mapping[str, Any]) -> None:
    signature = inspect.signature(factory)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ModelError(
            f"model.arguments: {name}: {error}; it takes {signature}, got {dict(given)}"
        ) from error
