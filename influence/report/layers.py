"""What a layer's name says: the block it sits in and the kind of module it is; and sums of scores by either.

Knows nothing of pages, queries or models: names are strings, scores are numbers.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# The first path component that is a number (transformer.h.3.mlp), or a flax-style layers_3.
_BLOCK = re.compile(r"(?:^|[./])(?:(?:layers?|blocks?|h)_)?(\d+)(?=[./]|$)")

# The first pattern that matches wins, so attention's own output projection is not taken for an MLP's.
_KINDS = (
    ("attention", re.compile(r"att(n|ention)|(^|[._/])([qkvo]_?proj|qkv|query|key|value)([._/]|$)", re.I)),
    (
        "MLP",
        re.compile(r"mlp|ffn?([._/\d]|$)|feed_?forward|expert|(^|[._/])(c_)?fc\d?([._/]|$)|intermediate|dense|(gate|up|down)_proj", re.I),
    ),
    ("embedding", re.compile(r"emb|(^|[._/])wt?[pt]e([._/]|$)", re.I)),
    ("normalisation", re.compile(r"norm|(^|[._/])ln", re.I)),
    ("head", re.compile(r"head|classifier|unembed", re.I)),
)


@dataclass(frozen=True, kw_only=True)
class LayerName:
    """A name taken apart: `stack` before the block number, `block`, and `module` after it (the whole name where there is no block)."""

    stack: str
    block: int | None
    module: str


def take_apart(name: str) -> LayerName:
    """The parts of a layer's name: `transformer.h.3.mlp.c_fc` is stack `transformer.h`, block 3, module `mlp.c_fc`."""
    found = _BLOCK.search(name)
    if found is None:
        return LayerName(stack=name, block=None, module=name)
    return LayerName(stack=name[: found.start()], block=int(found[1]), module=name[found.end() :].lstrip("./") or name)


def kind(name: str) -> str:
    """The kind of module a layer is, as far as its name tells: attention, MLP, embedding, normalisation, head or other."""
    module = take_apart(name).module
    return next((label for label, pattern in _KINDS if pattern.search(module)), "other")


def in_model_order(names: Iterable[str]) -> list[str]:
    """The distinct names in model order: as they first appear, except that the blocks of a stack come by number.

    A list that was sorted as text somewhere on its way (h.1, h.10, h.2) is thereby put right.
    """
    distinct = list(dict.fromkeys(names))
    parts = {name: take_apart(name) for name in distinct}
    stacks = {stack: place for place, stack in enumerate(dict.fromkeys(part.stack for part in parts.values()))}
    return sorted(distinct, key=lambda name: (stacks[parts[name].stack], parts[name].block or 0))


def signed_sums(
    sequences: Sequence[Mapping[str, float]], names: Sequence[str], group: Callable[[str], str | None]
) -> list[tuple[str, float, float]]:
    """Per group, in the order of `names`: the sum of the positive scores and the sum of the negative scores of its layers
    over all `sequences`. A layer whose group is None is left out."""
    sums: dict[str, tuple[float, float]] = {}
    for name in names:
        label = group(name)
        if label is None:
            continue
        values = [layers.get(name, 0.0) for layers in sequences]
        positive, negative = sums.get(label, (0.0, 0.0))
        sums[label] = positive + sum(v for v in values if v > 0), negative + sum(v for v in values if v < 0)
    return [(label, positive, negative) for label, (positive, negative) in sums.items()]


def row_by_block(names: Sequence[str]) -> Callable[[str], str]:
    """The function from a layer to its block's label, or to its own name where it lies outside of the blocks."""
    label = block_label(names)
    return lambda name: label(name) or name


def shares_by_family(
    queries: Sequence[tuple[str, Sequence[Mapping[str, float]]]],
    row: Callable[[Sequence[str]], Callable[[str], str]] = row_by_block,
) -> tuple[list[str], dict[str, list[float]]]:
    """(rows, family → share of each row): by `row`, blocks by depth and the layers outside of them.

    `queries` are (family, scores by layer of the sequences that helped). A query's share of a row is the row's part of what these sequences add up
    to in all layers, and a family's is the mean over its queries; a query whose sequences add up to nothing positive is left out.
    """
    names = in_model_order(name for _, sequences in queries for layers in sequences for name in layers)
    of = row(names)
    row_of = {name: of(name) for name in names}
    rows = list(dict.fromkeys(row_of.values()))
    found: dict[str, list[list[float]]] = {}
    for family, sequences in queries:
        sums = dict.fromkeys(rows, 0.0)
        for layers in sequences:
            for name, value in layers.items():
                sums[row_of[name]] += value
        total = sum(sums.values())
        if total > 0:
            found.setdefault(family, []).append([sums[row] / total for row in rows])
    return rows, {family: [sum(column) / len(column) for column in zip(*shares, strict=True)] for family, shares in found.items()}


def modules_of_a_block(names: Sequence[str]) -> list[str]:
    """The modules that every block has, in order, where all blocks have the same few; else none."""
    blocks: dict[tuple[str, int], list[str]] = {}
    for part in map(take_apart, names):
        if part.block is not None:
            blocks.setdefault((part.stack, part.block), []).append(part.module)
    first = next(iter(blocks.values()), [])
    return first if 1 < len(first) <= 8 and all(modules == first for modules in blocks.values()) else []


def with_ranges(names: Sequence[str]) -> list[str]:
    """The names, those that differ only in their block written as one: `h.0.ln_1`, `h.1.ln_1` and `h.3.ln_1` are `h.[0–1, 3].ln_1`."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = _BLOCK.search(name)
        key = (name[: found.start(1)], name[found.end(1) :]) if found else (name, "")
        blocks.setdefault(key, []).extend([int(found[1])] if found else [])
    return [
        f"{before}[{_ranges(numbers)}]{after}" if len(numbers) > 1 else f"{before}{''.join(map(str, numbers))}{after}"
        for (before, after), numbers in blocks.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def block_label(names: Sequence[str]) -> Callable[[str], str | None]:
    """The function from a name to its block's label: the number alone, or with its stack where the model has several stacks."""
    several = len({part.stack for part in map(take_apart, names) if part.block is not None}) > 1

    def label(name: str) -> str | None:
        part = take_apart(name)
        if part.block is None:
            return None
        return f"{part.stack} {part.block}" if several else str(part.block)

    return label
