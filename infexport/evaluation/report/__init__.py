"""A judgement of parity as one page, which needs nothing but a browser, or paper."""

from infexport.evaluation.report.page import check_report, write_report

__all__ = ["check_report", "write_report"]
