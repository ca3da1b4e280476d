"""``python -m source_proj`` is ``source-proj``, for where scripts are not on the path."""

from source_proj.cli import app

__all__: list[str] = []

if __name__ == "__main__":
    app(prog_name="source-proj")
