"""A page to look around in: queries, training examples, and who helped or harmed whom (``explore`` extra)."""

from source_proj.report.explore.server import application, serve
from source_proj.report.explore.state import Explorer
from source_proj.report.explore.static import require_writable, write_static

__all__ = ["Explorer", "application", "require_writable", "serve", "write_static"]
