"""The command line. It imports neither torch nor Flower before a command needs them, so that ``--help`` is quick."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import click
import typer

from fedsparse.errors import ClientError, UserError, unknown

if TYPE_CHECKING:
    from fedsparse.experiment import Experiment
    from fedsparse.runner import OnRound, Run

DIFFERENT, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes

app = typer.Typer(
    name="fedsparse",
    help="Federated learning in which every client trains a sparse model that fits its own budget.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> NoReturn:
    """The console script: exit code 0, 2 for what the user can mend (one line on standard error), 130 for Ctrl-C."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="fedsparse", standalone_mode=False) or 0
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer turns Ctrl-C within a command into this code
            _fail("interrupted", code)
    except click.ClickException as error:
        code = _fail(error.format_message())
    except UserError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fedsparse {version('fedsparse')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="A TOML file or the name of a built-in experiment.")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key.")] = None,
    method: Annotated[str, typer.Option(help="A method, pkg.module:Class or a file.")] = "",
    client: Annotated[str, typer.Option(help="A client half of yours under the method's server half.")] = "",
    dataset: Annotated[str, typer.Option(help="A data set, a .npz file or a folder.")] = "",
    model: Annotated[str, typer.Option(help="A model, pkg.module:callable or a file.")] = "",
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes partition, initial model and all randomness.")] = None,
    engine: Annotated[str, typer.Option(help="Where clients run: local or ray.")] = "",
    workers: Annotated[int | None, typer.Option(help="Worker processes, or Ray actors.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; it must not exist.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json instead of the table.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors, the clients' too.")] = False,
) -> None:
    """Train and write a run folder. Everything has a default."""
    options = {"method": method, "client": client, "dataset": dataset, "model": model, "engine.kind": engine}
    numbers = {"rounds": rounds, "seed": seed, "engine.workers": workers}
    changes = [f"{key}={value}" for key, value in options.items() if value]
    changes += [f"{key}={value}" for key, value in numbers.items() if value is not None]
    with _traces(debug):
        done = _run(_experiment(experiment, [*(settings or []), *changes]), out, quiet)
    _print_result(done, quiet, as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run that was interrupted.")],
    engine: Annotated[str, typer.Option(help="Where clients run: local or ray; without it, where they ran.")] = "",
    workers: Annotated[int, typer.Option(help="Worker processes; 0 = as many as the run had.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json instead of the table.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors, the clients' too.")] = False,
) -> None:
    """Go on with an interrupted run from its newest checkpoint."""
    from fedsparse.runner import resume as go_on

    with _traces(debug):
        done = _watched(lambda on_round: go_on(folder, engine=engine, workers=workers, on_round=on_round), quiet)
    _print_result(done, quiet, as_json)


@app.command()
def verify(
    experiment: Annotated[str, typer.Argument(help="A TOML file or the name of a built-in experiment.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key.")] = None,
    engines: Annotated[str, typer.Option(help="kind:workers, separated by commas.")] = "local:1,local:2,ray:2",
    out: Annotated[Path | None, typer.Option(help="Keep the run folders here.")] = None,
) -> None:
    """Run an experiment on several engines and compare the digests; exit code 1 if they differ."""
    from fedsparse.verify import engines_of
    from fedsparse.verify import verify as each

    wanted, digests = engines_of(engines), set()
    with _log_on_standard_error(False):
        for name, digest in each(_experiment(experiment, settings or []), wanted, out=out):
            digests.add(digest)
            typer.echo(f"{name:<10} {digest}")
    if len(digests) > 1:
        typer.echo("the digests differ", err=True)
        raise typer.Exit(DIFFERENT)
    typer.echo(f"the same on {len(wanted)} engines")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of finished runs.")],
    csv: Annotated[Path | None, typer.Option(help="Write CSV to this file, or to standard output with -.")] = None,
) -> None:
    """Put runs side by side: a row a method and budget tier."""
    from fedsparse.report import tables

    records = [tables.read_run(folder) for folder in runs]
    warning = tables.differences(records)
    if warning:
        typer.echo(f"warning: {warning}", err=True)
    rows = tables.compare_rows(records)
    if csv is None:
        typer.echo(tables.text_table(rows), nl=False)
    elif str(csv) == "-":
        typer.echo(tables.csv_table(rows), nl=False)
    else:
        _write(csv, tables.csv_table(rows))


@app.command(name="list")
def list_names(kind: Annotated[str, typer.Argument(metavar="methods|models|datasets|experiments")]) -> None:
    """Print the names that are known."""
    if kind not in _LISTS:
        raise unknown("list", kind, _LISTS)
    for name in _LISTS[kind]():
        typer.echo(name)


def _methods() -> tuple[str, ...]:
    from fedsparse.method import method_names

    return method_names()


def _models() -> tuple[str, ...]:
    from fedsparse.models import model_names

    return model_names()


def _datasets() -> tuple[str, ...]:
    from fedsparse.data import dataset_names

    return dataset_names()


def _experiments() -> tuple[str, ...]:
    from fedsparse.experiment import experiment_names

    return experiment_names()


_LISTS: dict[str, Callable[[], tuple[str, ...]]] = {
    "methods": _methods,
    "models": _models,
    "datasets": _datasets,
    "experiments": _experiments,
}


def _experiment(source: str, overrides: list[str]) -> Experiment:
    from fedsparse.experiment import from_dict, load_experiment

    return load_experiment(source, overrides) if source else from_dict({}, overrides)


def _run(experiment: Experiment, out: Path | None, quiet: bool) -> Run:
    from fedsparse.runner import run

    for note in () if quiet else experiment.notes:
        typer.echo(f"note: {note}", err=True)
    return _watched(lambda on_round: run(experiment, out=out, on_round=on_round), quiet)


def _watched(work: Callable[[OnRound | None], Run], quiet: bool) -> Run:
    """Do it, with a progress display."""
    from fedsparse.report.progress import LiveProgress

    with _log_on_standard_error(quiet):
        if quiet:
            return work(None)
        progress = LiveProgress()
        try:
            return work(progress)
        finally:
            progress.close()


@contextmanager
def _traces(debug: bool) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if debug:
            _print_trace(error)
        raise


class _Lines(logging.Formatter):
    """ "note: ..." or "warning: ..."."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{'warning' if record.levelno >= logging.WARNING else 'note'}: {record.getMessage()}"


@contextmanager
def _log_on_standard_error(quiet: bool) -> Iterator[None]:
    """The library's own lines, such as that it compiles something; none with ``quiet``."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    handler.setLevel(logging.ERROR if quiet else logging.INFO)  # not the logger's: a run's events have its warnings
    logger = logging.getLogger("fedsparse")
    before = logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:  # a process that calls a command and goes on may close this standard error
        logger.handlers, level = before
        logger.setLevel(level)


def _print_result(done: Run, quiet: bool, as_json: bool) -> None:
    failures = done.summary["failures"]["clients"]
    if failures:  # on standard error, quiet or not: nothing ends as if it had not happened
        errors = [error for line in done.rounds for error in line["errors"]]
        first = [*errors, *(done.summary["novel"] or {}).get("errors", ())][0]
        typer.echo(f"warning: {failures} failures of clients were skipped, the first: {first}", err=True)
    if as_json:
        typer.echo((done.directory / "summary.json").read_text(encoding="utf-8").rstrip())
    elif not quiet:
        from fedsparse.report.tables import novel_line, text_table, tier_rows

        typer.echo(text_table(tier_rows(done.summary)), nl=False)
        if line := novel_line(done.summary):
            typer.echo(line)
        for note in done.summary.get("notes", ()):
            typer.echo(f"note: {note}")
        typer.echo(f"run folder: {done.directory}, as a page: {done.directory / 'report.html'}")


def _print_trace(error: UserError) -> None:
    import traceback

    if isinstance(error, ClientError):
        typer.echo(error.trace, err=True)
    traceback.print_exception(error)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _fail(message: str, code: int = USER_ERROR) -> int:
    one_line = " ".join(message.split())
    typer.echo(f"error: {one_line}", err=True)
    return code
