"""What requests and responses hold: one declaration for checking, for the messages of refusals, and for OpenAPI."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from influence.answering import QueryOptions
from influence.refinement import RefineOptions

LONGEST_TEXT = 200_000

Text = Annotated[str, Field(max_length=LONGEST_TEXT)]

EXAMPLES: list[JsonValue] = [
    {"prompt": "The capital of France is", "completion": " Paris"},
    {"prompt": "The capital of France is", "completion": " Paris", "k": 5, "contrast": " Lyon", "bm25": True},
    {"prompt": "The capital of France is", "completion": " Paris", "exact": True, "where": "source = 'web' and year < 2023"},
    {"text": "The whole text is what is asked about.", "opponents": True},
    {"input_ids": [464, 3139, 286, 4881]},
]


class QueryBody(BaseModel):
    """A query, with the names and meanings of the command line: `prompt` and `completion`, or `text`, or `input_ids`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": EXAMPLES})

    prompt: Text | None = Field(None, description="what came before the completion")
    completion: Text | None = Field(None, description="what the model said")
    text: Text | None = Field(None, description="instead of both: a text that is the completion as a whole")
    input_ids: Annotated[list[int], Field(max_length=LONGEST_TEXT)] | None = Field(None, description="instead of text: tokens")
    contrast: Text | None = Field(None, description="another completion: explain the difference of the two log-probabilities")
    span: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[A, B]: only tokens A to B-1 of the completion"
    )
    k: int = Field(10, ge=1, description="how many sequences")
    opponents: bool = Field(False, description="the most negative sequences instead of the most positive")
    both_ends: bool = Field(
        False, description="the most positive sequences as `results` and the most negative ones beside them as `opponents`"
    )
    exact: bool = Field(False, description="scan all sequences instead of the index's candidates; such a query is accepted and queued")
    candidates: int | None = Field(None, ge=1, description="how many of the index's best are reranked exactly")
    layers: Annotated[list[Text], Field(max_length=1_000)] = Field(
        default_factory=list, description="only layers that match one of these globs"
    )
    where: Text | None = Field(None, description="only sequences whose metadata fulfil this condition")
    normalize: bool = Field(False, description="divide each score by √self-influence of its sequence (RelatIF)")
    refine: bool = Field(False, description="solve with the exact Gauss-Newton Hessian; such a query is accepted and queued")
    refine_steps: int = Field(RefineOptions.steps, ge=1, description="at most so many conjugate-gradient steps")
    refine_sequences: int = Field(
        RefineOptions.sequences, ge=1, description="over how many training sequences the exact Hessian is averaged"
    )
    bm25: bool = Field(False, description="lexical search beside influence")
    also: Annotated[list[Text], Field(max_length=20)] = Field(
        default_factory=list, description="average the scores with these runs of the same service"
    )

    @model_validator(mode="after")
    def one_kind_of_question(self) -> "QueryBody":
        given = [name for name in ("text", "input_ids") if getattr(self, name) is not None]
        if self.completion is not None:
            given.append("completion")
        if len(given) != 1 or (self.prompt is not None and self.completion is None):
            raise ValueError("give prompt and completion, or text, or input_ids")
        if self.completion is None and (self.contrast is not None or self.span is not None):
            raise ValueError("contrast and span go with prompt and completion")
        if self.both_ends and self.opponents:
            raise ValueError("both_ends gives the opponents too: leave opponents out")
        if not self.refine and (self.refine_steps, self.refine_sequences) != (RefineOptions.steps, RefineOptions.sequences):
            raise ValueError("refine_steps and refine_sequences go with refine")
        return self

    @property
    def takes_long(self) -> bool:
        """Whether the index and a rerank do not suffice."""
        return self.exact or self.refine

    def options(self) -> QueryOptions:
        """How it is answered. Raises RequestError for options that contradict each other."""
        return QueryOptions(
            k=self.k,
            opponents=self.opponents,
            exact=self.exact,
            layers=tuple(self.layers),
            candidates=self.candidates,
            where=self.where,
            normalize=self.normalize,
            refine=RefineOptions(steps=self.refine_steps, sequences=self.refine_sequences) if self.refine else None,
            bm25=self.bm25,
        )


State = Literal["queued", "running", "done", "failed", "cancelled"]


class Failure(BaseModel):
    code: str = Field(description="for programs", examples=["not_found"])
    message: str = Field(description="for people: what arrived, what was expected, what to do")


class ErrorBody(BaseModel):
    """Every answer that is not the one asked for."""

    error: Failure


class QueryState(BaseModel):
    """A query that was accepted: where it stands, and its result when it is done."""

    id: str
    run: str
    state: State
    created: float = Field(description="seconds since 1970")
    finished: float | None = None
    progress: dict[str, int] = Field(description="done and total, in units of the work under way", examples=[{"done": 512, "total": 1580}])
    request: dict[str, Any] = Field(description="the body it was asked with")
    result: dict[str, Any] | None = Field(None, description="the object of `influence query --json`")
    error: Failure | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "3f0c4a4dc6a84a5b8a3f5d0a7b1f2c11",
                    "run": "demo",
                    "state": "running",
                    "created": 1789000000.0,
                    "finished": None,
                    "progress": {"done": 512, "total": 1580},
                    "request": {"prompt": "The capital of France is", "completion": " Paris", "exact": True},
                    "result": None,
                    "error": None,
                }
            ]
        }
    )


class Result(BaseModel):
    """The object of `influence query --json`: `run` in its provenance is the run's name, `id` is where it can be found again."""

    model_config = ConfigDict(extra="allow")

    id: str
    unit: str
    query: dict[str, Any]
    results: list[dict[str, Any]]
    opponents: list[dict[str, Any]] | None = None
    coverage: dict[str, Any]
    provenance: dict[str, Any]
    distribution: dict[str, Any]
    bm25: dict[str, Any] | None = None


class RunFacts(BaseModel):
    """What is served under a name. `state`: available, loaded, or unusable with the reason as `error`."""

    name: str
    state: Literal["available", "loaded", "unusable"]
    error: str | None = None
    sequences: int | None = Field(None, description="how many are searched")
    training_sequences: int | None = None
    metadata: list[str] = Field(default_factory=list, description="columns that `where` may name")
    sequence_length: int | None = None
    damping: Any = None
    coverage: dict[str, Any] | None = None
    fidelity: dict[str, Any] | None = Field(None, description="how close the index was measured to come to exact EK-FAC")
    fingerprints: dict[str, str] | None = None
    limits: dict[str, int] | None = Field(None, description="the largest k, candidates and number of tokens of a query")


class RunList(BaseModel):
    runs: list[RunFacts]


class SequenceFacts(BaseModel):
    """A training sequence, and the sequences of its document in their order."""

    id: str
    text: str
    metadata: dict[str, Any]
    num_tokens: int
    document: str
    sequences_of_document: list[str]


class LayerReport(BaseModel):
    """Every attributed layer with what its factors are like, and what is left out and why."""

    layers: list[dict[str, Any]]
    excluded: dict[str, str]
    parameters_attributed: float


class Health(BaseModel):
    status: Literal["ok", "loading", "stopping"]


class QueryList(BaseModel):
    queries: list[QueryState]


class Example(BaseModel):
    sequence: str = Field(description="id of the training sequence it is made of")
    prompt: str
    completion: str


class Examples(BaseModel):
    examples: list[Example]
