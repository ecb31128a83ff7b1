"""The report: one self-contained HTML page that shows which training sequences moved a model's completions, and how far to trust it."""

from influence.report.render import render_report

__all__ = ["render_report"]
