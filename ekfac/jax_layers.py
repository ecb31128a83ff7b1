"""Which layers of a marked JAX model can be attributed, where each is found among its marks and parameters, and why others are left out.

A layer that is scanned over, whose parameters are stacked on a leading axis, is as many layers as the scan has steps: NAME.0, NAME.1, …
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import prod
from typing import Literal

from ekfac.jax_marks import Use
from ekfac.jax_tape import Place
from ekfac.layers import MAX_FACTOR_SIZE, Coverage, Layer

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter name → shape."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a layer stands in its model."""

    layer: Layer
    module: str  # without the steps of scans
    index: tuple[int, ...]  # of the scans' steps
    uses: tuple[str, ...]  # the keys of its marks
    weight: str
    bias: str | None
    source: int  # equal for layers that are fed the same value
    transposed: bool  # whether the parameter is [I, O], and not [O, I]


def coverage(
    found: Sequence[Place], shapes: Shapes, num_positions: int, num_outputs: int, patterns: Sequence[str]
) -> tuple[Coverage, dict[str, Site]]:
    """What can be attributed of a model with these marks, and the site of every such layer whether it matches the patterns or not.

    The model was traced for one sequence of so many positions, and gives so many outputs at each. Raises ValueError when a pattern matches no layer
    that can be attributed, or nothing is left.
    """
    by_module: dict[str, list[Place]] = {}
    for place in found:
        by_module.setdefault(place.mark.layer, []).append(place)
    rows = {shapes[place.mark.weight][len(place.lengths)] for place in found if place.mark.use == "lookup" and place.mark.weight in shapes}
    last = found[-1].mark.layer if found and num_outputs in rows else None  # of a language model, the head, if it is a layer of its own
    owners: dict[str, list[str]] = {}
    for name, own in by_module.items():
        owners.setdefault(own[0].mark.weight, []).append(name)
    sites: list[tuple[tuple[int, ...], Site]] = []
    excluded: dict[str, str] = {}
    for name, own in by_module.items():
        sharing = owners[own[0].mark.weight]
        judged = (
            f"{', '.join(sharing)} share their parameters" if len(sharing) > 1 else _judged(name, own, shapes, num_positions, name == last)
        )
        if isinstance(judged, str):
            excluded[name] = judged
        else:
            sites += [(own[0].lengths, site) for site in judged]
    ordered = list(_in_order(sites))
    _check(ordered, patterns)
    chosen = _grouped([site for site in ordered if matches(site, patterns)])
    used = {name for site in ordered for name in (site.weight, site.bias)}
    excluded |= {
        name.rpartition(".")[0]
        or name: "neither a dense layer, nor an embedding, nor an elementwise scale of the framework, called with one argument"
        for name in shapes
        if name not in used and (name.rpartition(".")[0] or name) not in excluded
    }
    excluded |= {site.layer.name: "not selected by the layer patterns" for site in ordered if not matches(site, patterns)}
    covered = Coverage(
        layers=chosen,
        attributed=sum(layer.shape[0] * layer.shape[1] for layer in chosen),
        total=sum(prod(shape) for shape in shapes.values()),
        excluded=dict(sorted(excluded.items())),
    )
    return covered, {site.layer.name: site for site in ordered}


def matches(site: Site, patterns: Sequence[str]) -> bool:
    """Whether a glob matches the layer's name, with or without the steps of scans."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in (site.layer.name, site.module) for pattern in patterns)


def _check(sites: Sequence[Site], patterns: Sequence[str]) -> None:
    names = [site.layer.name for site in sites]
    for pattern in patterns:
        if not any(matches(site, [pattern]) for site in sites):
            raise ValueError(
                f"no attributable layer matches {pattern!r}; there are {len(names)}, such as: {', '.join(names[:3]) or 'none'}"
            )
    if not names:
        raise ValueError("the model has no layer that can be attributed: dense, embedding or scale, called once in a forward pass")


def _in_order(sites: Iterable[tuple[tuple[int, ...], Site]]) -> Iterator[Site]:
    """As they are called: all layers of a scan's first step, then all of its second."""
    for _, group in groupby(sites, key=lambda one: one[0]):
        yield from sorted((site for _, site in group), key=lambda site: site.index)


def _judged(name: str, own: Sequence[Place], shapes: Shapes, num_positions: int, is_head: bool) -> list[Site] | str:
    """The layers that a module makes, or the reason to leave it out."""
    uses = {place.mark.use: place for place in own if place.mark.side == "out"}
    inputs = {place.mark.use: place for place in own if place.mark.side == "in"}
    first = next(iter(uses.values()), own[0])
    for place in own:
        if place.obstacle:
            return f"{place.obstacle}, where it cannot be captured"
    calls = len([place for place in own if place.mark.side == "out"])
    if calls != len(uses) or uses.keys() != inputs.keys() or len(own) != 2 * calls:
        return f"called {calls} times in one forward pass"
    if set(uses) not in ({"linear"}, {"scale"}, {"lookup"}, {"head"}, {"lookup", "head"}):
        return "used in several ways"
    mark, lengths = first.mark, first.lengths
    missing = [one for one in (mark.weight, mark.bias) if one is not None and one not in shapes]
    if missing:
        return f"its parameter {missing[0]} is not among the model's"
    steps = len(lengths)
    weight = shapes[mark.weight]
    if any(place.lengths != lengths for place in own):
        return "used inside and outside of a scan"
    sizes = _sizes(uses, inputs, num_positions)
    if isinstance(sizes, str):
        return sizes
    num_inputs, num_outputs = sizes
    expected = num_outputs if mark.use == "scale" else num_inputs * num_outputs
    if "lookup" in uses:
        num_outputs, expected = weight[steps] if len(weight) > steps else 0, 0
    if weight[:steps] != lengths or (expected and prod(weight[steps:]) != expected):
        if lengths and (not expected or prod(weight) == expected):
            return f"called {prod(lengths)} times in one forward pass: the steps of a scan share its parameters"
        return f"its parameter {mark.weight} has the shape {weight}, which is not that of what goes in and comes out"
    if mark.bias is not None and shapes[mark.bias][:steps] != lengths:
        return f"its bias {mark.bias} is not stacked as its weight is"
    if num_inputs + (mark.bias is not None) > MAX_FACTOR_SIZE:
        return f"a covariance of {num_inputs:,} × {num_inputs:,} would be needed"
    table = mark.use in ("lookup", "head") or (mark.use == "linear" and (is_head or num_outputs > MAX_FACTOR_SIZE))
    kind: Literal["linear", "embedding", "scale"] = "embedding" if table else "scale" if mark.use == "scale" else "linear"
    return [
        Site(
            layer=Layer(
                name=_named(name, index),
                kind=kind,
                inputs=num_inputs,
                outputs=num_outputs,
                bias=mark.bias is not None,
                input_group=_named(name, index),
                modules=(_named(name, index),),
            ),
            module=name,
            index=index,
            uses=tuple(place.mark.key for place in uses.values()),
            weight=mark.weight,
            bias=mark.bias,
            source=inputs[mark.use].source,
            transposed=mark.use == "linear",
        )
        for index in product(*map(range, lengths))
    ]


def _sizes(uses: Mapping[Use, Place], inputs: Mapping[Use, Place], num_positions: int) -> tuple[int, int] | str:
    """(inputs, outputs) of a position; those of a lookup are the width of its rows, twice."""
    found: list[tuple[int, int]] = []
    for use, out in uses.items():
        before, after = inputs[use].shape, out.shape
        for shape in (before, after):
            if shape[:1] != (num_positions,) and shape[:2] != (1, num_positions):
                return f"saw the shape {shape}, which does not begin with one sequence of {num_positions} positions"
        outputs = prod(after) // num_positions
        if use == "lookup" and prod(before) != num_positions:
            return f"embedding: called with the shape {before}, which is not one number for each position"
        if use == "scale":
            found.append((1, after[-1]))
        else:
            found.append((outputs if use == "lookup" else prod(before) // num_positions, outputs))
    widths = {one[0] for one in found}
    return found[0] if len(widths) == 1 else "its lookup and its use as a head differ in width"


def _grouped(sites: Sequence[Site]) -> tuple[Layer, ...]:
    """The layers, those that are linear and fed the same value with the first of them as their input group."""
    leaders: dict[tuple[int, tuple[int, ...], bool], str] = {}
    return tuple(
        replace(layer, input_group=leaders.setdefault((site.source, site.index, layer.bias), layer.name))
        if layer.kind == "linear"
        else layer
        for site in sites
        for layer in (site.layer,)
    )


def _named(name: str, index: tuple[int, ...]) -> str:
    return ".".join([name, *map(str, index)])
