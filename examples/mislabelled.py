"""Which labels of a training set are wrong? `ekfac` alone, on a convolutional network that tells from which package a piece of source code is.

The pieces are of Python's own standard library; a tenth of them get another package's label. After training, every piece is ranked by its
self-influence gᵀ(G + λI)⁻¹g, how much the model's loss on it rests on its having been trained on: what nothing else explains comes first. The
table compares that with the norm of the gradient and with the loss itself, which in so plain a case find about as many.

    python examples/mislabelled.py
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import ekfac

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest")
LENGTH = 96
Batch = tuple[Tensor, Tensor]


def pieces(per_package: int) -> Batch:
    """Bytes [N, LENGTH] of the packages' modules, spread evenly over their text, and the numbers of the packages [N]."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)
        step = (len(text) - LENGTH) // per_package
        texts += [list(text[start : start + LENGTH]) for start in range(0, step * per_package, step)]
        labels += [label] * per_package
    return torch.tensor(texts), torch.tensor(labels)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.first = nn.Conv1d(16, 48, 5, padding=2)
        self.second = nn.Conv1d(48, 48, 5, stride=2)
        self.head = nn.Linear(48, len(PACKAGES))

    def forward(self, pieces: Tensor) -> Tensor:
        x = functional.relu(self.first(self.embedding(pieces).mT))
        return self.head(functional.relu(self.second(x)).amax(2))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def loss_of_drawn_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Labels drawn from the model's own predictions make the Gauss-Newton Hessian out of squared gradients."""
    logits = model(batch[0])
    generator = torch.Generator().manual_seed(int(batch[0].sum()))
    drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, drawn, reduction="sum")


def every_piece(batch: Batch) -> Tensor:
    """The mask of a batch: the examples that count. Places within them follow from the layers."""
    return torch.ones(len(batch[1]), dtype=torch.bool)


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            (loss(model, (x[chosen], y[chosen])) / len(chosen)).backward()
            optimizer.step()
    return model.eval()


def ranked(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Self-influence, squared norm of the gradient and loss of every piece."""
    factors, coverage = ekfac.fit(model, batches, loss=loss_of_drawn_labels, mask=every_piece)
    print(f"attributed: {coverage.share:.0%} of {coverage.total:,} parameters, layers {', '.join(layer.name for layer in coverage.layers)}")
    own, norms = [], []
    for batch in batches:
        influence, norm = torch.zeros(len(batch[1])), torch.zeros(len(batch[1]))

        def consume(layer: ekfac.Layer, record: ekfac.Record, influence: Tensor = influence, norm: Tensor = norm) -> None:
            gradients = ekfac.sequence_gradients(record)
            influence += factors[layer.name].whiten(gradients).square().sum((1, 2))
            norm += gradients.square().sum((1, 2))

        ekfac.capture(model, coverage.layers, lambda batch=batch: loss(model, batch), every_piece(batch), consume)
        own.append(influence)
        norms.append(norm)
    with torch.no_grad():
        losses = torch.cat([functional.cross_entropy(model(x), y, reduction="none") for x, y in batches])
    return {"self-influence": torch.cat(own), "norm of the gradient": torch.cat(norms), "loss": losses}


def main(per_package: int, epochs: int) -> dict[str, float]:
    """How much of the wrong labels each ranking has among as many of its first pieces."""
    torch.manual_seed(0)
    x, y = pieces(per_package)
    wrong = torch.rand(len(y)) < 0.1
    y = torch.where(wrong, (y + torch.randint(1, len(PACKAGES), y.shape)) % len(PACKAGES), y)
    model = trained(x, y, epochs)
    count, batches = int(wrong.sum()), list(zip(x.split(64), y.split(64), strict=True))
    found = {name: float(wrong[values.argsort(descending=True)[:count]].double().mean()) for name, values in ranked(model, batches).items()}
    print(f"of {len(y):,} pieces {count} have a wrong label; among the first {count} by")
    for name, share in found.items():
        print(f"  {name:22} {share:.0%}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--per-package", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    main(given.per_package, given.epochs)
