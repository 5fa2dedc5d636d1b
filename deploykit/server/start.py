"""From what the user asked for to a server: every setting checked, every fault one sentence."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from deploykit.errors import MissingDependency, UsageError
from deploykit.server.settings import Settings
from deploykit.server.tls import server_context

TOKEN = "DEPLOYKIT_TOKEN"
PACKAGES = ("bentoml", "uvicorn", "uvloop", "httptools", "orjson", "prometheus_client")
# flag: (field, least, most, unit)
BOUNDS = {
    "--port": ("port", 0, 65535, ""),
    "--workers": ("workers", 1, 256, ""),
    "--threads": ("threads", 1, 1024, ""),
    "--max-batch": ("max_batch", 1, 4096, " samples"),
    "--batch-window-us": ("window_us", 0, 1_000_000, " microseconds"),
    "--queue": ("queue", 1, 1_000_000, " samples"),
    "--timeout": ("timeout_s", 0.001, 3600, " seconds"),
    "--max-body": ("max_body", 1024, 2**30, " bytes"),
    "--max-pixels": ("max_pixels", 1, 10**9, " pixels"),
    "--grace": ("grace_s", 0, 3600, " seconds"),
    "--drain": ("drain_s", 0, 600, " seconds"),
}
ORIGIN = re.compile(r"\*|https?://[^/\s,]+")


def serve(
    bundles: Sequence[Path | str] | Path | str,
    *,
    host: str = Settings.host,
    port: int = Settings.port,
    workers: int = Settings.workers,
    threads: int | None = None,
    require_gpu: bool = False,
    max_batch: int = Settings.max_batch,
    batch_window_us: int = Settings.window_us,
    queue: int = Settings.queue,
    timeout: float = Settings.timeout_s,
    max_body: int = Settings.max_body,
    max_pixels: int = Settings.max_pixels,
    token: str | None = None,
    token_file: Path | str | None = None,
    cors_origins: Sequence[str] = (),
    access_log: bool = True,
    tracing: bool = False,
    grace: float = Settings.grace_s,
    drain: float = Settings.drain_s,
    tls_cert: Path | str | None = None,
    tls_key: Path | str | None = None,
) -> None:
    """Serve bundles over HTTP until a signal says stop, as `deploykit serve` does.

    Args:
        bundles: folders that `export` wrote; the first answers where no model is named.
        host: to listen at.
        port: to listen at; 0: any that is free, which a line on standard error tells.
        workers: processes that answer.
        threads: of a worker; None: the cores of this process, shared out.
        require_gpu: refuse a model that computes on the CPU.
        max_batch: samples that run together, and that one request may bring.
        batch_window_us: microseconds for which a sample waits for others; 0: nothing waits while
            the session is idle.
        queue: samples that may wait in a worker; more are refused with 429.
        timeout: seconds after which a request is given up with 504.
        max_body: bytes of a request's body, as sent and unpacked.
        max_pixels: of an image.
        token: that clients have to send; None: that of ``token_file``, else of the environment
            variable DEPLOYKIT_TOKEN, else everybody may ask.
        token_file: file with the token.
        cors_origins: origins whose pages may ask.
        access_log: tell every request on standard output, as a line of JSON.
        tracing: let requests pass BentoML's middleware, OpenTelemetry's among it.
        grace: seconds after which requests that are still in work at the end are cut off.
        drain: those of them in which readiness says no while requests are still taken.
        tls_cert: PEM file with the server's certificate and its chain.
        tls_key: PEM file with its key, unencrypted.

    Raises:
        Interrupted: always at the end, with the signal.
        UsageError: a setting, the address or a certificate cannot be used.
        BundleError: one of the bundles is not what its manifest says.
        MissingDependency: the packages for serving, or the GPU that is demanded.

    Example:
        >>> serve("bundles/digits", workers=2)
        serving digits 1.0 on http://127.0.0.1:3000 (docs: /docs)
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise MissingDependency(f"serve needs {', '.join(missing)}: pip install 'deploykit[serve]'")
    settings = checked(
        Settings(
            bundles=tuple(map(str, [bundles] if isinstance(bundles, (str, Path)) else bundles)),
            workers=workers,
            threads=threads,
            require_gpu=require_gpu,
            max_batch=max_batch,
            window_us=batch_window_us,
            queue=queue,
            timeout_s=timeout,
            max_body=max_body,
            max_pixels=max_pixels,
            token=checked_token("token", token) if token is not None else read_token(token_file),
            cors=tuple(cors_origins),
            access_log=access_log,
            tracing=tracing,
            host=host,
            port=port,
            grace_s=grace,
            drain_s=drain,
            tls_cert=None if tls_cert is None else str(Path(tls_cert).absolute()),
            tls_key=None if tls_key is None else str(Path(tls_key).absolute()),
        )
    )
    from deploykit.server.supervisor import supervise

    refuse_running_loop()
    supervise(settings)


def refuse_running_loop() -> None:
    """Refuse a thread in which other things run already, as in a notebook.

    Raises:
        UsageError: it is one.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(
        "serve: expected a thread of its own, got one that runs an event loop, as in a notebook; "
        "start it with threading.Thread, or from a terminal: deploykit serve"
    )


def checked(settings: Settings) -> Settings:
    """Return settings whose every value can be used, with paths made absolute and threads counted.

    Raises:
        UsageError: one cannot.
    """
    if not settings.bundles:
        raise UsageError("serve: expected at least one bundle, got none; name its folder")
    for flag, (name, least, most, unit) in BOUNDS.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"{flag}: expected {least} to {most}{unit}, got {value}")
    if settings.drain_s > settings.grace_s:
        raise UsageError(
            f"--drain: expected at most --grace, which is {settings.grace_s:g} seconds, "
            f"got {settings.drain_s:g}; raise --grace"
        )
    if (settings.tls_cert is None) != (settings.tls_key is None):
        given, other = ("--tls-cert", "--tls-key")[:: 1 if settings.tls_cert else -1]
        raise UsageError(f"{given}: expected {other} beside it, got none; give both")
    for origin in settings.cors:
        if not ORIGIN.fullmatch(origin):
            raise UsageError(
                f"--cors-origin: expected * or an origin such as https://example.org, "
                f"got {origin!r}"
            )
    if settings.tls_cert is not None and settings.tls_key is not None:
        server_context(settings.tls_cert, settings.tls_key)
    return replace(
        settings,
        bundles=tuple(str(Path(bundle).absolute()) for bundle in settings.bundles),
        threads=settings.threads or max(1, count_cores() // settings.workers),
    )


def read_token(file: Path | str | None) -> str | None:
    """Return the token of a file, else of the environment; None where there is neither.

    Raises:
        UsageError: it is empty, or nothing that a header can hold.
    """
    if file is not None:
        return checked_token(f"--token-file: {file}", _read_secret(Path(file)))
    found = os.environ.get(TOKEN)
    return None if found is None else checked_token(TOKEN, found)


def checked_token(where: str, text: str) -> str:
    """Return the token that a text holds, without the white space around it.

    Raises:
        UsageError: it is empty, or nothing that a header can hold.
    """
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"{where}: expected a token of printable ASCII without spaces, "
            f"got {'another' if token else 'an empty'} one; openssl rand -hex 32 makes one"
        )
    return token


def _read_secret(file: Path) -> str:
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o044:
            print(  # noqa: T201 - a server's log
                f"warning: --token-file: {file} can be read by others; chmod 600 {file}",
                file=sys.stderr,
            )
        return file.read_text(errors="replace")
    except OSError as error:
        raise UsageError(
            f"--token-file: {file}: cannot be read: {error.strerror or error}; name a file with "
            "the token in it"
        ) from error


def count_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by its group's quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _quota(Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(root: Path) -> float | None:
    """Return the cores that the control group may use; None: as many as there are."""
    try:
        if (root / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        cores = float(quota) / float(period)
    except (OSError, ValueError):  # "max", or no such group
        return None
    return cores if cores > 0 else None  # version 1 says -1 for none
