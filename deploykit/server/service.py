"""The BentoML service: our application mounted at its root.

``bentoml serve deploykit.server.service:service`` serves the bundles that DEPLOYKIT_BUNDLES names
(paths, separated as in PATH), or what DEPLOYKIT_SERVE says (settings as JSON). The workers of
``deploykit serve`` build the same service around the models they have.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before BentoML is loaded

import bentoml

from deploykit.errors import UsageError
from deploykit.server.app import App
from deploykit.server.meters import Meters
from deploykit.server.models import Models
from deploykit.server.settings import Settings

SETTINGS, BUNDLES = "DEPLOYKIT_SERVE", "DEPLOYKIT_BUNDLES"


def build_service(models: Models, app: App, *, owned: bool = True) -> Any:
    """Return a BentoML service that answers by ``app``.

    Args:
        models: of the application.
        app: answers every path that BentoML does not take itself.
        owned: whether the service loads the models at its start and closes them at its end.
    """

    class Deploykit:
        """Serves the bundles of deploykit; /docs describes every route."""

        @bentoml.on_startup  # type: ignore[untyped-decorator]
        async def load(self) -> None:
            if owned:
                await models.load()

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        async def close(self) -> None:
            if owned:
                await models.close()
                app.close()

        def __is_ready__(self) -> bool:
            return models.ready and not models.draining

        def __metrics__(self, _bentoml: str) -> str:
            return models.meters.text().decode()

    made = bentoml.service(
        Deploykit,
        name="deploykit",
        # Deadlines are the application's, request by request.
        traffic={"timeout": 3600},
        endpoints={"livez": "/livez", "readyz": "/readyz"},
        logging={"access": {"enabled": False}},
    )
    made.mount_asgi_app(app, path="/")
    return made


def settings_from_environment() -> Settings:
    """Return the settings that DEPLOYKIT_SERVE or DEPLOYKIT_BUNDLES name.

    Raises:
        UsageError: neither does.
    """
    from deploykit.server.start import checked, read_token

    if text := os.environ.get(SETTINGS):
        return Settings.from_json(text)
    bundles = [path for path in os.environ.get(BUNDLES, "").split(os.pathsep) if path]
    if not bundles:
        raise UsageError(
            f"{BUNDLES}: expected paths of bundles, separated by {os.pathsep!r}, got none; set it"
        )
    return checked(Settings(bundles=tuple(bundles), token=read_token(None)))


def __getattr__(name: str) -> Any:
    """Make ``service`` when it is asked for: importing this module does no work."""
    if name != "service":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = settings_from_environment()
    models = Models(settings, Meters())
    globals()["service"] = made = build_service(models, App(models, settings, None))
    return made
