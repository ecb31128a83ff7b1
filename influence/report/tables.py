"""The numbers of a report as tables: lists of rows with the same columns, by name, the most important first.

Metadata columns are called `metadata.<column>`; a score is in its row's `unit`. Knows reports as plain JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from influence.report.overview import set_facts

Rows = list[dict[str, Any]]
Tables = dict[str, Rows]

Queries = Sequence[Mapping[str, Any]]


def query_tables(queries: Queries) -> Tables:
    """`sequences`, a row for each result; its `layers` and `tokens`, a row for each of its scores; `queries`; and of two or more queries `families`
    (the share of influence by group of layers), `together` (sequences that several answers share) and `overlap` (of pairs of answers)."""
    ranked = [(query, side, one) for query in queries for side, one in _ranked(query)]
    tables: Tables = {
        "sequences": [_sequence(query, side, one) for query, side, one in ranked],
        "layers": [
            {**_place(query, side, one), "layer": layer, "score": score}
            for query, side, one in ranked
            for layer, score in (one.get("layers") or {}).items()
        ],
        "tokens": [
            {**_place(query, side, one), "token_number": number, "token": token, "score": score}
            for query, side, one in ranked
            for number, (token, score) in enumerate(one.get("tokens") or [], 1)
        ],
        "queries": [_query(query) for query in queries],
    }
    if len(queries) < 2:
        return tables
    facts = set_facts(queries)
    names = [query["id"] for query in queries]
    shares = [{"by": by, **row} for by, rows in facts["layers"].items() for row in rows]
    together = [{**one, "queries": ", ".join(one["queries"])} for one in facts["together"]]
    overlap = [
        {"query": names[i], "other": names[j], "share": share}
        for i, row in enumerate(facts["overlap"])
        for j, share in enumerate(row)
        if i < j
    ]
    return tables | {"families": shares, "together": together, "overlap": overlap}


def _ranked(query: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from (("helped", one) for one in query["results"])
    yield from (("hurt", one) for one in query.get("opponents") or [])


def _place(query: Mapping[str, Any], side: str, one: Mapping[str, Any]) -> dict[str, Any]:
    return {"query": query["id"], "side": side, "rank": one["rank"], "sequence": one["id"]}


def _sequence(query: Mapping[str, Any], side: str, one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_place(query, side, one),
        "score": one["score"],
        "unit": query.get("unit", "nats"),
        "text": one.get("text"),
        "bm25_rank": one.get("bm25_rank"),
        "verbatim": one.get("verbatim"),
        "duplicates": ", ".join(other["id"] for other in one.get("duplicates") or []),
        **_metadata(one.get("metadata") or {}),
    }


def _query(query: Mapping[str, Any]) -> dict[str, Any]:
    asked, provenance, spread = query["query"], query.get("provenance") or {}, query.get("distribution") or {}
    return {
        "query": query["id"],
        "family": asked.get("family"),
        "prompt": asked.get("prompt"),
        "completion": asked.get("completion"),
        "log_probability": asked.get("log_probability"),
        "unit": query.get("unit", "nats"),
        **{key: provenance.get(key) for key in ("method", "searched", "candidates", "recall_at_10", "ndcg_at_20")},
        "largest_10": (spread.get("largest") or {}).get("10"),
        "effective_sequences": spread.get("effective_sequences"),
        "parameters_attributed": (query.get("coverage") or {}).get("parameters_attributed"),
    }


def run_tables(facts: Mapping[str, Any]) -> Tables:
    """`layers`, a row for each: shape, damping, figures of its spectrum; `spectra`: how many axes have at least an eigenvalue; `fidelity`: recall by
    ranking, top and number of candidates; `rankings`, where other ways to rank were measured; the histograms `self_influence` and `lengths`;
    `metadata`; `excluded`."""
    layers = facts["layers"]
    figures = ("axes", "zero", "largest", "mean", "axes_below_damping", "curvature_below_damping")
    plain = ("name", "type", "kind", "block", "parameters", "damping", "effective_dimension", "row_weight", "row_numbers")
    fidelity = (facts["fidelity"] or {}).get("rankings") or {}
    rankings = (facts["rankings"] or {}).get("rankings") or []
    own, lengths = facts["self_influence"], facts["data"]["lengths"]
    return {
        "layers": [
            {
                **{key: layer[key] for key in plain},
                "outputs": layer["shape"][0],
                "inputs": layer["shape"][1],
                **{key: layer["spectrum"][key] for key in figures},
            }
            for layer in layers
        ],
        "spectra": [
            {"layer": layer["name"], "eigenvalue": value, "axes": count} for layer in layers for value, count in layer["spectrum"]["curve"]
        ],
        "fidelity": [
            {"ranking": name, "top": int(top), "candidates": int(depth), "recall": share, "ndcg_at_20": end["ndcg_at_20"]}
            for name, end in fidelity.items()
            for top, depths in end["recall"].items()
            for depth, share in depths.items()
        ],
        "rankings": [
            {
                "ranking": one["name"],
                "bytes_per_sequence": one["bytes_per_sequence"],
                "spearman": one["spearman"],
                **{f"{end}_ndcg_at_20": one[end]["ndcg_at_20"] for end in ("proponents", "opponents")},
            }
            for one in rankings
        ],
        "self_influence": _histogram(own["edges"], own["counts"]),
        "lengths": _histogram(lengths["edges"], lengths["counts"]),
        "metadata": [{"column": name, **row} for name, found in facts["data"]["metadata"].items() for row in found["values"]],
        "excluded": [{"module": module, "reason": reason} for module, reason in facts["coverage"]["excluded"].items()],
    }


def health_tables(summary: Mapping[str, Any], columns: Mapping[str, Any]) -> Tables:
    """`sequences`, a row for each with its figures; `by`: sums by the values of metadata columns; `layers`: influence for and against;
    `duplicates`."""
    names = list(columns)
    return {
        "sequences": [dict(zip(names, row, strict=True)) for row in zip(*(_plain(columns[name]) for name in names), strict=True)],
        "by": [{"column": name, **row} for name, rows in summary["by"].items() for row in rows],
        "layers": [{"layer": name, **sums} for name, sums in summary["layers"].items()],
        "duplicates": [
            {"group": number, "size": group["size"], "ids": ", ".join(group["ids"])}
            for number, group in enumerate(summary["duplicates"]["largest"])
        ],
    }


def _plain(column: Any) -> list[Any]:
    return list(column.tolist() if hasattr(column, "tolist") else column)


def _histogram(edges: Sequence[float], counts: Sequence[int]) -> Rows:
    return [{"from": low, "to": high, "sequences": count} for low, high, count in zip(edges[:-1], edges[1:], counts, strict=False)]


def _metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {f"metadata.{key}": value for key, value in metadata.items()}
