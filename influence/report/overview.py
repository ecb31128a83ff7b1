"""What the answers to a set of queries have in common: where in the model each family is answered from, which sequences come back, how far
answers overlap, and how concentrated each is. Numbers first (`set_facts`), then as the page holds them (`overview_content`).

Knows results as plain JSON; knows nothing of HTML.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from influence.report import layers as layer_names
from influence.report import spelling, words

MOST_TOGETHER = 10
"""Sequences that are named as shared by several answers."""

MOST_SQUARE = 40
"""A picture of the overlap has at most so many queries on a side; the table has all."""

LONGEST = 240
"""Characters of a sequence's text."""

EVERY = "all queries"

Queries = Sequence[Mapping[str, Any]]


def set_facts(queries: Queries) -> dict[str, Any]:
    """What `overview_content` shows and tables hold, of two or more queries in the form of `InfluenceResult.to_json` with their `opponents`.

    `layers`: by block and by kind of module, the share of the influence of the sequences that helped, a row for each group of layers and family.
    `overlap[i][j]`: of the sequences that the answers to i and j name at either end, the share of the shorter list that is in both. `together`:
    sequences that are in the lists of several queries, those of the most queries first; `sum` adds their scores in these lists, None where units
    differ.
    """
    families = _families(queries)
    return {
        "queries": [_concentration(query) for query in queries],
        "families": {name: len(members) for name, members in families.items()},
        "layers": {"block": _shares(families, layer_names.row_by_block), "kind": _shares(families, lambda names: layer_names.kind)},
        "together": _together(queries),
        "overlap": _overlap(queries),
    }


def overview_content(facts: Mapping[str, Any], anchors: Mapping[str, str]) -> dict[str, Any]:
    """What the template prints; `anchors` are the sections of the queries that have one."""
    families = facts["families"]
    names = [(spelling.shown(name), count) for name, count in families.items()]
    return {
        "several_families": len(families) > 1,
        "families": names,
        "groups": [
            _group(title, facts["layers"][by], list(families)) for title, by in (("By depth", "block"), ("By kind of module", "kind"))
        ],
        "together": [_shared(one, anchors, len(facts["queries"])) for one in facts["together"]],
        "overlap": _square(facts),
        "queries": [_row(one, anchors) for one in facts["queries"]],
    }


def _families(queries: Queries) -> dict[str, list[Mapping[str, Any]]]:
    """The queries by their family; one family of all where they name no two."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for query in queries:
        if (family := query["query"].get("family")) is not None:
            found.setdefault(str(family), []).append(query)
    return found if len(found) > 1 else {EVERY: list(queries)}


def _shares(families: Mapping[str, Queries], row: Callable[[Sequence[str]], Callable[[str], str]]) -> list[dict[str, Any]]:
    asked = [(name, [result.get("layers") or {} for result in query["results"]]) for name, members in families.items() for query in members]
    rows, shares = layer_names.shares_by_family(asked, row)
    return [{"group": row, "family": family, "share": column[place]} for family, column in shares.items() for place, row in enumerate(rows)]


def _ids(results: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for one in results for name in (one["id"], *(other["id"] for other in one.get("duplicates") or []))}


def _together(queries: Queries) -> list[dict[str, Any]]:
    helped, hurt, sums = Counter[str](), Counter[str](), Counter[str]()
    shown: dict[str, Mapping[str, Any]] = {}
    lists: dict[str, list[str]] = {}
    for place, query in enumerate(queries, 1):
        for side, count in ((query["results"], helped), (query.get("opponents") or [], hurt)):
            for one in side:
                count[one["id"]] += 1
                sums[one["id"]] += one["score"]
                shown.setdefault(one["id"], one)
                lists.setdefault(one["id"], []).append(str(query.get("id") or place))
    one_unit = len({query.get("unit", "nats") for query in queries}) == 1
    several = sorted(
        (name for name in shown if helped[name] + hurt[name] > 1), key=lambda name: (-helped[name] - hurt[name], -abs(sums[name]))
    )
    return [
        {
            "id": name,
            "helped": helped[name],
            "hurt": hurt[name],
            "sum": float(sums[name]) if one_unit else None,
            "unit": queries[0].get("unit", "nats") if one_unit else None,
            "queries": lists[name],
            "text": str(shown[name].get("text") or ""),
        }
        for name in several[:MOST_TOGETHER]
    ]


def _overlap(queries: Queries) -> list[list[float]]:
    lists = [_ids([*query["results"], *(query.get("opponents") or [])]) for query in queries]
    return [[len(one & other) / min(len(one), len(other)) if one and other else 0.0 for other in lists] for one in lists]


def _concentration(query: Mapping[str, Any]) -> dict[str, Any]:
    spread, asked = query.get("distribution") or {}, query["query"]
    return {
        "id": str(query.get("id") or ""),
        "family": asked.get("family"),
        "unit": query.get("unit", "nats"),
        "log_probability": asked.get("log_probability"),
        "top_score": query["results"][0]["score"] if query["results"] else None,
        "top_1_percent": words.tail_share(spread.get("tail") or [], 0.01),
        "largest_10": (spread.get("largest") or {}).get("10"),
        "effective_sequences": spread.get("effective_sequences"),
    }


def _group(title: str, rows: Sequence[Mapping[str, Any]], families: Sequence[str]) -> dict[str, Any]:
    names = list(dict.fromkeys(row["group"] for row in rows))
    shares = {(row["group"], row["family"]): row["share"] for row in rows}
    largest = max((abs(share) for share in shares.values()), default=0.0) or 1.0
    return {
        "title": title,
        "rows": [
            {
                "name": spelling.shown(f"block {name}" if name.rpartition(" ")[2].isdecimal() else name),
                "shares": [_cell(shares.get((name, family)), largest) for family in families],
            }
            for name in names
        ],
    }


def _cell(share: float | None, largest: float) -> dict[str, Any]:
    if share is None:
        return {"text": "–", "width": 0, "side": "plus"}
    text = words.percent(share) if share >= 0 else f"{words.MINUS}{words.percent(-share)}"
    return {"text": text, "width": round(100 * abs(share) / largest, 1), "side": "minus" if share < 0 else "plus"}


def _shared(one: Mapping[str, Any], anchors: Mapping[str, str], num_queries: int) -> dict[str, Any]:
    text = " ".join(spelling.shown(one["text"]).split())
    return {
        "name": spelling.shown(one["id"]),
        "lists": f"{one['helped'] + one['hurt']} of {num_queries} queries",
        "helped": one["helped"],
        "hurt": one["hurt"],
        "sum": "" if one["sum"] is None else f"{words.signed(one['sum'])} {one['unit']}",
        "side": "" if not one["sum"] else "minus" if one["sum"] < 0 else "plus",
        "queries": [(spelling.shown(name), anchors.get(name, "")) for name in dict.fromkeys(one["queries"])],
        "text": text[:LONGEST] + ("…" if len(text) > LONGEST else ""),
    }


def _square(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The overlap as a square of cells, and its mean over pairs of one family and of two."""
    overlap, queries = facts["overlap"], facts["queries"]
    count = min(len(queries), MOST_SQUARE)
    pairs = [(overlap[i][j], queries[i]["family"] == queries[j]["family"]) for i in range(len(queries)) for j in range(i)]
    within = [share for share, same in pairs if same]
    across = [share for share, same in pairs if not same]
    side = max(12, min(30, 600 // count))
    return {
        "side": side,
        "size": side * count,
        "more": len(queries) - count,
        "cells": [
            {
                "x": j * side,
                "y": i * side,
                "strength": round(overlap[i][j] ** 0.5, 3),
                "said": f"{spelling.shown(queries[i]['id'])} and {spelling.shown(queries[j]['id'])}: {words.percent(overlap[i][j])}",
            }
            for i in range(count)
            for j in range(count)
            if i != j and overlap[i][j] > 0
        ],
        "names": [{"name": spelling.shown(query["id"]), "y": (place + 0.5) * side + 4} for place, query in enumerate(queries[:count])],
        "within": words.percent(sum(within) / len(within)) if within else "",
        "across": words.percent(sum(across) / len(across)) if across else "",
    }


def _row(one: Mapping[str, Any], anchors: Mapping[str, str]) -> dict[str, Any]:
    def share(value: float | None) -> str:
        return "–" if value is None else words.percent(value)

    return {
        "name": spelling.shown(one["id"]),
        "anchor": anchors.get(one["id"], ""),
        "top_1_percent": share(one["top_1_percent"]),
        "largest_10": share(one["largest_10"]),
        "width": round(100 * (one["largest_10"] or 0.0), 1),
        "effective": "–" if one["effective_sequences"] is None else words.number(one["effective_sequences"]),
    }
