"""A tiny real run: a GPT-2 with a tokenizer of its own, some forty documents, and the pipeline over them in seconds.

What is built is kept below pytest's base temporary directory and shared by all tests of a session; a test that changes a run copies it first.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from influence.config import load_config
from influence.run import Run
from influence.run_directory import STAGES
from jobs import cli
from jobs.driver import run_all

POSITIONS = 32
END = "<|endoftext|>"

PLACES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth", "Tbilisi", "Dakar", "Lima", "Turin")
RIVERS = ("Tagus", "Aker", "Athi", "Machángara", "Red", "Swan", "Kura", "Senegal", "Rímac", "Po")
TRADES = ("glass", "timber", "coffee", "roses", "silk", "iron", "wine", "salt", "cotton", "motors")


def documents() -> list[dict[str, Any]]:
    """Forty short documents about ten towns, four kinds of them; some are longer than the model's positions."""
    found = []
    for number, (place, river, trade) in enumerate(zip(PLACES, RIVERS, TRADES, strict=True)):
        found += [
            ("gazetteer", f"{place} lies on the {river}. The town is known for its {trade}."),
            ("diary", f"We reached {place} in the rain — café closed, and bought {trade} by the river."),
            ("ledger", f"{number + 3} crates of {trade} shipped from {place} to {PLACES[number - 1]}."),
            (
                "letter",
                f"Dear friend, the {river} froze again. " + f"Nobody in {place} sells {trade} before spring." + " Nobody." * (number % 5),
            ),
        ]
    return [{"id": f"doc-{number:02d}", "text": text, "source": source} for number, (source, text) in enumerate(found)]


def tokenizer(texts: Iterable[str], size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, as GPT-2's."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False)


def model(vocabulary: int, seed: int = 0) -> Any:
    """Two layers of width 16."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return perturbed(lambda: GPT2LMHeadModel(config), seed)


def perturbed(make: Callable[[], Any], seed: int = 0) -> Any:
    """The model that is made, with weights large enough that no gradient is negligible."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = make()
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


@dataclass(frozen=True, kw_only=True)
class World:
    """What a run is made from: a model's directory and a file of documents."""

    model: Path
    data: Path

    def settings(self, directory: Path, **changes: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration as YAML would hold it; `changes` are laid over its sections, and a key whose value is None is left out."""
        base: dict[str, Any] = {
            "model": {"name": str(self.model)},
            "data": {"files": str(self.data), "metadata": ["source"], "sequence_length": POSITIONS, "sequences_per_shard": 16},
            "index": {"bytes_per_sequence": 1024, "recall_queries": 4},
            "run": {"dir": str(directory)},
        }
        for section, values in changes.items():
            merged = {**base.get(section, {}), **values}
            base[section] = {key: value for key, value in merged.items() if value is not None}
        return deepcopy(base)

    def copy(self, directory: Path) -> "World":
        """The same model and data in another place, to be changed."""
        shutil.copytree(self.model, directory / "model")
        shutil.copy(self.data, directory / "train.jsonl")
        return World(model=directory / "model", data=directory / "train.jsonl")


def small_world(factory: pytest.TempPathFactory) -> World:
    """The session's model and data, made on the first call."""
    directory = factory.getbasetemp() / "small-world"
    if not directory.exists():
        scratch = factory.mktemp("small-world")
        rows = documents()
        words = tokenizer(row["text"] for row in rows)
        words.save_pretrained(scratch / "model")
        model(len(words)).save_pretrained(scratch / "model")
        write_jsonl(scratch / "train.jsonl", rows)
        scratch.rename(directory)
    return World(model=directory / "model", data=directory / "train.jsonl")


def finished_run(factory: pytest.TempPathFactory) -> Path:
    """The session's finished run over `small_world`, undisturbed; made on the first call, never to be changed."""
    directory = factory.getbasetemp() / "finished"
    if not directory.exists():
        # Made under its final name: a run's files do not name their place, but its sources do, and they must stay true.
        run_pipeline(small_world(factory).settings(directory))
    return directory


def run_pipeline(settings: Mapping[str, Any]) -> Run:
    """Every stage of the run that these settings describe, in this process; on one thread, as `command` has it, so that the bytes are the same."""
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_all(load_config(None, flat))
    finally:
        torch.set_num_threads(before)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path: Path, settings: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(settings), allow_unicode=True), encoding="utf-8")
    return path


def alter_one_weight(directory: Path, change: Callable[[torch.Tensor], None]) -> None:
    """Saves the model in `directory` again with one weight changed in place, as a training step or a bad merge would."""
    loaded = GPT2LMHeadModel.from_pretrained(directory)
    with torch.no_grad():
        change(loaded.transformer.h[1].mlp.c_fc.weight[3, 5:6])
    loaded.save_pretrained(directory)


def artifacts(run: Path) -> dict[str, str]:
    """sha256 of every file below the stage directories, leftovers included."""
    files = [path for stage in STAGES for path in sorted((run / stage).rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def everything(run: Path) -> dict[str, tuple[int, str]]:
    """When each file and directory of a run was last changed, and to what; but for the lock, which says who worked on it last."""
    found = {}
    for parent, directories, files in os.walk(run):
        for name in [*directories, *files]:
            path = Path(parent, name)
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
            found[str(path.relative_to(run))] = (path.stat().st_mtime_ns, content)
    found.pop(".lock", None)
    return found


def command(*arguments: object) -> subprocess.Popen[str]:
    """The real command line in a process of its own, with one thread and no network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", "from jobs.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def forked(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that calls the function, forked from one that has imported what a run needs, which takes seconds, and does nothing else."""
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["pytest", "transformers.models.gpt2.modeling_gpt2", "influence.service", "jobs.cli"])
    process = start.Process(target=_called, args=(dict(os.environ), function, arguments), daemon=True)
    process.start()
    return process


def _called(environment: Mapping[str, str], function: Callable[..., object], arguments: Iterable[object]) -> None:
    os.environ.update(environment)
    function(*arguments)


def forked_command(scratch: Path, *arguments: object, most_bytes_per_file: int | None = None) -> "Outcome":
    """The command line in a process that is `forked`; what it said is kept in `scratch`.

    `most_bytes_per_file` makes longer writes fail, much as a full disk does; the signal for it would end the process before it can say so.
    """
    process = forked(_command, list(map(str, arguments)), scratch, most_bytes_per_file)
    process.join(timeout=300)
    assert process.exitcode is not None, "it does not end"
    return Outcome(process.exitcode, (scratch / "stdout").read_text(), (scratch / "stderr").read_text())


def _command(words: list[str], scratch: Path, most_bytes_per_file: int | None) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (scratch / name).open("wb") as stream:
            os.dup2(stream.fileno(), number)
    if most_bytes_per_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes_per_file, most_bytes_per_file))
    torch.set_num_threads(1)
    sys.argv[:] = ["influence", *words]
    cli.main()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a process that ends by itself."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


class Outcome(NamedTuple):
    """What a command left behind: exit status, standard output, standard error."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def says(self, message: str, status: int = 2) -> None:
        """One line of error that holds `message`, at the end of what is for people; nothing for machines."""
        *progress, last = self.err.splitlines()
        assert (self.status, self.out) == (status, "")
        assert last.startswith("error: ")
        assert message in last
        assert not [line for line in progress if "rror" in line]


Influence = Callable[..., Outcome]
