"""Command line: ``source-proj plan | build | finalize | status | submit | score | top-k | inspect | verify | demo``."""

from source_proj.cli.app import app, main

__all__ = ["app", "main"]
