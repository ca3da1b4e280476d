"""The application: commands in order of use."""

from importlib.metadata import version
from typing import Annotated

import typer

from source_proj.cli import bank, curate, demo, inspect, output, score

__all__ = ["app", "main"]

app = typer.Typer(
    name="source-proj",
    help="Which training examples made the model say this? SOURCE in a random-projection feature bank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        output.say(version("source-proj"))
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 (its callback does the work)
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    output.debug.set(debug)


app.command("demo")(demo.demo)
app.command("build")(bank.build)
app.command("finalize")(bank.finalize)
app.command("score")(score.score)
app.command("top-k")(score.top_k)
app.add_typer(curate.app, name="curate")
app.command("inspect")(inspect.inspect)
app.command("verify")(inspect.verify)
app.command("clean")(inspect.clean)


def main() -> None:
    """Run the command line."""
    app()
