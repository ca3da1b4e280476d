"""The command line: ``source-proj COMMAND``."""

from source_proj.cli.app import app, main

__all__ = ["app", "main"]
