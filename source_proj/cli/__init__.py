"""Command line: ``source-proj plan | build | status | submit | score | top-k | explore | inspect | verify | demo``."""

from source_proj.cli.app import app, main

__all__ = ["app", "main"]
