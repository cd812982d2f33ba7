"""The command line: one module a verb. Heavy libraries are imported inside the verb that needs them."""

from __future__ import annotations

import typer

from penchant import __version__
from penchant.cli.batch import batch_command
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
from penchant.cli.script import script

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


def main() -> None:
    """Run a verb."""
    script(app)
