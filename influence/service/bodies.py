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
    {"prompt": "The capital of France is", "completion": " Paris, of course", "span": [[0, 1], [3, 4]], "by_output_token": True},
    {"messages": [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris"}]},
    {
        "queries": [{"prompt": "The capital of France is", "completion": " Paris"}, {"text": "Paris is in France.", "weight": 2.0}],
        "as_one": "mean",
    },
]

Span = Annotated[list[int], Field(min_length=2, max_length=2)]


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Annotated[str, Field(max_length=100)]
    content: Text


Messages = Annotated[list[Message], Field(min_length=1, max_length=1_000)]


class MemberBody(BaseModel):
    """A query of a set that is asked as one: `prompt` and `completion`, or `text`, or `messages`, or `input_ids`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Text | None = Field(None, description="what it is called in the result; its number when left out")
    weight: Annotated[float, Field(allow_inf_nan=False)] = Field(1.0, description="its weight in the mean or sum")
    prompt: Text | None = None
    completion: Text | None = None
    text: Text | None = None
    messages: Messages | None = None
    input_ids: Annotated[list[int], Field(max_length=LONGEST_TEXT)] | None = None

    @model_validator(mode="after")
    def one_kind_of_question(self) -> "MemberBody":
        _check_one_kind(self, ("text", "messages", "input_ids"), "prompt and completion, or text, or messages, or input_ids")
        return self


class QueryBody(BaseModel):
    """A query, with the names and meanings of the command line: `prompt` and `completion`, or `text`, or `messages`, or `input_ids`; or `queries`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": EXAMPLES})

    prompt: Text | None = Field(None, description="what came before the completion")
    completion: Text | None = Field(None, description="what the model said")
    text: Text | None = Field(None, description="instead of both: a text that is the completion as a whole")
    input_ids: Annotated[list[int], Field(max_length=LONGEST_TEXT)] | None = Field(None, description="instead of text: tokens")
    messages: Messages | None = Field(
        None, description="instead of text: a conversation, of which the last turn, the assistant's, is asked about; by the chat template"
    )
    queries: Annotated[list[MemberBody], Field(min_length=1, max_length=1_000)] | None = Field(
        None, description="instead of one query: a set that is asked as one"
    )
    as_one: Literal["mean", "sum"] = Field("mean", description="how `queries` are combined, each by its weight")
    contrast: Text | None = Field(None, description="another completion: explain the difference of the two log-probabilities")
    span: Span | Annotated[list[Span], Field(min_length=1, max_length=1_000)] | None = Field(
        None, description="[A, B]: only tokens A to B-1 of the completion; or a list of such spans"
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
    by_output_token: bool = Field(
        False, description="split scores over the tokens that were to be predicted, instead of those that were read"
    )
    also: Annotated[list[Text], Field(max_length=20)] = Field(
        default_factory=list, description="average the scores with these runs of the same service"
    )

    @model_validator(mode="after")
    def one_kind_of_question(self) -> "QueryBody":
        kinds = ("text", "messages", "input_ids", "queries")
        _check_one_kind(self, kinds, "prompt and completion, or text, or messages, or input_ids, or queries")
        if self.completion is None and (self.contrast is not None or (self.span is not None and self.messages is None)):
            raise ValueError("contrast and span go with prompt and completion")
        if self.queries is None and self.as_one != "mean":
            raise ValueError("as_one goes with queries")
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
            by_output_token=self.by_output_token,
        )


def _check_one_kind(body: Any, others: tuple[str, ...], expected: str) -> None:
    given = [name for name in others if getattr(body, name) is not None]
    if body.completion is not None:
        given.append("completion")
    if len(given) != 1 or (body.prompt is not None and body.completion is None):
        raise ValueError(f"give {expected}")


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
    health: bool = Field(False, description="whether `influence health` has measured its training set")
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
    documents: list[dict[str, Any]] = Field(
        description="what stands in it, in order: id; tokens of the sequence, [first, last + 1]; span, the same of characters of the document, null "
        "where it came as token ids; window and windows, which of the document's sequences it is, of how many"
    )
    sequences_of_document: list[str]


class LayerReport(BaseModel):
    """Every attributed layer with what its factors are like, and what is left out and why."""

    layers: list[dict[str, Any]]
    excluded: dict[str, str]
    parameters_attributed: float


class TrainingSetHealth(BaseModel):
    """The object of `influence health --json`, with when it was measured."""

    model_config = ConfigDict(extra="allow")

    run: str
    created: str = Field(description="the day on which it was measured")
    about: dict[str, Any] = Field(description="what influence is on: the training set itself, or queries")
    sequences: int
    tokens: int = Field(description="counted ones")
    loss: float = Field(description="nats a token")


class TokensBody(BaseModel):
    """A question whose tokens are wanted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": EXAMPLES[:1]})

    prompt: Text = Field("", description="what came before the completion")
    completion: Text = Field(description="what the model said")


class QuestionTokens(BaseModel):
    """The tokens of prompt and completion as texts. `span` of a query counts those of the completion."""

    prompt: list[str] = Field(description="those that end before the completion")
    completion: list[str] = Field(description="those that reach into the completion")


class ResultWords(BaseModel):
    """What a result rests on, in sentences for people, as its HTML report has them."""

    trust: list[str] = Field(description="what was approximated, what was searched, and how well that is known")
    distribution: str = Field(description="how concentrated the influence is; empty when unknown")
    bm25: str = Field(description="how far lexical search agrees; empty when it was not asked")


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
