"""From the facts of a run (`influence.run_facts`) to what its page holds: numbers as text, charts as SVG.

Knows nothing of files or models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from influence.report import charts, spelling, words
from influence.report import layers as layer_names
from influence.report.charts import Axis, Line
from influence.report.content import coverage_content

DEEPEST = 12
"""Powers of ten below the largest eigenvalue that a spectrum shows."""

SHOWN_VALUES = 12
"""Values of a metadata column that are shown."""

MANY_LAYERS = 60
"""A table of more layers is folded away."""

_STYLES = ("first", "second", "third", "fourth")


def run_content(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of the page prints."""
    data, coverage, index = facts["data"], facts["coverage"], facts["index"]
    settings = facts["provenance"]["settings"]
    own = facts["self_influence"]
    return {
        "run": spelling.shown(str(facts["run"])),
        "created": str(facts.get("created", "")),
        "figures": _figures(facts),
        "data": data,
        "living": _living(facts["living"]),
        "lengths": charts.histogram(
            data["lengths"]["edges"],
            data["lengths"]["counts"],
            "length, tokens",
            f"Histogram of the lengths of {data['searched']:,} sequences",
        )
        if data["lengths"]["counts"]
        else "",
        "metadata": [_metadata(place, name, found) for place, (name, found) in enumerate(data["metadata"].items())],
        "coverage": coverage_content(coverage, "the run"),
        "num_layers": len(coverage["layers"]),
        "attributed": words.plain(coverage["attributed"]),
        "parameters": words.plain(coverage["parameters"]),
        "fit": [(name, words.plain(min(count, facts["fit"]["of"]))) for name, count in facts["fit"]["sequences"].items()],
        "fit_of": words.plain(facts["fit"]["of"]),
        "damping": _damping(settings["factors"]["damping"]),
        "spectra": _spectra(facts["layers"]),
        "layers": [_layer(layer, facts["layers"]) for layer in facts["layers"]],
        "fold": len(facts["layers"]) > MANY_LAYERS,
        "fidelity": _fidelity(facts["fidelity"], index),
        "index": {
            "encoding": index["encoding"],
            "bytes": words.size(index["bytes_per_sequence"]),
            "numbers": words.plain(index["numbers_per_row"]),
            "dimensions": words.plain(index["dimensions"]),
        },
        "rankings": _rankings(facts["rankings"]),
        "own": _self_influence(own),
        "provenance": _provenance(facts["provenance"]),
        "disk": [(stage, words.size(count)) for stage, count in (facts["provenance"]["bytes"] or {}).items()],
        "disk_total": words.size(sum((facts["provenance"]["bytes"] or {}).values())),
    }


def _figures(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers to know first: value, unit, and how to read it."""
    data, layers, fidelity = facts["data"], facts["layers"], facts["fidelity"]
    found = [
        ("sequences", words.plain(data["searched"]), "sequences", "are searched by a query."),
        (
            "attributed",
            words.percent(facts["coverage"]["parameters_attributed"]),
            "of the parameters",
            "are in the scores; the rest is invisible to them.",
        ),
    ]
    if fidelity:
        end = fidelity["rankings"]["proponents"]
        found.append(
            (
                "ndcg",
                f"{end['ndcg_at_20']:.3f}",
                "NDCG at 20",
                "of the index alone against exact EK-FAC, before the rerank that every answer gets: 1 is the exact order.",
            )
        )
        candidates = facts["index"]["candidates"]["proponents"]
        found.append(
            (
                "candidates",
                words.plain(candidates["10"]),
                "candidates",
                "are scored in full for ten results: as many as held 99% of the exact top ten, or all that were tried.",
            )
        )
    below = _overall(layers, "curvature_below_damping")
    found.append(
        (
            "damped",
            words.percent(below),
            "of the curvature",
            "lies on axes that damping dominates: small, and little is lost to it; large, and the damping shapes the answers.",
        )
    )
    effective = sum(layer["effective_dimension"] for layer in layers) / sum(layer["spectrum"]["axes"] for layer in layers)
    found.append(
        (
            "effective",
            words.percent(effective),
            "effective dimension",
            "the share of all axes that damping leaves, Σ Λ/(Λ+λ) over their number.",
        )
    )
    return [{"name": name, "value": value, "unit": unit, "read": read} for name, value, unit, read in found]


def _overall(layers: Sequence[Mapping[str, Any]], share: str) -> float:
    """The mean of a share of the curvature, layers weighted by the curvature that they hold."""
    totals = [layer["spectrum"]["mean"] * layer["spectrum"]["axes"] for layer in layers]
    whole = sum(totals)
    return sum(total * layer["spectrum"][share] for total, layer in zip(totals, layers, strict=True)) / whole if whole > 0 else 0.0


def _living(living: Mapping[str, int]) -> str:
    said = [f"{words.plain(count)} {what}" for what, count in living.items() if count]
    return f"Since the index was built: {', '.join(said)}." if said else ""


def _metadata(place: int, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    shown, hidden = found["values"][:SHOWN_VALUES], found["values"][SHOWN_VALUES:]
    largest = max((one["sequences"] for one in shown), default=1)
    others = found["others"] + sum(one["sequences"] for one in hidden)
    return {
        "name": spelling.shown(name),
        "anchor": f"metadata-{place}",
        "distinct": words.plain(found["distinct"]),
        "rows": [
            {
                "value": spelling.shown(one["value"]) or "(none)",
                "sequences": words.plain(one["sequences"]),
                "width": round(100 * one["sequences"] / largest, 1),
            }
            for one in shown
        ],
        "others": words.plain(others) if others else "",
        "more": words.plain(found["distinct"] - len(shown)),
    }


def _damping(damping: Any) -> str:
    if isinstance(damping, Mapping) and "absolute" in damping:
        return f"λ is {words.number(damping['absolute'])} nats² in every layer."
    if damping == "optimizer":
        return "λ is 0.1 times each layer’s mean corrected eigenvalue; refined answers are damped in the metric of the optimizer."
    return f"λ is {words.plain(damping)} times each layer’s mean corrected eigenvalue."


def _axes(layers: Sequence[Mapping[str, Any]]) -> tuple[Axis, Axis] | None:
    """The axes that hold the spectra of these layers; None where none has curvature."""
    drawn = [layer["spectrum"] for layer in layers if layer["spectrum"]["curve"]]
    if not drawn:
        return None
    high = max(spectrum["largest"] for spectrum in drawn)
    # Down to where nearly all eigenvalues are told: a long tail of almost nothing would leave the rest no room.
    low = min(next((value for value, count in s["curve"] if count >= 0.98 * s["axes"]), s["curve"][-1][0]) for s in drawn)
    y = Axis(title="corrected eigenvalue, nats²", low=max(low, high * 10.0**-DEEPEST, 1e-300) / 1.3, high=1.3 * high, log=True)
    return Axis(title="axes with at least that eigenvalue", low=1, high=max(2, *(s["axes"] for s in drawn)), log=True), y


def _curve(spectrum: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(how many axes, eigenvalue), leaving out steps in which nothing was added."""
    return [
        (count, value) for place, (value, count) in enumerate(spectrum["curve"]) if not place or count > spectrum["curve"][place - 1][1]
    ]


def _at_damping(layer: Mapping[str, Any]) -> tuple[float, float]:
    spectrum = layer["spectrum"]
    return max(1.0, round((1 - spectrum["axes_below_damping"]) * spectrum["axes"])), layer["damping"]


def _spectra(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart for each kind of layer: a curve for each layer, the deeper the stronger."""
    found = []
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        of_kind = [layer for layer in layers if layer["kind"] == kind]
        axes = _axes(of_kind)
        if axes is None:
            continue
        lines = [
            Line(
                name=spelling.shown(layer["name"]),
                points=_curve(layer["spectrum"]),
                mark=_at_damping(layer),
                mark_name=f"λ = {words.number(layer['damping'])} nats²",
                strength=0.3 + 0.7 * (place + 1) / len(of_kind),
            )
            for place, layer in enumerate(of_kind)
        ]
        names = layer_names.with_ranges([layer["name"] for layer in of_kind])
        described = (
            f"Corrected eigenvalues of {len(of_kind)} {kind} layers by rank, on logarithmic axes, with a dot at each layer’s damping"
        )
        found.append({"kind": kind, "names": [spelling.shown(name) for name in names], "chart": charts.line_chart(lines, *axes, described)})
    return found


def _layer(layer: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    spectrum, axes = layer["spectrum"], _axes([layer])
    exact = layer["row_numbers"] == layer["row_buckets"] == layer["parameters"]
    kept = 1.0 if exact else layer["row_weight"] / layer["effective_dimension"] if layer["effective_dimension"] > 0 else 0.0
    numbers = sum(other["row_numbers"] for other in layers)
    return {
        "name": spelling.shown(layer["name"]),
        "shape": " × ".join(words.plain(size) for size in layer["shape"]),
        "spark": charts.sparkline(_curve(spectrum), *axes, _at_damping(layer), f"Spectrum of {layer['name']}, with a dot at its damping")
        if axes
        else "",
        "mean": words.number(spectrum["mean"]),
        "largest": words.number(spectrum["largest"]),
        "damping": words.number(layer["damping"]),
        "effective": words.plain(round(layer["effective_dimension"])),
        "effective_share": words.percent(layer["effective_dimension"] / spectrum["axes"]),
        "axes_below": words.percent(spectrum["axes_below_damping"]),
        "curvature_below": words.percent(spectrum["curvature_below_damping"]),
        "row_numbers": words.plain(round(layer["row_numbers"])),
        "row_share": words.percent(layer["row_numbers"] / numbers if numbers else 0.0),
        "row_width": round(100 * layer["row_numbers"] / max(1e-9, *(other["row_numbers"] for other in layers)), 1),
        "kept": words.percent(kept),
        "a_number": words.number(layer["parameters"] / layer["row_buckets"]),
    }


def _fidelity(fidelity: Mapping[str, Any] | None, index: Mapping[str, Any]) -> dict[str, Any] | None:
    if not fidelity:
        return None
    ends = fidelity["rankings"]
    rows = [
        {
            "name": name,
            "ndcg": f"{end['ndcg_at_20']:.3f}",
            "candidates": words.plain(index["candidates"][name]["10"]),
            "recall": [(f"top {k}", _recall_text(depths)) for k, depths in end["recall"].items()],
        }
        for name, end in ends.items()
    ]
    drawn = [(name, sorted((int(depth), share) for depth, share in _ten(end["recall"]).items())) for name, end in ends.items()]
    depths = [depth for _, points in drawn for depth, _ in points]
    chart, key = "", []
    if len(set(depths)) > 1:
        lines = [Line(name=name, points=points, style=f"curve {_STYLES[place]}", dots=True) for place, (name, points) in enumerate(drawn)]
        x = Axis(title="candidates that the index proposes", low=min(depths), high=max(depths), log=True)
        chart = charts.line_chart(
            lines, x, Axis(title="share of the exact top 10", low=0, high=1), "Recall of the index by number of candidates"
        )
        key = [(name, _STYLES[place]) for place, (name, _) in enumerate(drawn)]
    spearman = fidelity["spearman"]
    return {
        "queries": words.plain(fidelity["queries"]),
        "spearman": None if spearman is None else f"{spearman:.3f}",
        "rows": rows,
        "chart": chart,
        "key": key,
        "wider": [(words.size(int(times) * index["bytes_per_sequence"]), f"{ndcg:.3f}") for times, ndcg in _wider(fidelity).items()],
    }


def _wider(fidelity: Mapping[str, Any]) -> Mapping[Any, float]:
    """The NDCG@20 to expect of rows so many times as long; not known of runs that an earlier version measured."""
    return dict(fidelity.get("ndcg_at_20_of_wider") or {})


def _ten(recall: Mapping[Any, Any]) -> Mapping[Any, float]:
    """By depth: the recall of the exact top ten, or of as many as there are."""
    most = max((k for k in recall if int(k) <= 10), key=int)
    return dict(recall[most])


def _recall_text(depths: Mapping[Any, float]) -> str:
    return ", ".join(f"{words.percent(share)} in {words.plain(int(depth))}" for depth, share in depths.items())


def _rankings(evaluated: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `influence evaluate RUN fidelity` measured."""
    if not evaluated:
        return None
    rankings = evaluated["rankings"]
    sized: dict[str, list[tuple[float, float]]] = {}
    for one in rankings:
        if one["bytes_per_sequence"] is not None:
            sized.setdefault(one["name"], []).append((one["bytes_per_sequence"], one["proponents"]["ndcg_at_20"]))
    sizes = [size for points in sized.values() for size, _ in points]
    lines = [
        Line(name=name, points=sorted(points), style=f"curve {_STYLES[place % len(_STYLES)]}", dots=True)
        for place, (name, points) in enumerate(sized.items())
    ]
    chart: Any = ""
    if len(set(sizes)) > 1:
        x = Axis(title="bytes a sequence", low=min(sizes) / 1.1, high=max(sizes) * 1.1, log=True)
        chart = charts.line_chart(lines, x, Axis(title="NDCG at 20", low=0, high=1), "NDCG at 20 of rankings by the bytes a sequence takes")
    return {
        "queries": words.plain(evaluated["num_queries"]),
        "queries_are": evaluated["queries_are"],
        "sequences": words.plain(evaluated["num_sequences"]),
        "chart": chart,
        "key": [(name, _STYLES[place % len(_STYLES)]) for place, name in enumerate(sized)],
        "rows": [
            {
                "name": one["name"],
                "bytes": "" if one["bytes_per_sequence"] is None else words.plain(one["bytes_per_sequence"]),
                "ndcg": f"{one['proponents']['ndcg_at_20']:.3f}",
                "recall": [_share_in(one["proponents"]["recall"], depth) for depth in ("50", "100", "200")],
                "spearman": "" if one["spearman"] is None else f"{one['spearman']:.3f}",
                "opponents": "" if one["name"] == "BM25" else f"{one['opponents']['ndcg_at_20']:.3f}",
            }
            for one in rankings
        ],
    }


def _share_in(recall: Mapping[str, Mapping[str, float]], depth: str) -> str:
    share = _ten(recall).get(depth)
    return "" if share is None else words.percent(share)


def _self_influence(own: Mapping[str, Any]) -> dict[str, Any]:
    chart = ""
    if own["counts"]:
        described = f"Histogram of the self-influence of {sum(own['counts']):,} sequences on a logarithmic axis, in nats"
        chart = charts.histogram(own["edges"], own["counts"], "self-influence, nats", described, log=True)
    names = {"0.01": "1%", "0.1": "10%", "0.5": "half", "0.9": "90%", "0.99": "99%"}
    return {
        "chart": chart,
        "quantiles": [(names.get(share, share), words.number(value)) for share, value in own["quantiles"].items()],
        "zero": words.plain(own["zero"]) if own["zero"] else "",
        "tail": words.tail_sentence(own).replace("positive influence", "self-influence"),
    }


def _provenance(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, value) line by line, what is nested under its path."""
    found: list[tuple[str, str]] = [("place", str(provenance["place"])), ("made with", f"influence {provenance['made_with']}")]
    found += [(f"fingerprint of the {name}", str(value)) for name, value in provenance["fingerprints"].items()]
    for part in ("sources", "settings"):
        for name, value in provenance[part].items():
            lines = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
            found += [
                (key, ", ".join(map(str, one)) if isinstance(one, list) else words.plain(one))
                for key, one in lines.items()
                if one is not None
            ]
    return [(spelling.shown(key), spelling.shown(value)) for key, value in found]
