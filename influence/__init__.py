"""Which training examples made this model say that? EK-FAC influence functions for language models, answered from a stored index."""

from influence.answering import QueryOptions, answer, answer_both_ends
from influence.client import AsyncClient, Client, ServerFailure, ServerRefusal
from influence.config import Config, load_config
from influence.errors import RequestError
from influence.health import Health
from influence.measurement import Measurement, Member, combine, measure_completion, measure_messages, measure_tokens, with_function
from influence.optimizer_state import save_optimizer_state
from influence.refinement import RefineOptions
from influence.report import Report
from influence.result import InfluenceResult, RankedSequence, query_report, report_page
from influence.run import Run, open_run

__all__ = [
    "AsyncClient",
    "Client",
    "Config",
    "Health",
    "InfluenceResult",
    "Measurement",
    "Member",
    "QueryOptions",
    "RankedSequence",
    "RefineOptions",
    "Report",
    "RequestError",
    "Run",
    "ServerFailure",
    "ServerRefusal",
    "answer",
    "answer_both_ends",
    "combine",
    "load_config",
    "measure_completion",
    "measure_messages",
    "measure_tokens",
    "open_run",
    "query_report",
    "report_page",
    "save_optimizer_state",
    "with_function",
]
