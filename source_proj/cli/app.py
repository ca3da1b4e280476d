"""The application: commands in order of use. Each loads what it needs when it runs, so that help is at once."""

from importlib.metadata import version
from typing import Annotated

import typer

from source_proj.cli import append, bank, cluster, condense, curate, demo, explore, inspect, output, score

__all__ = ["app", "main"]

app = typer.Typer(
    name="source-proj",
    help="Which training examples made the model say this? SOURCE in a random-projection feature bank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done; 1 refused or failed (the bank, the data or the checkpoints are at fault); 2 not "
    "understood (an option, or what it names, is wrong). --debug before the command shows the traceback.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        output.say(version("source-proj"))
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 (its callback does the work)
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    output.debug.set(debug)
    context.obj = run  # which a submitted job calls


app.command("demo")(demo.demo)
app.command("plan")(bank.plan)
app.command("build")(bank.build)
app.command("append")(append.append)
app.command("finalize")(bank.finalize)
app.command("condense")(condense.condense)
app.command("status")(cluster.show_status)
# What stands behind its own options is another command's.
app.command(
    "submit",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(cluster.submit)
app.command("score")(score.score)
app.command("top-k")(score.top_k)
app.command("explore")(explore.explore)
app.add_typer(curate.app, name="curate")
app.command("inspect")(inspect.inspect)
app.command("verify")(inspect.verify)
app.command("clean")(inspect.clean)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    return int(app(arguments, standalone_mode=False) or 0)


def main() -> None:
    """Run the command line."""
    app()
