"""Reports: what moved a model's completions, and how far to trust it; what a run is; the health of a training set. As pages, JSON and tables."""

from influence.report.render import render_health, render_report, render_run
from influence.report.report import Report

__all__ = ["Report", "render_health", "render_report", "render_run"]
