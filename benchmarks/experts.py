"""What expert layers cost as more tokens are routed to each: Mixtral's architecture with 1, 2, 4 and 8 experts a token.

    python benchmarks/experts.py [--width 256 --inner 512 --experts 8 --length 128 --sequences 16]

One process, one thread, CPU seconds, the best of several. Only the experts' layers are attributed, so what differs is theirs; the plain forward and
backward pass of the same model (F) stands beside it.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import ekfac


def best(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the best of several calls, after one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def mixture(width: int, inner: int, experts: int, chosen: int, length: int) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            max_position_embeddings=length,
        )
    ).eval()


def plain(model: torch.nn.Module, batch: ekfac.SequenceBatch) -> None:
    model.zero_grad(set_to_none=True)
    ekfac.true_label_loss(model, batch).backward()


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name, value in (("width", 256), ("inner", 512), ("experts", 8), ("length", 128), ("sequences", 16), ("repeats", 3)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    tokens = torch.randint(512, (given.sequences, given.length), generator=torch.Generator().manual_seed(0))
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    batch = ekfac.SequenceBatch(tokens=tokens, counted=counted, keys=np.arange(given.sequences, dtype=np.uint64))
    print(f"{'experts a token':>16}{'F, s':>8}{'capture':>9}{'covariances':>13}{'eigenvalues':>13}{'scan of 4':>11}   in F")
    for chosen in (1, 2, 4, 8):
        model = mixture(given.width, given.inner, given.experts, chosen, given.length)
        unit = best(lambda model=model: plain(model, batch), given.repeats)  # type: ignore[misc]
        ratios = [best(work, given.repeats) / unit for work in passes(model, batch)]
        print(f"{chosen:>16}{unit:>8.2f}{ratios[0]:>9.2f}{ratios[1]:>13.2f}{ratios[2]:>13.2f}{ratios[3]:>11.2f}")


def passes(model: torch.nn.Module, batch: ekfac.SequenceBatch) -> list[Callable[[], object]]:
    """Of the experts' layers alone: capture, covariances, corrected eigenvalues, products with four vectors."""
    layers = ekfac.attributable_layers(model, lambda model: model(input_ids=batch.tokens[:1]), ["*experts*"]).layers
    drawn, reached = ekfac.drawn_label_loss(0), ekfac.reached_positions
    vectors = {
        name: ekfac.eigenbasis(one, "float32").vectors
        for name, one in ekfac.covariance_pass(model, layers, [batch], drawn, reached).items()
    }
    queries = {layer.name: torch.ones(4, *layer.shape) for layer in layers}

    def captured(consume: Callable[[ekfac.Layer, ekfac.Record], None]) -> None:
        ekfac.capture(model, layers, lambda: ekfac.true_label_loss(model, batch), batch.reached, consume)

    def scanned(layer: ekfac.Layer, record: ekfac.Record) -> None:
        ekfac.inner_products(record, queries[layer.name])

    return [
        lambda: captured(lambda *_: None),
        lambda: ekfac.covariance_pass(model, layers, [batch], drawn, reached),
        lambda: ekfac.eigenvalue_pass(model, layers, vectors, [batch], drawn, reached),
        lambda: captured(scanned),
    ]


if __name__ == "__main__":
    main()
