"""How well scores tell wrong labels from right ones.

Knows runs and what their labels say. Legend: M labelled sequences, B resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from influence.attribution import query_gradients, scan_parts
from influence.errors import RequestError
from influence.evaluation.intervals import NUM_RESAMPLES, Estimate, central
from influence.evaluation.retraining import query_losses
from influence.measurement import Measurement
from influence.run import Run
from influence.sequences import TrainingSequence
from influence.solving import Progress, in_groups, solved


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Which training sequences are looked at, whether each is wrong, and its label as a question where the file gives it."""

    numbers: NDArray[np.int64]  # [M]
    wrong: NDArray[np.bool_]  # [M]
    asked: tuple[Measurement, ...] | None  # M: the label after what comes before it


def labels_of(run: Run, lines: Sequence[tuple[str, Mapping[str, Any], str]]) -> Labels:
    """From lines of (id of a sequence, its object, where it stands): `wrong`, and `prompt` and `completion` in every line or in none.

    Raises RequestError for a line that is not so, an id that is not there or comes twice, and where all are wrong or none is.
    """
    known = {name: number for number, name in enumerate(run.store.ids)}
    numbers, wrong, asked = [], [], []
    for name, item, place in lines:
        if "id" not in item or name not in known:
            raise RequestError(f"{place}: there is no training sequence {item.get('id')!r}: each line names one by its id")
        if known[name] in numbers:
            raise RequestError(f"{place}: the sequence {name!r} comes twice")
        if not isinstance(item.get("wrong"), bool):
            raise RequestError(f'{place}: "wrong" must be true or false, not {item.get("wrong")!r}')
        numbers.append(known[name])
        wrong.append(item["wrong"])
        if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
            asked.append(run.measure(item["prompt"], item["completion"]))
    if asked and len(asked) != len(numbers):
        raise RequestError("prompt and completion must be given for every label or for none: some lines lack them")
    if all(wrong) or not any(wrong):
        raise RequestError(f"of {len(wrong)} labels {'all' if all(wrong) else 'none'} are wrong: there is nothing to tell apart")
    return Labels(numbers=np.array(numbers), wrong=np.array(wrong), asked=tuple(asked) or None)


def label_scores(run: Run, labels: Labels, progress: Progress) -> dict[str, NDArray[np.float64]]:
    """[M] by each score, larger where a label is suspected: self-influence and loss of the sequence, and where labels are known, of the label alone,
    and opposition to the other labels, to one and to all together. First, the ranks by self-influence and these two, added."""
    sequences = run.store.select(labels.numbers.tolist())
    whole = [Measurement(prompt="", completion=one.text, contrast=None, parts=((1.0, one),)) for one in sequences]
    model = run.language_model.model
    found = {"self-influence": run.self_influence[labels.numbers], "loss": query_losses(model, whole, 16)}
    if labels.asked is not None:
        own, opposed = self_influence(run, labels.asked, progress), opposition(run, labels.asked, sequences)
        strongest, summed = opposed.max(0), opposed.sum(0)
        found = {
            "ranks by the next three, added": rankdata(own) + rankdata(strongest) + rankdata(summed),
            "self-influence of the label": own,
            "opposition to one other label": strongest,
            "opposition to all other labels": summed,
            "loss of the label": query_losses(model, labels.asked, 16),
            **found,
        }
    return found


def self_influence(run: Run, measurements: Sequence[Measurement], progress: Progress) -> NDArray[np.float64]:
    """[M]: (1/N) ∇fᵀ (G + λI)⁻¹ ∇f of each measurement f: what one more copy of it alone would do for itself, in nats."""
    found = []
    for group in in_groups(measurements, run, None):
        total = np.zeros(len(group))
        for part in run.parts():
            factors = run.factors_of(part).factors
            for name, gradient in query_gradients(part, group, factors).gradients.items():
                total += (gradient.double().square() * factors[name].inverse()).flatten(1).sum(1).cpu().numpy()
        found.append(total)
        progress(sum(map(len, found)), len(measurements))
    return np.asarray(np.concatenate(found) / len(run.training))


def opposition(run: Run, measurements: Sequence[Measurement], sequences: Sequence[TrainingSequence]) -> NDArray[np.float64]:
    """[M, M]: minus the influence, in nats, of each sequence (column) on the label of another (row), and zero on its own: wrong labels contradict
    right ones."""
    groups = in_groups(measurements, run, None)
    scores = np.concatenate([scan_parts(solved(run, run.attributed, group, None).vectors, sequences) for group in groups])
    np.fill_diagonal(scores, 0)
    return np.asarray(-scores / len(run.training))


def auc(scores: NDArray[np.float64], wrong: NDArray[np.bool_]) -> Estimate:
    """The area under the ROC curve: the probability that a wrong label scores higher than a right one, ties counting half.

    The interval is of resamples among the wrong and among the right ones, each drawn with replacement.
    """
    high, low = scores[wrong], scores[~wrong]
    rng = np.random.default_rng(0)
    drawn = [_area(rng.choice(high, len(high)), rng.choice(low, len(low))) for _ in range(NUM_RESAMPLES)]
    return Estimate(value=_area(high, low), interval=central(np.array(drawn)))


def _area(high: NDArray[np.float64], low: NDArray[np.float64]) -> float:
    ranks = rankdata(np.concatenate([high, low]))[: len(high)]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))
