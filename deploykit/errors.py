"""Every error a user can meet, grouped by how a caller reacts to it.

::

    DeploykitError
    ├── UsageError            2    change the command
    ├── RecipeError           2    mend the recipe (.problems)
    ├── DataError             3    mend the data
    ├── ModelError            3    mend the model or its weights
    │   ├── CompressionError  3    a layer stands in the way (.layer)
    │   └── ExportError       3    an operator stands in the way (.operator, .opset)
    ├── VerificationError     4    the proof failed (.report)
    ├── BudgetError           4    a budget does not hold
    ├── BundleError           4    the bundle is not what its manifest says
    ├── MissingDependency     5    install something
    ├── ServerError           5    see to the server (.status)
    │   ├── ServerBusy        5    ask again later (.retry_after_s)
    │   └── RequestRefused    3    mend the request
    └── Interrupted         130    a signal stopped the work (.signal)

The number is the exit code of the command line. A message says where, what was
expected, what was found and how to mend it. Programmer mistakes stay ``ValueError``
and ``TypeError``.
"""

import signal as signals
from collections.abc import Mapping, Sequence


class DeploykitError(Exception):
    """Base of every error that a user can mend; the command line prints it as one sentence."""

    exit_code = 1


class UsageError(DeploykitError):
    """The command asks for something that cannot be done."""

    exit_code = 2


class RecipeError(DeploykitError):
    """The recipe has faults; ``problems`` lists each as one sentence."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class DataError(DeploykitError):
    """The data cannot be used as they are."""

    exit_code = 3


class ModelError(DeploykitError):
    """The model or its weights cannot be used as they are."""

    exit_code = 3


class CompressionError(ModelError):
    """A layer cannot be compressed; ``layer`` is its module name."""

    def __init__(self, message: str, layer: str = "") -> None:
        super().__init__(message)
        self.layer = layer


class ExportError(ModelError):
    """The model cannot be written as ONNX."""

    def __init__(self, message: str, operator: str = "", opset: int | None = None) -> None:
        super().__init__(message)
        self.operator = operator
        self.opset = opset


class VerificationError(DeploykitError):
    """A proof failed; ``report`` holds what was measured."""

    exit_code = 4

    def __init__(self, message: str, report: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.report = dict(report or {})


class BudgetError(DeploykitError):
    """A budget of the recipe does not hold."""

    exit_code = 4


class BundleError(DeploykitError):
    """A bundle is not what its manifest says."""

    exit_code = 4

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        extra: Sequence[str] = (),
        altered: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.extra, self.altered = tuple(missing), tuple(extra), tuple(altered)


class MissingDependency(DeploykitError):
    """Something is not installed; the message holds the install command."""

    exit_code = 5


class ServerError(DeploykitError):
    """A server does not answer as it should; ``status`` is None where nothing was answered."""

    exit_code = 5

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerBusy(ServerError):
    """The server took nothing, for now; ``retry_after_s`` is what it asks to wait, 0 if nothing."""

    def __init__(self, message: str, status: int, retry_after_s: float = 0) -> None:
        super().__init__(message, status)
        self.retry_after_s = retry_after_s


class RequestRefused(ServerError):
    """The server cannot use what was asked: the samples, the model's name, the token."""

    exit_code = 3


class Interrupted(DeploykitError):
    """A signal stopped the work after it left a valid checkpoint."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signals.Signals(signal)
        self.exit_code = 128 + signal


def first_line(error: Exception) -> str:
    """Return what an error of another library says first, to be part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
