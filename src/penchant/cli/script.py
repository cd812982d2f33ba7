"""How a program ends: a mistake of the user's is one message on stderr and exit code 2; a bug keeps its traceback."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable

import typer

from penchant.cli.console import err
from penchant.errors import ConfigError, PenchantError, PenchantWarning
from penchant.files import disk_full, is_text

_plain_warning = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One of ours is for the user and says it all; a library's is of the code, so its place belongs to it."""
    if issubclass(category, PenchantWarning):
        return f"warning: {message}\n"
    return _plain_warning(message, category, filename, lineno, line)


def script(main: Callable[..., None]) -> None:
    """Run a program, a typer app or a function whose parameters are its options, with the process's arguments."""
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a title that the terminal cannot show is no reason to stop
    try:
        for argument in sys.argv[1:]:
            if not is_text(argument):
                raise ConfigError("not UTF-8", where=f"argument {argument!r}", remedy="rename the file or folder")
        main() if isinstance(main, typer.Typer) else typer.run(main)
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
        where = error.filename or "stdout"
        err.print(f"error: {where}: no room to write it ({error})\n  remedy: free disk space and run it again")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain once more when it flushes at its end
        sys.exit(2)
