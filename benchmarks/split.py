"""What splitting linear layers costs or saves: GPT-2's architecture whole, by projections and by heads.

    python benchmarks/split.py [--width 384 --heads 6 --length 128 --sequences 16 --repeats 3]

One process, one thread, CPU seconds, the best of several, in multiples of F, a plain forward and backward pass. The linear layers of the blocks are
attributed; eigendecompositions are a fixed cost.
"""

import argparse

import torch
from experts import best, plain
from transformers import GPT2Config, GPT2LMHeadModel

import ekfac

COLUMNS = ("covariances", "eigendecompositions", "eigenvalues", "gradients of 8", "solved", "products with 8")


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name, value in (("width", 384), ("heads", 6), ("length", 128), ("sequences", 16), ("repeats", 3)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_positions=given.length, n_embd=given.width, n_layer=2, n_head=given.heads)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(4096, (given.sequences, given.length), generator=torch.Generator().manual_seed(0))
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    batch = ekfac.SequenceBatch(tokens=tokens, counted=counted, keys=tokens.numpy()[:, 0].astype("uint64"))
    print(f"{'split':>12}{'layers':>8}" + "".join(f"{name:>21}" for name in COLUMNS) + "   in F")
    for split in ("none", "projections", "heads"):
        unit = best(lambda: plain(model, batch), given.repeats)
        count, ratios = passes(model, batch, split, given.repeats)
        print(f"{split:>12}{count:>8}" + "".join(f"{seconds / unit:>21.2f}" for seconds in ratios), flush=True)


def passes(model: torch.nn.Module, batch: ekfac.SequenceBatch, split: ekfac.Split, repeats: int) -> tuple[int, list[float]]:
    """How many layers there are, and the CPU seconds of each column."""
    patterns, example = ["*.attn.*", "*.mlp.*"], batch.tokens[:1]
    layers = ekfac.attributable_layers(model, lambda model: model(input_ids=example), patterns, split=split).layers
    drawn, reached = ekfac.drawn_label_loss(0), ekfac.reached_positions
    covariances = ekfac.covariance_pass(model, layers, [batch], drawn, reached)
    bases = {name: ekfac.eigenbasis(one, "float32") for name, one in covariances.items()}
    vectors = {name: basis.vectors for name, basis in bases.items()}
    sums = ekfac.eigenvalue_pass(model, layers, vectors, [batch], drawn, reached)
    factors = ekfac.assemble(layers, bases, sums, ekfac.Damping(value=0.1))
    queries = {layer.name: torch.ones(8, *layer.shape) for layer in layers}

    def rotated(layer: ekfac.Layer, record: ekfac.Record) -> None:
        for _ in ekfac.gradient_blocks(record, factors[layer.name].input_vectors, factors[layer.name].output_vectors):
            pass

    def captured(batch: ekfac.SequenceBatch, consume: object) -> None:
        ekfac.capture(model, layers, lambda: ekfac.true_label_loss(model, batch), batch.reached, consume)  # type: ignore[arg-type]

    asked = ekfac.SequenceBatch(tokens=batch.tokens[:8], counted=batch.counted[:8], keys=batch.keys[:8])
    work = (
        lambda: ekfac.covariance_pass(model, layers, [batch], drawn, reached),
        lambda: [ekfac.eigenbasis(one, "float32") for one in covariances.values()],
        lambda: ekfac.eigenvalue_pass(model, layers, vectors, [batch], drawn, reached),
        lambda: captured(asked, rotated),
        lambda: [factors[name].solve(query) for name, query in queries.items()],
        lambda: captured(batch, lambda layer, record: ekfac.inner_products(record, queries[layer.name])),
    )
    return len(layers), [best(one, repeats) for one in work]


if __name__ == "__main__":
    main()
