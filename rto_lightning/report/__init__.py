"""One page on what the stages of a pipeline have come to: curves, tables, answers before and after training."""

from rto_lightning.report.page import ReportedStage, write_report

__all__ = ["ReportedStage", "write_report"]
