"""The command line: one module a verb. Heavy libraries are imported inside the verb that needs them."""

from __future__ import annotations

import io
import os
import sys
import warnings

import typer

from penchant import __version__
from penchant.cli.batch import batch_command
from penchant.cli.console import err
from penchant.cli.demo import demo_command
from penchant.cli.doctor import doctor_command
from penchant.cli.evaluate import evaluate_command
from penchant.cli.fetch import fetch_command
from penchant.cli.finetune import SETTINGS, finetune_command
from penchant.cli.fit import fit_command
from penchant.cli.merge import merge_command
from penchant.cli.prepare import prepare_command
from penchant.cli.prompt import prompt_command
from penchant.cli.recommend import recommend_command
from penchant.errors import ConfigError, PenchantError, PenchantWarning
from penchant.files import disk_full

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A causal language model as a recommender.",
)
app.command("fetch")(fetch_command)
app.command("prepare")(prepare_command)
app.command("fit")(fit_command)
app.command("finetune", context_settings=SETTINGS)(finetune_command)
app.command("merge")(merge_command)
app.command("recommend")(recommend_command)
app.command("batch")(batch_command)
app.command("evaluate")(evaluate_command)
app.command("prompt")(prompt_command)
app.command("doctor")(doctor_command)
app.command("demo")(demo_command)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"penchant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """A causal language model as a recommender."""


_plain_warning = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One of ours is for the user and says it all; a library's is of the code, so its place belongs to it."""
    if issubclass(category, PenchantWarning):
        return f"warning: {message}\n"
    return _plain_warning(message, category, filename, lineno, line)


def main() -> None:
    """Run a verb. A mistake of the user's is one message on stderr and exit code 2; a bug keeps its traceback."""
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a title that the terminal cannot show is no reason to stop
    try:
        for argument in sys.argv[1:]:
            if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
                raise ConfigError("not UTF-8", where=f"argument {argument!r}", remedy="rename the file or folder")
        app()
    except PenchantError as error:
        err.print(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if "No usable temporary directory" in str(error):  # libraries look for one when they are imported
            err.print(
                f"error: temporary folder: no room to write it ({error})\n  remedy: free disk space, or set TMPDIR"
            )
            sys.exit(2)
        if not disk_full(error):
            raise
        err.print(f"error: stdout: no room to write it ({error})\n  remedy: free disk space and run it again")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain once more when it flushes at its end
        sys.exit(2)
