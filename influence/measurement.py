"""What is asked of the model: a weighted sum of log-probabilities of tokens, in nats.

A completion's log-probability, some of its tokens only, or the difference between two completions of one prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from influence.errors import RequestError
from influence.sequences import TrainingSequence, encode_pair


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """f = Σ weight × log-probability of the counted tokens, over one or two sequences of which the first is the one that is shown."""

    prompt: str
    completion: str
    contrast: str | None
    span: tuple[int, int] | None = None  # which of the completion's tokens, when not all
    input_ids: list[int] | None = None  # when tokens were asked for instead of text
    parts: tuple[tuple[float, TrainingSequence], ...]


def measure_completion(
    tokenizer: Any,
    prompt: str,
    completion: str,
    *,
    contrast: str | None = None,
    span: tuple[int, int] | None = None,
    longest: int | None = None,
) -> Measurement:
    """The log-probability of `completion` after `prompt`, less that of `contrast` when it is given.

    `span` (first, last + 1) restricts it to these tokens of the completion. Raises RequestError for a query without a token to count, or longer
    than `longest` tokens.
    """
    if not completion:
        raise RequestError("the completion is empty: there is nothing to explain")
    parts = [(1.0, _query_sequence(tokenizer, prompt, completion, span, longest))]
    if contrast is not None:
        if span is not None:
            raise RequestError("a span counts tokens of one completion: it does not go with a contrast")
        if not contrast or contrast == completion:
            raise RequestError("the contrast must be another completion, not empty and not the same")
        parts.append((-1.0, _query_sequence(tokenizer, prompt, contrast, None, longest)))
    return Measurement(prompt=prompt, completion=completion, contrast=contrast, span=span, parts=tuple(parts))


def measure_tokens(tokenizer: Any, ids: list[int], *, longest: int | None = None) -> Measurement:
    """The log-probability of all tokens after the first."""
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(tokenizer) for i in ids):
        raise RequestError(f"input_ids must be whole numbers from 0 to {len(tokenizer) - 1}")
    counted = np.arange(len(ids)) > 0
    text = str(tokenizer.decode(ids))
    sequence = _checked(
        TrainingSequence(id="query", document="query", tokens=np.array(ids, np.int32), counted=counted, text=text, metadata={}), longest
    )
    return Measurement(prompt="", completion=text, contrast=None, input_ids=ids, parts=((1.0, sequence),))


def _query_sequence(tokenizer: Any, prompt: str, completion: str, span: tuple[int, int] | None, longest: int | None) -> TrainingSequence:
    try:
        (prompt + completion).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the query holds half a character at {error.start} (a lone surrogate), which no tokenizer takes") from None
    ids, inside = encode_pair(tokenizer, prompt, completion)
    counted = np.array(inside, dtype=np.bool_)
    counted[:1] = False
    if span is not None:
        places = np.flatnonzero(inside)
        first, end = span
        if not 0 <= first < end <= len(places):
            raise RequestError(f"the span {first}:{end} does not lie within the completion's {len(places)} tokens")
        chosen = np.zeros_like(counted)
        chosen[places[first:end]] = True
        counted &= chosen
    text = prompt + completion
    return _checked(
        TrainingSequence(id="query", document="query", tokens=np.array(ids, np.int32), counted=counted, text=text, metadata={}), longest
    )


def _checked(sequence: TrainingSequence, longest: int | None) -> TrainingSequence:
    if len(sequence.tokens) == 0:
        raise RequestError("the query has no tokens: there is nothing to explain")
    if not sequence.counted.any():
        raise RequestError("the query has no token to count: nothing comes before its only token; give a prompt, or a longer completion")
    if longest is not None and len(sequence.tokens) > longest:
        raise RequestError(f"the query has {len(sequence.tokens)} tokens, more than the model's {longest} positions: shorten the prompt")
    return sequence
