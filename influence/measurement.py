"""What is asked of the model: one number f for each query, whose change is explained.

Mostly a weighted sum of log-probabilities of tokens, in nats: of a completion, of some of its tokens, of the last turn of a conversation, the
difference between two completions, the mean over a set of queries or over a data set. Or another differentiable function of such sequences, as the
activation of a direction inside the model (`influence.directions`) or a user's own. Knows tokens, not models.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ekfac import SequenceBatch
from influence.chat import before_reply, check_template, written
from influence.errors import RequestError
from influence.sequences import TrainingSequence, encode_pair

Spans = tuple[tuple[int, int], ...]
"""Which of the completion's tokens count: (first, last + 1) of each stretch."""

SomeSpans = Sequence[int] | Sequence[Sequence[int]]
"""One span (first, last + 1), or several."""

Messages = list[dict[str, str]]
"""A conversation: `role` and `content` of each turn."""

Combination = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredFunction:
    """What is measured of a sequence when it is not the log-probability of its counted tokens."""

    values: Callable[
        [nn.Module, SequenceBatch], Tensor
    ]  # [N], with a graph: one number for each sequence of the batch, of that sequence alone
    unit: str
    facts: Mapping[str, Any]  # what it is, as JSON


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """f = Σ weight × log-probability of the counted tokens (or × the function's value) over its parts, of which the first is shown."""

    prompt: str
    completion: str  # of a set of queries or a data set: what it is called
    contrast: str | None
    span: Spans | None = None  # which of the completion's tokens, when not all
    input_ids: list[int] | None = None  # when tokens were asked for instead of text
    messages: Messages | None = None  # when the last turn of a conversation was asked about
    parts: tuple[tuple[float, TrainingSequence], ...]
    function: MeasuredFunction | None = None
    combined: Combination | None = None  # how `members` are, where this is a set
    members: "tuple[Member, ...]" = ()
    files: tuple[str, ...] = ()  # of the data set, where it is one
    family: str | None = None  # which queries of a report it belongs with

    @property
    def unit(self) -> str:
        return "nats" if self.function is None else self.function.unit

    @property
    def is_one_completion(self) -> bool:
        """Whether it is the log-probability of one whole completion, which the index's fidelity was measured for."""
        return len(self.parts) == 1 and self.span is None and self.function is None and not self.files and self.combined is None

    @property
    def counted_tokens(self) -> NDArray[np.int32] | None:
        """Of the completion that is asked about; None of a set."""
        shown = self.parts[0][1]
        return None if self.combined or self.files else shown.tokens[shown.counted]

    @property
    def text(self) -> str:
        """What a lexical search would look for."""
        if self.members:
            return "\n".join(member.measurement.text for member in self.members)
        return "" if self.files else self.prompt + self.completion


@dataclass(frozen=True, kw_only=True)
class Member:
    """A query of a set that is asked as one."""

    name: str
    weight: float
    measurement: Measurement


def measure_completion(
    tokenizer: Any,
    prompt: str,
    completion: str,
    *,
    contrast: str | None = None,
    span: SomeSpans | None = None,
    longest: int | None = None,
) -> Measurement:
    """The log-probability of `completion` after `prompt`, less that of `contrast` when it is given.

    `span` (first, last + 1), or several of them, restricts it to these tokens of the completion. Raises RequestError for a query without a token to
    count, or longer than `longest` tokens.
    """
    if not completion:
        raise RequestError("the completion is empty: there is nothing to explain")
    spans = None if span is None else spans_of(span)
    parts = [(1.0, _query_sequence(tokenizer, prompt, completion, spans, longest))]
    if contrast is not None:
        if spans is not None:
            raise RequestError("a span counts tokens of one completion: it does not go with a contrast")
        if not contrast or contrast == completion:
            raise RequestError("the contrast must be another completion, not empty and not the same")
        parts.append((-1.0, _query_sequence(tokenizer, prompt, contrast, None, longest)))
    return Measurement(prompt=prompt, completion=completion, contrast=contrast, span=spans, parts=tuple(parts))


def spans_of(span: SomeSpans) -> Spans:
    """One span (A, B), or several, as a tuple of them. Raises RequestError for anything else, and for none."""
    several = [span] if len(span) == 2 and all(isinstance(end, int) for end in span) else list(span)
    found = tuple((one[0], one[1]) for one in several if isinstance(one, Sequence) and len(one) == 2)
    if (
        not found
        or len(found) < len(several)
        or not all(isinstance(end, int) and not isinstance(end, bool) for one in found for end in one)
    ):
        raise RequestError(f"a span is two whole numbers, such as [0, 3], or a list of such spans; got {span!r}")
    return found


def measure_tokens(tokenizer: Any, ids: list[int], *, longest: int | None = None) -> Measurement:
    """The log-probability of all tokens after the first."""
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(tokenizer) for i in ids):
        raise RequestError(f"input_ids must be whole numbers from 0 to {len(tokenizer) - 1}")
    counted = np.arange(len(ids)) > 0
    text = str(tokenizer.decode(ids))
    sequence = _checked(_sequence(ids, counted, text), longest)
    return Measurement(prompt="", completion=text, contrast=None, input_ids=ids, parts=((1.0, sequence),))


def measure_messages(tokenizer: Any, messages: Messages, *, span: SomeSpans | None = None, longest: int | None = None) -> Measurement:
    """The log-probability of a conversation's last turn, the assistant's, as the tokenizer's chat template writes it, after all that comes before.

    The turn begins where the template's prompt for a reply ends, and so holds the mark of its end, where the template writes one. Raises RequestError
    for a tokenizer without a template, a conversation that the template refuses, and one that does not end with the assistant.
    """
    _check_messages(messages)
    check_template(tokenizer)
    whole = written(tokenizer, messages)
    before = before_reply(tokenizer, messages[:-1], whole)
    if before is None:
        raise RequestError("the chat template writes a conversation otherwise once the last turn is there: give prompt and completion")
    completion, spans = whole[len(before) :], None if span is None else spans_of(span)
    part = _query_sequence(tokenizer, before, completion, spans, longest, special_tokens=False)
    return Measurement(prompt=before, completion=completion, contrast=None, span=spans, messages=messages, parts=((1.0, part),))


def _check_messages(messages: Messages) -> None:
    expected = 'expected a list such as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages: {expected}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestError(f"messages: {expected}; got {message!r}")
    if messages[-1]["role"] != "assistant":
        raise RequestError(f"messages: the last turn is explained, and must be the assistant's, not the {messages[-1]['role']}'s")


def measure_sequences(sequences: Sequence[TrainingSequence], files: Sequence[str]) -> Measurement:
    """The mean log-probability of a counted token of a data set: minus its loss. Raises RequestError when there is none."""
    num_counted = sum(int(sequence.counted.sum()) for sequence in sequences)
    if num_counted == 0:
        raise RequestError(f"{', '.join(files)}: no token to count: the data set is empty, or every text has fewer than two tokens")
    parts = tuple((1 / num_counted, sequence) for sequence in sequences if sequence.counted.any())
    called = f"mean log-probability of a token of {', '.join(files)}"
    return Measurement(prompt="", completion=called, contrast=None, files=tuple(files), parts=parts)


def combine(members: Sequence[Member], combined: Combination) -> Measurement:
    """The weighted mean or sum of several measurements as one. Raises RequestError for none, for weights that give no mean, and for unlike ones."""
    if not members:
        raise RequestError("the set of queries is empty")
    weights = [member.weight for member in members]
    if not all(math.isfinite(weight) for weight in weights) or (combined == "mean" and min(weights) < 0) or not any(weights):
        kind = "numbers of at least 0" if combined == "mean" else "numbers"
        raise RequestError(f"the weights of a set must be {kind}, and not all 0; got {', '.join(f'{weight:g}' for weight in weights[:5])}")
    if len({member.measurement.function for member in members}) > 1:
        raise RequestError("queries of a set must measure the same: all log-probabilities, or one function")
    scale = 1 / sum(weights) if combined == "mean" else 1.0
    parts = tuple((scale * member.weight * weight, sequence) for member in members for weight, sequence in member.measurement.parts)
    return Measurement(
        prompt="",
        completion=f"{combined} of {len(members)} queries",
        contrast=None,
        parts=parts,
        function=members[0].measurement.function,
        combined=combined,
        members=tuple(members),
    )


def with_function(measurement: Measurement, function: MeasuredFunction) -> Measurement:
    """The same sequences, of which the function is measured instead of the log-probability."""
    if measurement.contrast is not None:
        raise RequestError(f"{function.unit} is measured on one completion: it does not go with a contrast")
    return replace(measurement, function=function)


def query_facts(
    measurement: Measurement,
    log_probabilities: Sequence[NDArray[np.float64]],
    values: Sequence[float] | None,
    token_texts: Callable[[NDArray[np.int32]], list[str]],
) -> dict[str, Any]:
    """What was asked, and what the model made of it, as JSON; `log_probabilities` are [T] and `values` the function's, both for each part."""
    facts: dict[str, Any] = {"prompt": measurement.prompt, "completion": measurement.completion}
    for name in ("contrast", "input_ids", "messages", "combined", "family"):
        if getattr(measurement, name) is not None:
            facts[name] = getattr(measurement, name)
    if measurement.span is not None:
        facts["span"] = measurement.span[0] if len(measurement.span) == 1 else measurement.span
    if measurement.files:
        facts |= {"data": list(measurement.files), "sequences": len(measurement.parts)}
    weights = [weight for weight, _ in measurement.parts]
    facts["log_probability"] = float(sum(weight * part.sum() for weight, part in zip(weights, log_probabilities, strict=True)))
    if measurement.function is not None and values is not None:
        value = float(sum(weight * one for weight, one in zip(weights, values, strict=True)))
        facts["measured"] = {**measurement.function.facts, "unit": measurement.function.unit, "value": value}
    if measurement.combined or measurement.files:
        members = [
            {"id": member.name, "weight": member.weight} | query_facts(member.measurement, own, of_function, token_texts)
            for member, own, of_function in _by_member(measurement, log_probabilities, values)
        ]
        return (
            facts | ({"queries": [_brief(member) for member in members]} if members else {}) | {"tokens": [], "token_log_probabilities": []}
        )
    shown = measurement.parts[0][1]
    return facts | {
        "tokens": token_texts(shown.tokens),
        "token_log_probabilities": [
            float(value) if counted else None for value, counted in zip(log_probabilities[0], shown.counted, strict=True)
        ],
    }


def question(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of `query_facts`, what was asked, without what the model made of it, which may differ in the last digits."""
    asked = {key: value for key, value in facts.items() if key not in ("log_probability", "token_log_probabilities")}
    if "measured" in asked:
        asked["measured"] = {key: value for key, value in asked["measured"].items() if key != "value"}
    return asked | ({"queries": [question(one) for one in asked["queries"]]} if "queries" in asked else {})


def _brief(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("tokens", "token_log_probabilities")}


def _by_member(
    measurement: Measurement, log_probabilities: Sequence[NDArray[np.float64]], values: Sequence[float] | None
) -> Iterator[tuple[Member, Sequence[NDArray[np.float64]], Sequence[float] | None]]:
    start = 0
    for member in measurement.members:
        own = slice(start, start + len(member.measurement.parts))
        yield member, log_probabilities[own], None if values is None else values[own]
        start = own.stop


def _query_sequence(
    tokenizer: Any, prompt: str, completion: str, spans: Spans | None, longest: int | None, *, special_tokens: bool = True
) -> TrainingSequence:
    try:
        (prompt + completion).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the query holds half a character at {error.start} (a lone surrogate), which no tokenizer takes") from None
    ids, inside = encode_pair(tokenizer, prompt, completion, special_tokens=special_tokens)
    counted = np.array(inside, dtype=np.bool_)
    counted[:1] = False
    if spans is not None:
        places = np.flatnonzero(inside)
        chosen = np.zeros_like(counted)
        for first, end in spans:
            if not 0 <= first < end <= len(places):
                raise RequestError(f"the span {first}:{end} does not lie within the completion's {len(places)} tokens")
            chosen[places[first:end]] = True
        counted &= chosen
    return _checked(_sequence(ids, counted, prompt + completion), longest)


def _sequence(ids: list[int], counted: NDArray[np.bool_], text: str) -> TrainingSequence:
    return TrainingSequence(id="query", document="query", tokens=np.array(ids, np.int32), counted=counted, text=text, metadata={})


def _checked(sequence: TrainingSequence, longest: int | None) -> TrainingSequence:
    if len(sequence.tokens) == 0:
        raise RequestError("the query has no tokens: there is nothing to explain")
    if not sequence.counted.any():
        raise RequestError("the query has no token to count: nothing comes before its only token; give a prompt, or a longer completion")
    if longest is not None and len(sequence.tokens) > longest:
        raise RequestError(f"the query has {len(sequence.tokens)} tokens, more than the model's {longest} positions: shorten the prompt")
    return sequence
