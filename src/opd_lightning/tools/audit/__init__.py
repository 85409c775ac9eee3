"""`opd audit`: what each objective's gradient follows, by exact enumeration."""

from opd_lightning.tools.audit.judge import Finding, audit
from opd_lightning.tools.audit.names import audited_objectives, objective_from
from opd_lightning.tools.audit.report import as_json, as_markdown, as_table, write_page

__all__ = [
    "Finding",
    "as_json",
    "as_markdown",
    "as_table",
    "audit",
    "audited_objectives",
    "objective_from",
    "write_page",
]
