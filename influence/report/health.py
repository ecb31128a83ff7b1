"""From the health of a training set, as JSON, to what its page holds: numbers as text, and bars as lengths within 100.

Knows nothing of HTML.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from influence.report import layers as layer_names
from influence.report import spelling, words

LONGEST = 500
"""Characters of a text that are shown."""

VALUES = 40
"""Values of a metadata column that are shown."""

IDS = 12
"""Ids of a group of near-duplicates that are shown."""

_OF_TRAINING_SET = (
    "The query is the training set itself: a sequence’s influence is the predicted change, in nats, of the mean log-probability of a training "
    "sequence, had one more copy of it been there. Were the model trained to the end, all influence would be zero; so this shows what it would "
    "still learn from, and what pulls it away from the rest."
)


def health_content(health: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of the page prints."""
    about, concentration = health["about"], health["concentration"]
    of_training_set = bool(about.get("training_set"))
    asked = about.get("completion", "")
    meaning = (
        _OF_TRAINING_SET
        if of_training_set
        else "A sequence’s influence is the predicted change of what was asked, in nats, had one more copy of it been in the training set; "
        f"asked was: {about.get('prompt', '')}{asked}."
    )
    effective = concentration["effective_sequences"]
    return {
        "run": str(health["run"]),
        "created": str(health["created"]),
        "num_sequences": words.plain(health["sequences"]),
        "tokens": words.plain(health["tokens"]),
        "loss": words.number(health["loss"]),
        "meaning": meaning,
        "target": "the training set as a whole" if of_training_set else "what was asked",
        "tail": words.tail_sentence(concentration),
        "effective": words.number(effective) if effective else "",
        "largest": [_sequence(one, "influence", "nats") for one in health["largest"]],
        "most_negative": [_sequence(one, "influence", "nats") for one in health["most_negative"]],
        "self_influence": [_sequence(one, "self_influence", "nats") for one in health["self_influence"]],
        "outliers": [_outliers(kind, found) for kind, found in health["outliers"].items()],
        "threshold": words.plain(health["thresholds"]["outlying"]),
        "alike": words.plain(health["thresholds"]["alike"]),
        "source": health["source"],
        "duplicates": _duplicates(health["duplicates"]),
        "by": [_column(place, name, rows) for place, (name, rows) in enumerate(health["by"].items())],
        "layers": _layers(health["layers"]),
        "coverage": words.percent(health["coverage"]["parameters_attributed"]),
        "provenance": [(key.replace("_", " "), words.plain(value)) for key, value in health["provenance"].items()],
    }


def _sequence(one: Mapping[str, Any], column: str, unit: str) -> dict[str, Any]:
    value, text = one[column], " ".join(spelling.shown(one["text"]).split())
    numbers = {
        "influence": ("influence", words.signed),
        "self_influence": ("self-influence", words.number),
        "loss": ("loss a token", words.number),
        "num_tokens": ("tokens", words.plain),
    }
    shown = [(name, write(one[key])) for key, (name, write) in numbers.items() if key != column and one[key] is not None]
    return {
        "name": one["id"],
        "value": words.signed(value),
        "unit": unit,
        "side": "minus" if value < 0 else "plus",
        "facts": [*shown, *((str(key), words.plain(found)) for key, found in one["metadata"].items())],
        "text": text[:LONGEST] + ("…" if len(text) > LONGEST else ""),
    }


def _outliers(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "anchor": kind.replace("_", "-"),
        "name": {"self_influence": "Self-influence", "loss": "Loss a token"}[kind],
        "above": words.plain(found["above"]),
        "below": words.plain(found["below"]),
        "farthest": [_sequence(one, f"{kind}_distance", "robust standard deviations") for one in found["farthest"]],
    }


def _duplicates(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "groups": found["groups"],
        "sequences": words.plain(found["sequences"]),
        "largest": [
            {
                "size": words.plain(group["size"]),
                "ids": ", ".join(group["ids"][:IDS]) + (", …" if len(group["ids"]) > IDS else ""),
                "texts": [_sequence(one, "influence", "nats")["text"] for one in group["examples"]],
            }
            for group in found["largest"]
        ],
    }


def _column(place: int, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    largest = max(max(row["positive"], -row["negative"]) for row in rows) or 1.0
    return {
        "name": name,
        "anchor": f"by-{place}",
        "rows": [
            {
                "value": row["value"],
                "sequences": words.plain(row["sequences"]),
                "tokens": words.plain(row["tokens"]),
                "loss": words.number(row["loss"]),
                "self_influence_share": words.percent(row["self_influence_share"]),
                "influence_share": words.percent(row["influence_share"]),
                "sum": words.signed(row["positive"] + row["negative"]),
                "bar": _bar(row["positive"], row["negative"], largest),
            }
            for row in rows[:VALUES]
        ],
        "more": max(0, len(rows) - VALUES),
    }


def _layers(layers: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    largest = max((max(sums["positive"], -sums["negative"]) for sums in layers.values()), default=0.0) or 1.0
    return [
        {
            "name": name,
            "negative": words.signed(layers[name]["negative"]),
            "positive": words.signed(layers[name]["positive"]),
            "bar": _bar(layers[name]["positive"], layers[name]["negative"], largest),
        }
        for name in layer_names.in_model_order(layers)
    ]


def _bar(positive: float, negative: float, largest: float) -> dict[str, Any]:
    minus = round(-50 * negative / largest, 2)
    return {
        "left": round(50 - minus, 2),
        "minus": minus,
        "plus": round(50 * positive / largest, 2),
        "said": f"{words.signed(negative)} and {words.signed(positive)} nats",
    }
