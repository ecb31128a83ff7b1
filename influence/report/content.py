"""From a report's plain JSON to what the page holds: text for the template, which escapes it, and numbers for the diagrams.

Knows nothing of HTML. The hundreds of thousands of scores by token and by layer travel in two characters each (see `packed`), which
is what keeps a large report small; all others are numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from influence.report import layers as layer_names
from influence.report import spelling, words

_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_LEVELS = 2047
_DECADES = 5
_TAIL_POINTS = 64
_BRIEF = 90  # characters of a prompt that the table of contents shows
_MEMBERS = 50  # queries of a set that are listed
_MODULES = 10  # kinds of module are split into modules up to this many
_PARTS = ("heading", "helped", "hurt", "layers", "training-set", "trust")  # anchors the template makes in every query


def content(report: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`(queries for the template, data for the script)`, in the same order.

    Raises ValueError where something needed is missing or a number is not finite.
    """
    taken: set[str] = set()
    pages, data, layer_lists = [], [], []
    for number, query in enumerate(_need(report, "queries", "the report"), start=1):
        page, numbers, names = _query(query, number, taken)
        if names not in layer_lists:
            layer_lists.append(names)
        pages.append(page)
        data.append({**numbers, "layers": layer_lists.index(names)})
    return pages, {"layers": layer_lists, "queries": data}


def packed(values: Sequence[float]) -> dict[str, Any]:
    """`{"scale", "codes"}`: two base64 digits a value, 12 bits. The high bit is the sign; the other 11 are 0 for nothing, else m with
    size = scale × 10^(−5 (2047 − m) / 2047). A size is kept to 0.3%; one below 10⁻⁵ of the largest is nothing."""
    scale = max((abs(value) for value in values), default=0.0)
    return {"scale": _short(scale, 7), "codes": "".join(_code(value / scale) if value else "AA" for value in values)}


def _code(relative: float) -> str:
    size = abs(relative)
    level = round(_LEVELS * (1 + math.log10(size) / _DECADES)) if size else 0
    bits = 0 if level < 1 else level + (_LEVELS + 1 if relative < 0 else 0)
    return _BASE64[bits >> 6] + _BASE64[bits & 63]


def _query(query: Mapping[str, Any], number: int, taken: set[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    name = str(query.get("id") or number)
    where = f"query {name!r}"
    here = _claim(spelling.anchor(f"query-{name}"), taken)
    taken.update(spelling.anchor(here, part) for part in _PARTS)
    asked = _need(query, "query", where)
    unit = str(query.get("unit", "nats"))
    sides = [("helped", _need(query, "results", where)), ("hurt", query.get("opponents") or [])]
    lexical = any(result.get("bm25_rank") is not None for _, results in sides for result in results)
    shown = {side: [_sequence(r, place, here, where, lexical, taken) for place, r in enumerate(rs, 1)] for side, rs in sides}
    columns = [numbers for sequences in shown.values() for _, numbers in sequences]
    results = [result for _, rs in sides for result in rs]
    by_layer = [{layer: _finite(v, where) for layer, v in (r.get("layers") or {}).items()} for r in results]
    names = layer_names.in_model_order(layer for result in results for layer in result.get("layers") or {})
    question, probabilities = _asked(asked, where)
    spread = _distribution(query.get("distribution"), where)
    page = {
        **question,
        "name": name,
        "anchor": here,
        "unit": unit,
        "helped": [page for page, _ in shown["helped"]],
        "hurt": [page for page, _ in shown["hurt"]],
        "has_tokens": any("widths" in column for column in columns),
        "has_layers": bool(names and columns),
        "has_blocks": any(layer_names.take_apart(layer).block is not None for layer in names),
        "num_layers": len(names),
        "modules": layer_names.modules_of_a_block(names),
        "lexical": lexical,
        "overlap": words.overlap(query.get("bm25")),
        "spread": spread,
        "tail_sentence": words.tail_sentence(spread) if spread else "",
        "memorised": words.memorised(query.get("distribution") or {}, query["results"], question["num_counted"]) if spread else "",
        "by_output": (query.get("provenance") or {}).get("tokens_by") == "output",
        "coverage": coverage_content(query.get("coverage") or {}, where),
        "trust": words.trust(query.get("provenance") or {}),
        "provenance": [(key.replace("_", " "), _fact(key, value)) for key, value in (query.get("provenance") or {}).items()],
    }
    numbers = {
        "unit": unit,
        "query": probabilities,
        "helped": len(shown["helped"]),
        "columns": columns,
        "cells": packed([scores.get(layer, 0.0) for scores in by_layer for layer in names]),
        "blocks": _sums(by_layer, names, layer_names.block_label(names)),
        "kinds": _by_kind(by_layer, names),
        "distribution": _plotted(spread) if spread else None,
    }
    return page, numbers, names


def _asked(asked: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The query's own text, split where counting begins, and its tokens' log-probabilities."""
    prompt, completion = str(asked.get("prompt") or ""), str(asked.get("completion") or "")
    tokens = [str(token) for token in asked.get("tokens") or []]
    counted = list(asked.get("token_log_probabilities") or [])
    probabilities: dict[str, Any] = {"widths": "", "log_probabilities": [], "joined": []}
    if tokens and len(tokens) == len(counted):
        parts = spelling.pieces(tokens, prompt + completion)
        each = _per_piece(parts, counted, where)
        texts = [spelling.shown(piece) for piece, _ in parts]
        first = next((place for place, value in enumerate(each) if value is not None), len(each))
        prompt, completion = "".join(texts[:first]), "".join(texts[first:])
        probabilities = {
            "widths": spelling.widths(texts),
            "log_probabilities": [None if value is None else _short(value) for value in each],
            "joined": _joined(parts),
        }
    else:
        prompt, completion = spelling.shown(prompt), spelling.shown(completion)
    total = asked.get("log_probability")
    number_counted = sum(value is not None for value in counted)
    known = {
        "prompt",
        "completion",
        "tokens",
        "token_log_probabilities",
        "log_probability",
        "id",
        "messages",
        "queries",
        "combined",
        "measured",
        "family",
    }
    page = {
        "prompt": prompt,
        "completion": completion,
        "brief_prompt": ("…" if len(prompt) > _BRIEF else "") + prompt[-_BRIEF:],
        "brief_completion": completion[:_BRIEF] + ("…" if len(completion) > _BRIEF else ""),
        "log_probability": None if total is None else words.number(_finite(total, where)),
        "per_token": None if total is None or not number_counted else words.number(math.exp(min(0.0, total / number_counted))),
        "num_counted": number_counted,
        "measured": words.measured(asked.get("measured")),
        "members": [_member(member, where) for member in (asked.get("queries") or [])[:_MEMBERS]],
        "more_members": max(0, len(asked.get("queries") or []) - _MEMBERS),
        "extras": [(key.replace("_", " "), words.plain(value)) for key, value in asked.items() if key not in known],
    }
    return page, probabilities


def _member(member: Mapping[str, Any], where: str) -> dict[str, str]:
    """A query of a set that was asked as one."""
    return {
        "name": spelling.shown(str(member["id"])),
        "weight": words.number(_finite(member["weight"], where)),
        "prompt": spelling.shown(str(member["prompt"]))[-_BRIEF:],
        "completion": spelling.shown(str(member["completion"]))[:_BRIEF],
        "log_probability": words.number(_finite(member["log_probability"], where)),
    }


def _sequence(
    result: Mapping[str, Any], place: int, query_anchor: str, where: str, lexical: bool, taken: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    name = str(_need(result, "id", f"a result of {where}"))
    where = f"sequence {name!r} of {where}"
    score = _finite(_need(result, "score", where), where)
    tokens = result.get("tokens") or []
    parts = spelling.pieces([str(token) for token, _ in tokens], str(result.get("text") or ""))
    texts = [spelling.shown(piece) for piece, _ in parts]
    scores = [value or 0.0 for value in _per_piece(parts, [value for _, value in tokens], where)]
    here = _claim(spelling.anchor(query_anchor, name), taken)
    label = str(result.get("rank", place))
    bm25 = result.get("bm25_rank")
    metadata = dict(result.get("metadata") or {})
    documents = result.get("documents") or ()
    if origin := words.origin(documents):
        if len(documents) > 1:
            metadata.pop("documents", None)  # their ids, which `origin` has
        metadata["documents in it" if len(documents) > 1 else "part of"] = origin
    if duplicates := result.get("duplicates"):
        how_many = f"{len(duplicates)} near-duplicate{'s' if len(duplicates) > 1 else ''}, not shown"
        metadata[how_many] = ", ".join(str(duplicate["id"]) for duplicate in duplicates)
    page = {
        "rank": label,
        "name": spelling.shown(name),
        "anchor": here,
        "score": score,
        "score_text": words.signed(score),
        "text": "".join(texts) if tokens else spelling.shown(str(result.get("text") or "")),
        "metadata": [
            (
                spelling.shown(str(key)),
                spelling.shown("none" if value is None else str(value) if isinstance(value, int) else words.plain(value)),
            )
            for key, value in metadata.items()
        ],
        "runs": _by_run(result.get("runs") or {}, where),
        "bm25": "" if not lexical else "not found by BM25" if bm25 is None else f"BM25 rank {bm25:,}",
    }
    numbers = {"anchor": here, "score": _short(score)}
    if tokens:
        numbers |= {"widths": spelling.widths(texts), "joined": _joined(parts), **packed(scores)}
    return page, numbers


def _by_run(scores: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The score by each of several runs, in their order, as bars of a small plot: their heights within 24 pixels of which zero lies in the middle."""
    values = {name: _finite(value, where) for name, value in scores.items()}
    largest = max((abs(value) for value in values.values()), default=0.0) or 1.0
    return [
        {
            "name": spelling.shown(name),
            "score_text": words.signed(value),
            "x": 7 * place,
            "y": round(12 - max(0.0, 12 * value / largest), 2),
            "height": round(max(0.5, 12 * abs(value) / largest), 2),
            "side": "minus" if value < 0 else "plus",
        }
        for place, (name, value) in enumerate(values.items())
    ]


def _per_piece(parts: Sequence[tuple[str, int]], values: Sequence[float | None], where: str) -> list[float | None]:
    """One value a piece: the sum over its tokens, None where none of them has a value."""
    remaining = iter(values)
    sums: list[float | None] = []
    for _, count in parts:
        present = [_finite(value, where) for value in (next(remaining) for _ in range(count)) if value is not None]
        sums.append(sum(present) if present else None)
    return sums


def _joined(parts: Sequence[tuple[str, int]]) -> list[list[int]]:
    """`[piece, number of tokens]` for the pieces that are more than one token."""
    return [[place, count] for place, (_, count) in enumerate(parts) if count > 1]


def _sums(by_layer: list[dict[str, float]], names: list[str], group: Any) -> list[list[Any]]:
    return [[label, _short(positive), _short(negative)] for label, positive, negative in layer_names.signed_sums(by_layer, names, group)]


def _by_kind(by_layer: list[dict[str, float]], names: list[str]) -> list[list[Any]]:
    """`[label, positive, negative, 0]` for each kind of module, each followed by the modules of that kind with 1 in the last place,
    where there are few and they say more than the kinds do."""
    modules = {name: layer_names.take_apart(name).module for name in names}
    kinds = dict.fromkeys(layer_names.kind(name) for name in names)
    detailed = len(kinds) < len(set(modules.values())) <= _MODULES
    rows: list[list[Any]] = []
    for kind in kinds:
        of_kind = [name for name in names if layer_names.kind(name) == kind]
        rows += [[*row, 0] for row in _sums(by_layer, of_kind, layer_names.kind)]
        rows += [[*row, 1] for row in _sums(by_layer, of_kind, modules.get)] if detailed else []
    return rows


def _distribution(distribution: Mapping[str, Any] | None, where: str) -> dict[str, Any] | None:
    """The distribution with its parts checked; None where there is nothing to draw."""
    if not distribution:
        return None
    histogram = distribution.get("histogram") or {}
    edges = [_finite(edge, where) for edge in histogram.get("edges") or []]
    counts = [int(count) for count in histogram.get("counts") or []]
    if counts and len(edges) != len(counts) + 1:
        raise ValueError(f"the histogram of {where} has {len(edges)} edges for {len(counts)} counts: give one edge more than counts")
    tail = [[_finite(fraction, where), _finite(share, where)] for fraction, share in distribution.get("tail") or []]
    if not counts and not tail:
        return None
    return {
        "num_sequences": distribution.get("num_sequences"),
        "estimated_from": distribution.get("estimated_from"),
        "edges": edges if counts else [],
        "counts": counts,
        "tail": tail,
    }


def _plotted(spread: Mapping[str, Any]) -> dict[str, Any]:
    one_percent = words.tail_share(spread["tail"], 0.01)
    return {
        "num_sequences": spread["num_sequences"],
        "edges": [_short(edge, 6) for edge in spread["edges"]],
        "counts": spread["counts"],
        "tail": [[_short(fraction), _short(share)] for fraction, share in _thinned(spread["tail"])],
        "one_percent": None if one_percent is None else _short(one_percent),
    }


def _thinned(points: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """At most `_TAIL_POINTS` of the points, spaced evenly in the logarithm of their place, the first and the last among them."""
    if len(points) <= _TAIL_POINTS:
        return list(points)
    ratio = math.log(len(points)) / (_TAIL_POINTS - 1)
    return [points[place - 1] for place in sorted({round(math.exp(step * ratio)) for step in range(_TAIL_POINTS)})]


def coverage_content(coverage: Mapping[str, Any], where: str) -> dict[str, Any]:
    share = coverage.get("parameters_attributed")
    return {
        "share": None if share is None else _short(min(1.0, max(0.0, _finite(share, where)))),
        "share_text": None if share is None else words.percent(share),
        "excluded": _by_reason(coverage.get("excluded") or {}),
        "whole": _by_reason(coverage.get("whole") or {}),
    }


def _by_reason(found: Mapping[str, Any]) -> list[tuple[str, int, list[str]]]:
    """(reason, how many modules, their names with ranges of numbers) of reasons by module."""
    reasons: dict[str, list[str]] = {}
    for module, reason in found.items():
        reasons.setdefault(words.plain(reason), []).append(str(module))
    return [(reason, len(modules), layer_names.with_ranges(modules)) for reason, modules in reasons.items()]


def _fact(key: str, value: Any) -> str:
    if key == "seconds" and isinstance(value, int | float):
        return f"{words.plain(value)} s"
    if value is None and key.startswith(("recall", "ndcg")):
        return "not measured"
    return spelling.shown(words.plain(value))


def _claim(anchor: str, taken: set[str]) -> str:
    """The anchor, numbered where an earlier one has the same spelling."""
    free = next(name for name in _numbered(anchor) if name not in taken)
    taken.add(free)
    return free


def _numbered(name: str) -> Iterable[str]:
    yield name
    count = 2
    while True:
        yield f"{name}__{count}"
        count += 1


def _need(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in mapping:
        raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(repr, mapping)) or 'nothing'}")
    return mapping[key]


def _finite(value: Any, where: str) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{where} holds {value!r} where a finite number is needed")


def _short(value: float, digits: int = 4) -> float:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded
