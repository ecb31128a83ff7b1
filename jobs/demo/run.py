"""The demonstration: real text with invented facts among it, a model trained on it, and where the sequences that state the facts rank.

Everything lies in one run directory: `demo/` holds the data, the model, the questions and the scores, the rest is an ordinary run.
"""

import io
import json
import resource
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from influence.answering import QueryOptions
from influence.config import Config, load_config
from influence.errors import RequestError
from influence.evaluation.bank import query_digest
from influence.evaluation.retraining import query_losses
from influence.refinement import RefineOptions
from influence.run import Run
from influence.run_directory import RunDirectory, digest, write_file
from jobs.answers import answers_with_opponents, measurements_of, write_page
from jobs.demo.facts import Label, Question, questions, stated
from jobs.demo.model import TrainingSettings, train_model, train_tokenizer
from jobs.demo.text import Document, library_passages
from jobs.driver import run_all
from jobs.progress import bar, say
from jobs.recall import EXPLAINED, Recalls, read_planted, recall_table, recalls_of
from jobs.scoring import Tables, score_tables

NUM_PASSAGES = 1300
METHODS = {
    "index-normalized": "EK-FAC, normalized, index + exact rerank",
    "ekfac-normalized": "EK-FAC, normalized, exact scan",
    "index": "EK-FAC, index + exact rerank",
    "ekfac": "EK-FAC, exact scan",
    "gradient-cosine": "gradient cosine",
    "bm25": "BM25",
}


@dataclass(frozen=True, kw_only=True)
class DemoOutcome:
    """What the demo measured, and where everything is."""

    run: str
    report: str
    facts: dict[str, Any]  # sizes, how well the model knows the facts, how far the influence is covered
    recalls: Recalls
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        ranks = {kind: {method: found.to_json() for method, found in methods.items()} for kind, methods in self.recalls.items()}
        return {
            "run": self.run,
            "report": self.report,
            "facts": self.facts,
            "ranks": ranks,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def print(self, console: Console) -> None:
        facts = self.facts
        wrong = f" ({facts['wrong']} of them wrongly)" if facts["wrong"] else ""
        console.print(
            f"{facts['sequences']:,} training sequences, {facts['statements']} of which state {facts['facts']} invented facts{wrong}; "
            f"the model ({facts['parameters']:,} parameters) gives the right answer of an ordinary question a probability of "
            f"{facts['probability_ordinary']:.2f} (geometric mean), a swapped one {facts['probability_swapped']:.4f}."
        )
        for kind, explained in KINDS.items():
            named = {title: self.recalls[kind][method] for method, title in METHODS.items()}
            console.print(recall_table(f"{kind} questions: {explained}", named))
        console.print(EXPLAINED)
        console.print(f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB, {self.seconds:.0f} s; report: {self.report}")


KINDS = {
    "ordinary": "a fact in words that no sequence uses",
    "swapped": "another fact's answer after this one's prompt",
}


def run_demo(out: Path, workers: int, training: TrainingSettings, flip: float = 0.0, flip_seed: int = 0) -> DemoOutcome:
    """Brings the demo in the directory `out` to its end. Again after any interruption, it goes on; when finished, it only prints.

    A share `flip` of the statements gives a wrong answer, and `demo/labels.jsonl` says which; another `flip_seed` takes others.
    """
    start = time.monotonic()
    if not 0 <= flip < 1:
        raise RequestError(f"--flip is a share of the statements, from 0 to less than 1, not {flip}")
    statements, labels = stated(flip, flip_seed)
    prepare(out, library_passages(NUM_PASSAGES) + statements, labels, training)
    run = run_all(demo_config(out, workers, training.sequence_length))
    recalls, facts = measured(run, labels)
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
        recalls=recalls,
        seconds=round(time.monotonic() - start, 1),
        peak_memory_bytes=peak_memory_bytes(),
    )


def demo_config(out: Path, workers: int, sequence_length: int) -> Config:
    """The run's configuration, as a person would give it on the command line."""
    return load_config(
        None,
        {
            "model.name": str(out / "demo" / "model"),
            "data.files": str(out / "demo" / "train.jsonl"),
            "data.metadata": ["source"],
            # The facts' sequences are short: their influence is small beside the noise that long ones make in narrow rows.
            "data.sequence_length": sequence_length,
            "run.dir": str(out),
            "resources.workers": workers,
        },
    )


def prepare(out: Path, documents: Sequence[Document], labels: Sequence[Label], training: TrainingSettings) -> None:
    """The training data, the questions and the model trained on the data, in `out/demo`. Raises RequestError when `out` holds something else."""
    if out.exists() and any(out.iterdir()) and not (out / "demo").is_dir():
        raise RequestError(f"{out} is not empty and not a demo's directory: choose another one with --out")
    with RunDirectory(out).exclusive():
        folder = out / "demo"
        folder.mkdir(exist_ok=True)
        keep_lines(folder / "train.jsonl", [asdict(document) for document in documents])
        wrong = {label.id for label in labels if label.wrong}
        keep_lines(folder / "queries.jsonl", [_line(question, wrong) for question in questions()])
        if wrong:
            keep_lines(folder / "labels.jsonl", [asdict(label) for label in labels])
        with bar("training a model from nothing") as progress:
            tokenizer = train_tokenizer([document.text for document in documents], training.vocabulary_size)
            try:
                train_model(tokenizer, documents, training, folder / "model", progress.advance)
            except ValueError as error:
                raise RequestError(str(error)) from None


def _line(question: Question, wrong: Collection[str]) -> dict[str, Any]:
    """A question as a line of `queries.jsonl`, with the statements that are right."""
    states, opposes = sorted(question.proponents - set(wrong)), sorted(question.opponents - set(wrong))
    asked = {"id": question.id, "kind": question.kind, "prompt": question.prompt, "completion": question.completion}
    return asked | {"states": states} | ({"opposes": opposes} if opposes else {})


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


def measured(run: Run, labels: Sequence[Label]) -> tuple[Recalls, dict[str, Any]]:
    """Where the stating sequences rank, by kind of question and method, and facts about the model. The scores are kept in `demo/scores.npz`."""
    folder = run.directory.path / "demo"
    asked, planted = measurements_of(run, None, None, None, None, folder / "queries.jsonl"), read_planted(run, folder / "queries.jsonl")
    made_from = digest([run.fingerprints["fidelity"], [query_digest(measurement) for _, measurement in asked], list(METHODS)])
    tables = _kept_tables(folder / "scores.npz", made_from)
    if tables is None:
        tables = score_tables(run, tuple(METHODS), asked, RefineOptions(), {})
        tables[LOG_PROBABILITY] = -query_losses(run.language_model.model, [measurement for _, measurement in asked], 16)
        content = io.BytesIO()
        np.savez(content, **tables, made_from=np.array(made_from))  # type: ignore[arg-type]  # numpy's stub takes every keyword for allow_pickle
        write_file(folder / "scores.npz", content.getvalue())
    log_probabilities = tables.pop(LOG_PROBABILITY)
    probabilities = {kind: log_probabilities[[place for place, one in enumerate(planted) if one.kind == kind]] for kind in KINDS}
    facts = {
        "sequences": len(run.store),
        "statements": len(labels),
        "wrong": sum(label.wrong for label in labels),
        "facts": sum(one.kind == "ordinary" for one in planted),
        "parameters": run.coverage.total,
        **{f"probability_{kind}": float(np.exp(values.mean())) for kind, values in probabilities.items()},
    }
    return recalls_of(tables, planted), facts


LOG_PROBABILITY = "log-probability"


def _kept_tables(path: Path, made_from: str) -> Tables | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        if str(file["made_from"]) != made_from:
            return None
        return {name: file[name] for name in (*METHODS, LOG_PROBABILITY)}


def peak_memory_bytes() -> int:
    """The most memory this process has held; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
