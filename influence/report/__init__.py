"""Self-contained HTML pages: which training sequences moved a model's completions, and how far to trust it; and the health of a training set."""

from influence.report.render import render_health, render_report

__all__ = ["render_health", "render_report"]
