"""Which training examples made this model say that? EK-FAC influence functions for language models, answered from a stored index."""

from influence.config import Config, load_config
from influence.errors import RequestError
from influence.measurement import Measurement, measure_completion, measure_tokens
from influence.result import InfluenceResult, RankedSequence, report_page
from influence.run import QueryOptions, Run, open_run

__all__ = [
    "Config",
    "InfluenceResult",
    "Measurement",
    "QueryOptions",
    "RankedSequence",
    "RequestError",
    "Run",
    "load_config",
    "measure_completion",
    "measure_tokens",
    "open_run",
    "report_page",
]
