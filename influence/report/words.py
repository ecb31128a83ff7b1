"""Numbers and sentences for people: how a score is written, and what an answer rests on.

Knows nothing of pages: values in, plain text out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\u2212"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """About three significant digits, with a real minus sign: `0.0312`, `−3.20`, `4.1×10⁻⁶`."""
    size = abs(value)
    sign = MINUS if value < 0 else ""
    if size == 0:
        return "0"
    exponent = math.floor(math.log10(size))
    if -4 <= exponent < 5:
        return f"{sign}{size:,.{max(0, 2 - exponent)}f}"
    mantissa, _, power = f"{size:.1e}".partition("e")
    return f"{sign}{mantissa}×10{str(int(power)).translate(_SUPERSCRIPTS)}"


def power_of_ten(power: int) -> str:
    """`10⁻³`."""
    return f"10{str(power).translate(_SUPERSCRIPTS)}"


def size(num_bytes: float) -> str:
    """`8.0 KiB`, `1.2 GiB`: three digits at most."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def signed(value: float) -> str:
    """`number` with a plus sign where the value is positive."""
    return ("+" if value > 0 else "") + number(value)


def percent(share: float) -> str:
    """A share as a percentage, with a decimal only where it is needed to tell it from none or all."""
    points = 100 * share
    if 0 < points < 1 or 99 < points < 100:
        return f"{points:.2g}%" if points < 1 else f"{math.floor(points * 10) / 10:g}%"
    return f"{points:.0f}%"


def plain(value: Any) -> str:
    """Any JSON value as one line of text."""
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


MOST_DOCUMENTS = 5
"""Of a packed sequence, those that add most are named."""


def origin(documents: Sequence[Mapping[str, Any]]) -> str:
    """Which part of its document a sequence is: `doc-7, characters 120 to 480, part 2 of 5`; of several packed documents what each adds to the score.
    Empty for a whole document."""
    if len(documents) < 2:
        return "".join(_place(one) for one in documents if one["windows"] > 1)
    most = sorted(documents, key=lambda one: -abs(one["score"]))[:MOST_DOCUMENTS]
    left = [f"{len(documents) - len(most)} more"] if len(documents) > len(most) else []
    return "; ".join([*(f"{_place(one)}: {signed(one['score'])}" for one in most), *left])


def _place(part: Mapping[str, Any]) -> str:
    span = [f"characters {part['span'][0]:,} to {part['span'][1]:,}"] if part["span"] else []
    window = [f"part {part['window']} of {part['windows']}"] if part["windows"] > 1 else []
    return ", ".join([str(part["id"]), *span, *window])


def tail_share(tail: Sequence[Sequence[float]], fraction: float) -> float | None:
    """The share of positive influence carried by the top `fraction` of sequences, by linear interpolation between the points of
    `tail`; None where its points begin later."""
    below = max((point for point in tail if point[0] <= fraction), key=lambda point: point[0], default=None)
    above = min((point for point in tail if point[0] >= fraction), key=lambda point: point[0], default=None)
    if below is None or above is None:
        return None
    if below[0] == above[0]:
        return float(below[1])
    return float(below[1] + (above[1] - below[1]) * (fraction - below[0]) / (above[0] - below[0]))


def tail_sentence(distribution: Mapping[str, Any]) -> str:
    """`The top 1% of sequences (20 of 2,000) carry 34% of the positive influence; the top 10% carry 71%.` Empty when unknown."""
    tail, total = distribution.get("tail") or [], distribution.get("num_sequences")
    said: list[str] = []
    for fraction in (0.01, 0.1):
        share = tail_share(tail, fraction)
        if share is None:
            continue
        if said:
            said.append(f"the top {percent(fraction)} carry {percent(share)}")
        else:
            count = f" ({round(fraction * total):,} of {total:,})" if total and fraction * total >= 1 else ""
            said.append(f"The top {percent(fraction)} of sequences{count} carry {percent(share)} of the positive influence")
    return "; ".join(said) + "." if said else ""


def memorised(distribution: Mapping[str, Any], results: Sequence[Mapping[str, Any]], num_counted: int) -> str:
    """`The 10 largest carry 43% of it, as if 28 sequences had equal influence. Of the 10 sequences shown as helpful, 3 hold all 4 counted tokens
    of the completion in a row, 5 at least half of them.` How far an answer rests on few sequences, and repeats them; empty when unknown."""
    said, largest, effective = [], distribution.get("largest") or {}, distribution.get("effective_sequences")
    if "10" in largest and effective:
        said.append(f"The 10 largest carry {percent(largest['10'])} of it, as if {number(effective)} sequences had equal influence.")
    runs = [run for result in results if (run := result.get("verbatim")) is not None]
    if runs and num_counted > 1:
        whole, half = sum(run == num_counted for run in runs), sum(2 * run >= num_counted for run in runs)
        hold = f"{whole or 'none'} hold{'s' if whole == 1 else ''} all {num_counted} counted tokens of the completion in a row"
        said.append(f"Of the {len(runs)} sequences shown as helpful, {hold}, {half or 'none'} at least half of them.")
    return " ".join(said)


def measured(facts: Mapping[str, Any] | None) -> str:
    """What was measured instead of a log-probability, and its value; nothing where that was measured."""
    if not facts:
        return ""
    what = f"{facts['reduce']} activation at {facts['layer']}" if "layer" in facts else str(facts.get("function", "function"))
    return f"{what}: {number(facts['value'])}"


def overlap(lexical: Mapping[str, Any] | None) -> str:
    """How far lexical search and influence agree on what helped, as a sentence; nothing where that was not asked."""
    found = len((lexical or {}).get("results") or [])
    return f"{(lexical or {}).get('overlap')} of the first {found} that BM25 finds are among those that helped." if found else ""


def trust(provenance: Mapping[str, Any]) -> list[str]:
    """What was approximated in an answer and how well that is known, as sentences."""
    several = provenance.get("averaged_over") or []
    averaged = (
        [f"Scores are averages over {len(several)} runs; what is said here of the model and its factors is of the first."]
        if several
        else []
    )
    return [_curvature(provenance), *averaged, _search(provenance), _recall(provenance)]


def _curvature(provenance: Mapping[str, Any]) -> str:
    method, damping = provenance.get("method"), provenance.get("damping")
    held = _damping(damping)
    first = (
        f"Scores are first-order predictions, not retrainings. The curvature is EK-FAC: the Gauss–Newton Hessian of the training "
        f"loss, taken as block-diagonal over layers, each block a Kronecker product with corrected eigenvalues{held}."
    )
    if method == "ekfac":
        return first
    if method == "refined":
        return _refined(provenance.get("refinement") or {})
    if isinstance(method, str) and "ekfac" in method.lower():
        return f"{first} The method is recorded as “{method}”."
    name = f"“{method}”" if method else "not recorded"
    return f"Scores are first-order predictions, not retrainings. The method for the curvature is {name}{held}."


def _refined(refinement: Mapping[str, Any]) -> str:
    damping = refinement.get("damping")
    held = ", damped in the metric of the optimizer that trained the model" if damping == "optimizer" else _damping(damping)
    sequences, steps, residual = (plain(refinement.get(key)) for key in ("sequences", "steps", "relative_residual"))
    return (
        f"Scores are first-order predictions, not retrainings. The curvature is the exact Gauss–Newton Hessian of {sequences} training sequences, "
        f"over all layers together{held}; the system was solved by {steps} steps of conjugate gradients from the EK-FAC answer on, which left a "
        f"relative residual of {residual}."
    )


def _damping(damping: Any) -> str:
    if isinstance(damping, int | float) and not isinstance(damping, bool):
        return f", damped by {plain(damping)} × each layer’s mean corrected eigenvalue"
    if isinstance(damping, Mapping) and "absolute" in damping:
        return f", damped by {plain(damping['absolute'])} in every layer"
    if isinstance(damping, Mapping) and "relative" in damping:
        return _damping(damping["relative"])
    return "" if damping is None else f", with damping “{plain(damping)}”"


def _search(provenance: Mapping[str, Any]) -> str:
    searched, candidates, reranked = (provenance.get(key) for key in ("searched", "candidates", "reranked"))
    of = f"{searched:,} training sequences" if isinstance(searched, int) else "the training sequences"
    if reranked == "exact":
        if isinstance(candidates, int) and candidates == searched:
            return f"All {of} were scored in full, with nothing projected or compressed away."
        few = f"{candidates:,} candidates" if isinstance(candidates, int) else "candidates"
        return (
            f"A compressed index of {of} proposed {few}, which were then scored in full: the scores and their order are exact for EK-FAC."
        )
    if reranked in (None, False, "none", "no"):
        return f"Scores come from a compressed index of {of} and were not recomputed in full: read them as estimates."
    return f"A compressed index of {of} proposed candidates; they were reranked by “{plain(reranked)}”."


def _recall(provenance: Mapping[str, Any]) -> str:
    if provenance.get("reranked") == "exact" and provenance.get("searched") == provenance.get("candidates") is not None:
        return "None can have been missed by the index."
    recall = provenance.get("recall_at_10")
    if isinstance(recall, int | float):
        close = provenance.get("ndcg_at_20")
        measured = f"; the order by the index alone has an NDCG of {close:.3f} at 20" if isinstance(close, int | float) else ""
        return f"In a check against scoring every sequence, {percent(recall)} of the true ten best were among those found (recall at 10){measured}."
    return "The recall of the index was not measured: a sequence that belongs here may be missing."
