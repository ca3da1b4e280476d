"""Report: attribution as one self-contained HTML page (needs the ``demo`` extra: jinja2 and Pillow)."""

from source_proj._io.pictures import image_uri
from source_proj.bank.examples import Example
from source_proj.report.content import Attribution, Check, MethodLists, Page, QuerySection
from source_proj.report.page import make_hits_page, make_page, render, write_report

__all__ = [
    "Attribution",
    "Check",
    "Example",
    "MethodLists",
    "Page",
    "QuerySection",
    "image_uri",
    "make_hits_page",
    "make_page",
    "render",
    "write_report",
]
