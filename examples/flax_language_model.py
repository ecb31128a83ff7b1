"""Trains a small Flax language model on real text with invented facts among it, and asks which sequences made it know a fact.

    python examples/flax_language_model.py --out runs/flax

The text is the Python standard library's own documentation, as in `influence demo`. The model is a linen transformer whose blocks are scanned and
rematerialised; `build` makes it from the settings in its config.json, which is all that `influence` needs to know. The run is opened again with

    INFLUENCE_FLAX=$PWD/examples/flax_language_model.py:build influence query runs/flax "The capital of France is" " Paris"
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from influence.config import load_config
from influence.evaluation.recall import Recall, numbers_by_id, planted_in, recall
from influence.jax_model import save_flax_model
from influence.run import Run
from influence.solving import solved
from jobs.demo.facts import Question, questions, statements
from jobs.demo.model import train_tokenizer
from jobs.demo.text import library_passages
from jobs.driver import run_all

SETTINGS = {"vocab_size": 2048, "max_position_embeddings": 64, "width": 128, "num_heads": 4, "num_layers": 2}


class Block(nn.Module):
    width: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        normed = nn.LayerNorm(name="attention_norm")(x)
        heads = (self.num_heads, self.width // self.num_heads)
        queries, keys, values = (nn.DenseGeneral(heads, name=name)(normed) for name in ("query", "key", "value"))
        seen = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x = x + nn.DenseGeneral(self.width, axis=(-2, -1), name="out")(seen)
        return x + nn.Dense(self.width, name="down")(nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="mlp_norm")(x)))), None


class LanguageModel(nn.Module):
    vocab_size: int
    max_position_embeddings: int
    width: int
    num_heads: int
    num_layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.05), name="tokens")
        positions = nn.Embed(self.max_position_embeddings, self.width, embedding_init=nn.initializers.normal(0.05), name="positions")
        x = table(tokens) + positions(jnp.arange(tokens.shape[1])[None])
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.num_layers
        )
        x, _ = blocks(self.width, self.num_heads, name="blocks")(x, None)
        return table.attend(nn.LayerNorm(name="norm")(x))


def build(settings: dict[str, Any]) -> LanguageModel:
    """The model that these settings describe."""
    return LanguageModel(**settings)


def train(tokenizer: Any, texts: Sequence[str], epochs: int, seed: int = 0) -> Any:
    """The variables of a model trained from nothing on `texts`."""
    model, length, batch_size = build(SETTINGS), SETTINGS["max_position_embeddings"], 8
    ids = [tokenizer(text)["input_ids"] for text in texts]
    pieces = [one[first : first + length] for one in ids for first in range(0, len(one), length) if len(one[first:]) > 1]
    tokens = np.zeros((len(pieces), length), np.int32)
    for row, piece in zip(tokens, pieces, strict=True):
        row[: len(piece)] = piece
    lengths = np.array([len(piece) for piece in pieces])
    steps = epochs * (len(pieces) // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 20, steps)
    optimizer = optax.adamw(schedule, weight_decay=0.25)
    variables = jax.jit(model.init)(jax.random.key(seed), tokens[:1])

    def loss(variables: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, tokens)[:, :-1], tokens[:, 1:])
        counted = jnp.arange(1, length)[None] < lengths[:, None]
        return (losses * counted).sum() / counted.sum()

    @jax.jit
    def step(variables: Any, state: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(variables, tokens, lengths)
        updates, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state, value

    state = optimizer.init(variables)
    for number, members in enumerate(_batches(len(pieces), batch_size, epochs, seed), 1):
        variables, state, value = step(variables, state, tokens[members], lengths[members])
        if number % 200 == 0 or number == steps:
            print(f"step {number} of {steps}, loss {float(value):.2f} nats a token", flush=True)
    return variables


def _batches(count: int, size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(count)
        yield from order[: count // size * size].reshape(-1, size)


def ask(run: Run, asked: Sequence[Question]) -> dict[str, Recall]:
    """How well the sequences that state a fact are found, by an exact scan with EK-FAC, normalized, and by words."""
    measurements = [run.measure(one.prompt, one.completion) for one in asked]
    vectors = solved(run, run.attributed, measurements, None).vectors
    numbers = numbers_by_id(run.store.ids, run.store.documents)
    planted = [planted_in({"states": sorted(one.proponents)}, one.id, numbers) for one in asked]
    lexical = np.array([run.lexical.scores(one.prompt + one.completion, len(run.store)) for one in asked])
    scores = run.exact_scores(vectors, len(asked)) * run.normalizing_weights
    return {"EK-FAC, normalized": recall(scores, planted), "BM25": recall(lexical, planted)}


def main() -> None:
    arguments = argparse.ArgumentParser(description="train a small Flax language model and ask where its answers come from")
    arguments.add_argument("--out", type=Path, default=Path("runs/flax"))
    arguments.add_argument("--epochs", type=int, default=10)
    arguments.add_argument("--passages", type=int, default=1300)
    arguments.add_argument("--questions", type=int, default=36, help="of each kind")
    given = arguments.parse_args()
    folder = given.out / "example"
    documents = library_passages(given.passages) + statements()
    if not (folder / "model" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in documents), encoding="utf-8")
        tokenizer = train_tokenizer([document.text for document in documents], SETTINGS["vocab_size"])
        tokenizer.save_pretrained(folder / "model")
        save_flax_model(folder / "model", train(tokenizer, [document.text for document in documents], given.epochs), SETTINGS)
    config = {
        "model.name": str(folder / "model"),
        "model.flax": f"{Path(__file__).resolve()}:build",
        "data.files": str(folder / "train.jsonl"),
        "data.metadata": ["source"],
        "data.sequence_length": SETTINGS["max_position_embeddings"],
        "run.dir": str(given.out),
    }
    run = run_all(load_config(None, config))
    print(f"{len(run.store):,} training sequences, {run.coverage.share:.0%} of {run.coverage.total:,} parameters attributed")
    shown = questions()[0]
    for sequence in run.query(shown.prompt, shown.completion, k=3).sequences:
        print(f"{shown.prompt}{shown.completion}: {sequence.score:+.3f} nats, {sequence.id}: {sequence.text[:100]!r}")
    for kind in ("ordinary", "swapped"):
        asked = [one for one in questions() if one.kind == kind][: given.questions]
        for name, found in ask(run, asked).items():
            print(
                f"{kind} questions by {name}: states it first {found.first.value:.0%}, MRR {found.reciprocal_rank.value:.3f}, "
                f"median rank {found.median_rank:.0f}"
            )


if __name__ == "__main__":
    main()
