"""The page of a run: `build_report(run_dir)` writes report.html and curves.png from the run's own files."""

from finetune.report.build import Report, build_report

__all__ = ["Report", "build_report"]
