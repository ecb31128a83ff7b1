"""The tables of docs/evaluation.md that join several evaluations of the demo: what the first 1% by each method hold, removal, wrong labels.

    python benchmarks/demo.py runs/demo --removal removal-*.json --mislabel flipped-*/evaluations/mislabel.json

Knows a finished demo and the JSON that `influence evaluate RUN removal` and `mislabel` write: of other queries of one demo, of demos whose wrong
statements (`--flip-seed`) differ. Intervals of 95%: over queries, and over sets of wrong labels.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.evaluation.intervals import Estimate, mean, ratio
from influence.run import open_run
from jobs.demo.facts import Fact, facts, neighbours, questions

OURS, RIVAL = "ekfac-normalized", "bm25"
KINDS = ("statements of the fact", "its answer elsewhere", "the fact that is asked for", "its relation", "other facts", "real text")


def kind_of(stated: Fact | None, asked: Fact, answering: Fact) -> str:
    """Of `KINDS`, what a sequence is that states this fact, or none, to a question that asks for one fact and is answered by another."""
    if stated is None:
        return "real text"
    alike = (stated == answering, stated.answer == answering.answer, stated == asked, stated.relation == asked.relation, True)
    return KINDS[alike.index(True)]


def print_held(run_directory: str) -> None:
    run, known = open_run(run_directory), {fact.id: fact for fact in facts()}
    stated = [known.get(str(document).partition("/")[0]) for document in run.store.ids]
    first = round(0.01 * len(stated))
    swapped = [place for place, question in enumerate(questions()) if question.kind == "swapped"]
    print(" | ".join([f"of the first {first}", *KINDS]))
    with np.load(Path(run_directory) / "demo" / "scores.npz", allow_pickle=False) as scores:
        for method in ("ekfac", "ekfac-normalized", "gradient-cosine", "bm25"):
            orders = np.argsort(-scores[method][swapped], axis=1, kind="stable")[:, :first]
            found = Counter(kind_of(stated[number], *pair) for pair, order in zip(neighbours(), orders, strict=True) for number in order)
            print(" | ".join([method, *(f"{found[kind] / len(orders):.1f}" for kind in KINDS)]))


def print_removal(paths: Sequence[str]) -> None:
    found = [_json(path) for path in paths]
    for k in sorted({change["k"] for one in found for change in one["changes"]}):
        changes = {method: _changes(found, method, k) for method in (OURS, RIVAL)}
        print(f"the first {k} left out, {len(changes[OURS])} questions: ", end="")
        print(", ".join(f"{method} {told(mean(values))} nats" for method, values in changes.items()), end="; ")
        times = ratio(changes[OURS], changes[RIVAL])
        print(f"{told(times) if times else 'undefined'} times as far; farther in {int((changes[OURS] < changes[RIVAL]).sum())}")


def _changes(found: Sequence[Any], method: str, k: int) -> NDArray[np.float64]:
    """Of the questions of all files, in order."""
    wanted = [change["per_query"] for one in found for change in one["changes"] if (change["method"], change["k"]) == (method, k)]
    return np.concatenate(wanted)


def print_mislabel(paths: Sequence[str]) -> None:
    found = [_json(path)["scores"] for path in paths]
    for name in (score["name"] for score in found[0]):
        values = np.array([score["auc"] for scores in found for score in scores if score["name"] == name])
        print(" | ".join([name, *(f"{value:.2f}" for value in values), told(mean(values), 3)]))


def told(estimate: Estimate, digits: int = 2) -> str:
    low, high = estimate.ends
    return f"{estimate.value:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def _json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the demo's directory, finished")
    parser.add_argument("--removal", nargs="*", default=[], help="removal.json of different queries")
    parser.add_argument("--mislabel", nargs="*", default=[], help="mislabel.json of different sets of wrong labels")
    given = parser.parse_args()
    print_held(given.run)
    if given.removal:
        print_removal(given.removal)
    if given.mislabel:
        print_mislabel(given.mislabel)


if __name__ == "__main__":
    main()
