"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from typer.exceptions import TyperException

from deploykit import __version__
from deploykit.errors import DeploykitError, UsageError
from deploykit.server.settings import Settings

app = typer.Typer(
    name="deploykit",
    help="From a PyTorch model and data to a small, fast, proven model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="folder that compress wrote")]
BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="folder or zip file that export wrote")
]
Force = Annotated[bool, typer.Option("--force", help="replace what stands at --out")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"deploykit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of errors")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    if debug:
        os.environ["DEPLOYKIT_DEBUG"] = "1"


def _compress_help(context: typer.Context, asked: bool) -> None:
    if asked:
        from deploykit.recipe.document import key_list

        typer.echo(f"{context.get_help()}\n\nKeys of a recipe:\n\n{key_list()}", nl=False)
        raise typer.Exit


@app.command(add_help_option=False)
def compress(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see docs/recipe.md")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="RUN", help="folder to write")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change a key, as train.epochs=5"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the interrupted run at --out")
    ] = False,
    force: Force = False,
    check: Annotated[
        bool, typer.Option("--check", help="validate everything, say what a run would do, stop")
    ] = False,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            "--latency-table",
            metavar="FILE",
            help="decide by the latencies in this measurements.json",
        ),
    ] = None,
    _help: Annotated[
        bool,
        typer.Option(
            "--help", "-h", callback=_compress_help, is_eager=True, help="show this and every key"
        ),
    ] = False,
) -> None:
    """Train, prune and quantize a model as a recipe says."""
    replay = None if latency_table is None else _read_latencies(latency_table)
    if check:
        _check(recipe, overrides or [], replay)
        return
    if out is None:
        raise UsageError("--out: expected a folder for the run, got none; add --out runs/NAME")
    if force and resume:
        raise UsageError("--force and --resume: expected one of them, got both; drop one")
    from deploykit.api import compress_recipe
    from deploykit.progress import ConsoleProgress

    run = compress_recipe(
        recipe,
        out,
        overrides=overrides or [],
        force=force,
        resume=resume,
        replay=replay,
        progress=ConsoleProgress(),
        commands=[_command()],
    )
    _print_result(run.report)
    typer.echo(f"run: {out}  (report: {out / 'report.html'})")


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL.onnx", help="what compress wrote, or another's model"),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="BUNDLE", help="folder or .zip to write")],
    target: Annotated[
        str | None, typer.Option("--target", help="where it will run; default: the recipe's")
    ] = None,
    version: Annotated[
        str, typer.Option("--version", help="of the model; servers tell models apart by it")
    ] = "1",
    format: Annotated[
        Literal["folder", "zip"] | None,
        typer.Option("--format", help="default: as --out ends"),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="with sample code for C++, Android and iOS")
    ] = False,
    mobile: Annotated[
        bool, typer.Option("--mobile", help="with the ORT file and operators for small builds")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", help="of MODEL.onnx: a recipe, a folder of classes, or digits"),
    ] = None,
    quantize: Annotated[
        Literal["auto", "ptq", "fp16-weights", "none"] | None,
        typer.Option("--quantize", help="of MODEL.onnx [auto: if it pays]"),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="of MODEL.onnx's accuracy [0.01]")
    ] = None,
    layout: Annotated[
        Literal["nchw", "nhwc"] | None,
        typer.Option("--layout", help="of MODEL.onnx, where its sizes do not tell"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="of MODEL.onnx's bundle; default: the file's")
    ] = None,
    force: Force = False,
) -> None:
    """Write the verified bundle of a finished run, or of an ONNX file."""
    from deploykit.api import export as export_any
    from deploykit.progress import ConsoleProgress

    export_any(
        source,
        out=out,
        target=target,
        version=version,
        format=format,
        native=native,
        mobile=mobile,
        data=data,
        quantize=quantize,
        max_drop=max_drop,
        layout=layout,
        name=name,
        force=force,
        progress=ConsoleProgress(),
    )
    typer.echo(f"bundle: {out}  (verified)")


@app.command()
def sign(
    bundle: BundlePath,
    key: Annotated[Path, typer.Option("--key", metavar="PRIVATE.pem", help="of an EC key pair")],
    force: Annotated[bool, typer.Option("--force", help="replace a signature")] = False,
) -> None:
    """Sign a bundle, so that who has the public key can tell it from another's."""
    from deploykit.bundle import about_runner
    from deploykit.signing import sign_bundle

    if told := about_runner(sign_bundle(bundle, key, force=force)):
        typer.echo(told)
    typer.echo(f"{bundle}: signed; deploykit verify --key PUBLIC.pem checks it")


@app.command()
def verify(
    bundle: BundlePath,
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="PUBLIC.pem", help="of the pair that it is signed with"),
    ] = None,
) -> None:
    """Check every byte of a bundle and its golden samples, and its signature."""
    from deploykit.bundle import about_runner, verify_bundle
    from deploykit.runtime import about_signature

    manifest = verify_bundle(bundle, key)
    typer.echo(
        f"{bundle}: {manifest['name']} {manifest['version']} for {manifest['target']}: verified, "
        f"{len(manifest['files'])} files; golden samples agree"
    )
    if told := about_runner(manifest):
        typer.echo(told)
    typer.echo(about_signature(bundle) if key is None else f"signed by the owner of {key}")


@app.command()
def predict(
    bundle: BundlePath,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="images, or .npy arrays")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON array")] = False,
) -> None:
    """Classify files with a bundle."""
    from deploykit import runtime
    from deploykit.bundle import told_as_deploykit

    with told_as_deploykit():
        runtime.predict(bundle, files, as_json)


@app.command()
def bench(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="folder or zip file")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="default: the bundle's")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="measure this server instead")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="default: the server's first")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="send so many requests a second (open loop)")
    ] = None,
    connections: Annotated[
        int | None,
        typer.Option("--connections", min=1, max=1024, help="or over so many, as answered [16]"),
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="how long [10]")] = None,
    body: Annotated[
        Path | None, typer.Option("--body", metavar="FILE", help="sample; default: random numbers")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="what --json calls this machine")
    ] = None,
) -> None:
    """Measure a bundle's latency on this machine, or a server under load."""
    if url is not None:
        _refuse_beside("--url", {"BUNDLE": bundle, "--threads": threads, "--device": device})
        from deploykit.load.command import Plan, bench_server

        token = os.environ.get("DEPLOYKIT_TOKEN") or None
        plan = Plan(url, model, rate, connections, seconds, body, token)
        bench_server(plan, as_json, typer.echo)
        return
    if bundle is None:
        raise UsageError("bench: expected BUNDLE or --url URL, got neither; add one")
    load = {"--model": model, "--rate": rate, "--connections": connections}
    _refuse_beside("BUNDLE", {**load, "--seconds": seconds, "--body": body})
    from deploykit import runtime
    from deploykit.bundle import told_as_deploykit

    try:
        device = None if device is None else runtime.device_name(device)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--device: {error}; choose another name") from error
    with told_as_deploykit():
        runtime.bench(bundle, threads, as_json, device=device)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="RUN|BUNDLE", help="what to look at")],
) -> None:
    """Show what a run or a bundle holds."""
    from deploykit.inspection import inspect_folder

    typer.echo(inspect_folder(folder))


@app.command()
def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="that bench --json printed")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PAGE.html", help="file to write")],
    devices: Annotated[
        bool, typer.Option("--devices", help="what the files are of; the only kind there is")
    ] = True,
    force: Force = False,
) -> None:
    """Gather what bench --json printed on several devices into one page."""
    from deploykit.fleet import write_devices

    typer.echo(write_devices(files, out, force=force))
    typer.echo(f"page: {out}")


@app.command()
def serve(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="folders that export wrote")
    ],
    host: Annotated[str, typer.Option("--host", help="0.0.0.0: all networks")] = Settings.host,
    port: Annotated[int, typer.Option("--port", help="0: any that is free")] = Settings.port,
    workers: Annotated[int, typer.Option("--workers", help="processes")] = Settings.workers,
    threads: Annotated[
        int | None, typer.Option("--threads", help="of a worker; default: cores / workers")
    ] = None,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="refuse to compute on the CPU")
    ] = False,
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="samples that run together")
    ] = Settings.max_batch,
    batch_window_us: Annotated[
        int,
        typer.Option("--batch-window-us", help="wait for others so long; 0: while it is busy"),
    ] = Settings.window_us,
    queue: Annotated[
        int, typer.Option("--queue", help="samples that may wait; more get 429")
    ] = Settings.queue,
    timeout: Annotated[
        float, typer.Option("--timeout", help="seconds; a request gets 504 after them")
    ] = Settings.timeout_s,
    max_body: Annotated[
        int, typer.Option("--max-body", help="bytes of a body; more get 413")
    ] = Settings.max_body,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", help="of an image")
    ] = Settings.max_pixels,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="clients need it; or DEPLOYKIT_TOKEN"),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", metavar="ORIGIN", help="pages that may ask; repeatable"),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="a line of JSON a request")
    ] = True,
    tracing: Annotated[
        bool, typer.Option("--tracing", help="OpenTelemetry, as BentoML has it")
    ] = False,
    grace: Annotated[
        float, typer.Option("--grace", help="seconds until SIGTERM becomes SIGKILL")
    ] = Settings.grace_s,
    drain: Annotated[
        float, typer.Option("--drain", help="of these: not ready, but taking requests")
    ] = Settings.drain_s,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="PEM, with its chain")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="PEM, unencrypted")
    ] = None,
) -> None:
    """Serve bundles over HTTP until Ctrl-C or SIGTERM; SIGHUP loads them anew."""
    from deploykit.server.start import serve as serve_bundles

    serve_bundles(
        bundles,
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        require_gpu=require_gpu,
        max_batch=max_batch,
        batch_window_us=batch_window_us,
        queue=queue,
        timeout=timeout,
        max_body=max_body,
        max_pixels=max_pixels,
        token_file=token_file,
        cors_origins=cors_origins or (),
        access_log=access_log,
        tracing=tracing,
        grace=grace,
        drain=drain,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what this machine offers: CPU features, providers, versions."""
    from deploykit.doctor import doctor as examine
    from deploykit.doctor import render

    found = examine()
    typer.echo(json.dumps(found, indent=2) if as_json else render(found))


def _refuse_beside(word: str, others: dict[str, object]) -> None:
    for other, value in others.items():
        if value is not None:
            raise UsageError(f"{word} and {other}: expected one of them, got both; drop one")


def _check(
    recipe_file: Path,
    overrides: list[str],
    replay: list[dict[str, dict[str, object]]] | None,
) -> None:
    from deploykit.recipe import load_recipe
    from deploykit.recipe.paths import with_absolute_paths

    recipe = with_absolute_paths(load_recipe(recipe_file, overrides), recipe_file.parent)
    from deploykit.check import check_recipe

    for line in check_recipe(recipe, replay):
        typer.echo(line)
    typer.echo("the recipe is sound; nothing was written")


def _read_latencies(path: Path) -> list[dict[str, dict[str, object]]]:
    from deploykit.stages import read_measurements

    return read_measurements(path)


def _print_result(report: dict[str, object]) -> None:
    from deploykit.inspection import result_lines

    for line in result_lines(report):
        typer.echo(line)


def _command() -> str:
    told = shlex.join(["deploykit", *sys.argv[1:]])
    return told.encode("utf-8", "backslashreplace").decode()  # a name may be any bytes


def main() -> None:
    """Run the command line; the only place that catches errors."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # until now nothing was to be cleaned up
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be any bytes
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads it has enough, as `head` has
        _give_up_output()
        sys.exit(128 + signal.SIGPIPE)
    except DeploykitError as error:
        sys.exit(_tell(str(error), error, error.exit_code))
    except TyperException as error:
        error.show()  # type: ignore[attr-defined]  # its subclasses that reach here have it
        sys.exit(getattr(error, "exit_code", 2))
    except Exception as error:  # noqa: BLE001 - a user gets one sentence; --debug the traceback
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _give_up_output()
            sys.exit(_tell("the output: no space is left; send it elsewhere", error, 2))
        sys.exit(_tell(f"unexpected {type(error).__name__}: {error}; see --debug", error, 1))
    if status == 128 + signal.SIGINT:  # Ctrl-C outside of a run, which typer has caught
        _tell("stopped by SIGINT", None, status)
    sys.exit(status if isinstance(status, int) else 0)


def _end(number: int, _frame: object) -> NoReturn:
    """End a command as Ctrl-C would: what it holds on the disk goes, and so do its processes."""
    sys.exit(_tell(f"stopped by {signal.Signals(number).name}", None, 128 + number))


def _give_up_output() -> None:
    """Let Python's end not write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(sentence: str, error: BaseException | None, exit_code: int) -> int:
    if error is not None and os.environ.get("DEPLOYKIT_DEBUG"):
        traceback.print_exception(error)
    typer.echo(f"error: {sentence}", err=True)
    return exit_code
