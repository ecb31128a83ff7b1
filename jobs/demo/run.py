"""The demonstration: real text with invented facts among it, a model trained on it, and where the sequences that state the facts rank.

Everything lies in one run directory: `demo/` holds the data, the model, the questions and the measured ranks, the rest is an ordinary run.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from influence.answering import QueryOptions, num_candidates
from influence.attribution import gradient_norms, query_gradients
from influence.config import Config, load_config
from influence.errors import RequestError
from influence.run import Run
from influence.run_directory import RunDirectory, digest, write_json
from influence.solving import solved
from jobs.answers import answers_with_opponents, write_page
from jobs.demo.facts import Question, questions, statements
from jobs.demo.model import TrainingSettings, train_model, train_tokenizer
from jobs.demo.text import Document, library_passages
from jobs.driver import run_all
from jobs.progress import bar, say

NUM_PASSAGES = 1300
METHODS = {
    "normalized": "EK-FAC, normalized, index + exact rerank",
    "normalized_exact": "EK-FAC, normalized, exact scan",
    "ekfac": "EK-FAC, index + exact rerank",
    "exact": "EK-FAC, exact scan",
    "cosine": "gradient cosine",
    "bm25": "BM25",
}


@dataclass(frozen=True, kw_only=True)
class DemoOutcome:
    """What the demo measured, and where everything is."""

    run: str
    report: str
    facts: dict[str, Any]  # sizes, how well the model knows the facts, how far the influence is covered
    ranks: dict[str, dict[str, dict[str, float]]]  # kind of question → method → figure
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def print(self, console: Console) -> None:
        facts = self.facts
        console.print(
            f"{facts['sequences']:,} training sequences, {facts['statements']} of which state {facts['facts']} invented facts; "
            f"the model ({facts['parameters']:,} parameters) gives the right answer of an ordinary question a probability of "
            f"{facts['probability_ordinary']:.2f} (geometric mean), a swapped one {facts['probability_swapped']:.4f}."
        )
        for kind, explained in KINDS.items():
            table = Table(
                "ranking by",
                "states it: first",
                "MRR",
                "of the top n",
                "median rank",
                title=f"{kind} questions: {explained}",
                title_justify="left",
            )
            for method, title in METHODS.items():
                row = self.ranks[kind][method]
                table.add_row(title, f"{row['first']:.0%}", f"{row['mrr']:.3f}", f"{row['top_n']:.0%}", f"{row['median_rank']:.0f}")
            console.print(table)
        console.print(
            "states it, first: the share of questions whose first result states the fact behind the completion; of the top n: the share of the "
            "top n results that do, n being how many there are; median rank: over all stating sequences."
        )
        against = self.ranks["swapped"]["normalized"]["opponents_bottom_n"]
        console.print(
            f"The sequences that state what is true instead are {against:.0%} of the n strongest opponents of the swapped completions (normalized)."
        )
        console.print(f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB, {self.seconds:.0f} s; report: {self.report}")


KINDS = {
    "ordinary": "a fact in words that no sequence uses",
    "swapped": "another fact's answer after this one's prompt",
}


def run_demo(out: Path, workers: int) -> DemoOutcome:
    """Brings the demo in the directory `out` to its end. Again after any interruption, it goes on; when finished, it only prints."""
    start = time.monotonic()
    documents = library_passages(NUM_PASSAGES) + statements()
    prepare(out, documents)
    run = run_all(demo_config(out, workers))
    ranks, facts = measured(run, questions())
    report = out / "report.html"
    if not report.exists():
        say("writing the report")
        shown = [question for kind in KINDS for question in questions() if question.kind == kind][::12]
        asked = [(question.id, run.measure(question.prompt, question.completion)) for question in shown]
        write_page(report, answers_with_opponents([run], asked, QueryOptions(normalize=True, bm25=True)), run)
    return DemoOutcome(
        run=str(out),
        report=str(report),
        facts=facts,
        ranks=ranks,
        seconds=round(time.monotonic() - start, 1),
        peak_memory_bytes=peak_memory_bytes(),
    )


def demo_config(out: Path, workers: int) -> Config:
    """The run's configuration, as a person would give it on the command line."""
    return load_config(
        None,
        {
            "model.name": str(out / "demo" / "model"),
            "data.files": str(out / "demo" / "train.jsonl"),
            "data.metadata": ["source"],
            # The facts' sequences are short: their influence is small beside the noise that long ones make in narrow rows.
            "data.sequence_length": TrainingSettings().sequence_length,
            "run.dir": str(out),
            "resources.workers": workers,
        },
    )


def prepare(out: Path, documents: Sequence[Document]) -> None:
    """The training data, the questions and the model trained on the data, in `out/demo`. Raises RequestError when `out` holds something else."""
    if out.exists() and any(out.iterdir()) and not (out / "demo").is_dir():
        raise RequestError(f"{out} is not empty and not a demo's directory: choose another one with --out")
    with RunDirectory(out).exclusive():
        folder = out / "demo"
        folder.mkdir(exist_ok=True)
        keep_lines(folder / "train.jsonl", [asdict(document) for document in documents])
        asked = [{"id": q.id, "kind": q.kind, "prompt": q.prompt, "completion": q.completion} for q in questions()]
        keep_lines(folder / "queries.jsonl", asked)
        settings = TrainingSettings()
        with bar("training a model from nothing") as progress:
            tokenizer = train_tokenizer([document.text for document in documents], settings.vocabulary_size)
            try:
                train_model(tokenizer, documents, settings, folder / "model", progress.advance)
            except ValueError as error:
                raise RequestError(str(error)) from None


def keep_lines(path: Path, items: Sequence[dict[str, Any]]) -> None:
    """Writes a jsonl file, or checks that the one that is there says the same."""
    content = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    if not path.exists():
        scratch = path.with_suffix(".partial")
        scratch.write_text(content, encoding="utf-8")
        scratch.rename(path)
    elif path.read_text(encoding="utf-8") != content:
        raise RequestError(
            f"{path} differs from what this version of the demo makes (or this Python's library text does): choose another --out"
        )


def measured(run: Run, asked: Sequence[Question]) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, Any]]:
    """Where the stating sequences rank, by kind of question and method, and facts about the model. Kept in `demo/measured.json`."""
    path = run.directory.path / "demo" / "measured.json"
    made_from = digest([run.fingerprints["fidelity"], [[q.id, q.prompt, q.completion] for q in asked], list(METHODS)])
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["made_from"] == made_from:
            return kept["ranks"], kept["facts"]
    scores, log_probabilities = scores_by_method(run, asked)
    documents = [sequence.document for sequence in run.store]
    kinds = {kind: [place for place, question in enumerate(asked) if question.kind == kind] for kind in KINDS}
    ranks = {
        kind: {method: figures([scores[method][p] for p in places], [asked[p] for p in places], documents) for method in METHODS}
        for kind, places in kinds.items()
    }
    facts = {
        "sequences": len(run.store),
        "statements": len(statements()),
        "facts": len({question.id for question in asked if question.kind == "ordinary"}),
        "parameters": run.coverage.total,
        **{f"probability_{kind}": float(np.exp(np.mean(log_probabilities[places]))) for kind, places in kinds.items()},
    }
    write_json(path, {"made_from": made_from, "ranks": ranks, "facts": facts})
    return ranks, facts


def scores_by_method(run: Run, asked: Sequence[Question]) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """[Q, N] scores of every training sequence by each method, and the completions' log-probabilities [Q]."""
    measurements = [run.measure(question.prompt, question.completion) for question in asked]
    found = solved(run, run.attributed, measurements, None, rows=True)
    assert found.rows is not None
    with bar("scanning all sequences with EK-FAC") as progress:
        exact = run.exact_scores(found.vectors, len(asked), progress.advance)
    with bar("scanning all sequences with plain gradients") as progress:
        gradients = [(run.attributed, query_gradients(run.attributed, measurements).gradients)]
        dots = run.exact_scores(gradients, len(asked), progress.advance)
    norms = np.concatenate([gradient_norms(run.attributed, run.store.shard(shard)) for shard in range(run.store.num_shards)])
    lexical = np.stack([run.lexical.scores(question.prompt + question.completion, len(run.store)) for question in asked])
    scores = {
        "normalized": answered(run, True, found.rows, exact * run.normalizing_weights),
        "normalized_exact": exact * run.normalizing_weights,
        "ekfac": answered(run, False, found.rows, exact),
        "exact": exact,
        "cosine": dots / norms,
        "bm25": lexical,
    }
    return scores, np.array([sum(part.sum() for part in parts) for parts in found.log_probabilities])


def answered(run: Run, normalized: bool, rows: NDArray[np.float32], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """What answers say of the exact scores: those of the candidates on either side; nothing, zero, of the sequences between them."""
    known = np.zeros_like(exact)
    index = run.normalized_index if normalized else run.index
    for opponents, side in ((False, rows), (True, -rows)):
        candidates = index.search(side, num_candidates(run, QueryOptions(normalize=normalized), opponents)).numbers
        np.put_along_axis(known, candidates, np.take_along_axis(exact, candidates, axis=1), axis=1)
    return known


def figures(scores: Sequence[NDArray[np.float64]], asked: Sequence[Question], documents: Sequence[str]) -> dict[str, float]:
    """How well scores find the stating sequences: averages over questions, and the median rank over stating sequences."""
    first, reciprocal, top_n, every_rank, bottom_n = [], [], [], [], []
    for row, question in zip(scores, asked, strict=True):
        order = np.argsort(-row, kind="stable")
        ranks = [rank for rank, number in enumerate(order, 1) if documents[number] in question.proponents]
        first.append(ranks[0] == 1)
        reciprocal.append(1 / ranks[0])
        top_n.append(sum(rank <= len(ranks) for rank in ranks) / len(ranks))
        every_rank += ranks
        if question.opponents:
            last = order[::-1][: len(question.opponents)]
            bottom_n.append(sum(documents[number] in question.opponents for number in last) / len(last))
    found = {
        "first": float(np.mean(first)),
        "mrr": float(np.mean(reciprocal)),
        "top_n": float(np.mean(top_n)),
        "median_rank": float(np.median(every_rank)),
    }
    return found | ({"opponents_bottom_n": float(np.mean(bottom_n))} if bottom_n else {})


def peak_memory_bytes() -> int:
    """The most memory this process has held; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
