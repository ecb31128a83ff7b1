"""Running a marked JAX model's jaxpr with zero taps added to its layers' outputs, and its layers' inputs as further results.

The model is not changed: what is run is its jaxpr. Marks within `lax.scan`, rematerialised blocks and nested `jit` are reached by running these anew;
the taps of a scanned layer, and what it saw, have the scan's length as a leading axis. Gradients with respect to the taps are the output gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.api_util import debug_info
from jax.extend import core

from ekfac.jax_marks import Mark, read_mark

OUTPUT = "output"
"""Where `run` puts the value of the place that is asked for, among the inputs of layers."""

_REMAT = ("checkpoint", "remat", "remat2")
_JIT = ("jit", "pjit", "closed_call", "core_call")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a mark stands in a model."""

    mark: Mark
    shape: tuple[int, ...]  # of the marked value, without the scans'
    dtype: Any
    lengths: tuple[int, ...]  # of the scans around it, from the outermost
    source: int  # equal for marks on the same value
    obstacle: str | None  # what keeps the mark from being reached

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self.lengths + self.shape


def places(jaxpr: Any, lengths: tuple[int, ...] = (), obstacle: str | None = None) -> Iterator[Place]:
    """Every mark in a jaxpr and in those within it, in the order of their calls."""
    for equation in jaxpr.eqns:
        mark = read_mark(equation.primitive, equation.params)
        if mark is not None:
            value = equation.invars[0]
            yield Place(mark=mark, shape=value.aval.shape, dtype=value.aval.dtype, lengths=lengths, source=id(value), obstacle=obstacle)
            continue
        name = equation.primitive.name
        within = (*lengths, equation.params["length"]) if name == "scan" else lengths
        blocked = obstacle or (None if name in ("scan", *_REMAT, *_JIT) else f"stands inside {name}")
        for inner in _inner(equation):
            yield from places(inner, within, blocked)


def run(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], taps: Mapping[str, Any], output: str | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """The jaxpr's results with `taps` added to the layers' outputs, and the inputs of the layers that are tapped, both by the marks' key.

    With `output`, the key of a mark, what comes out there too, as `OUTPUT`.
    """
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
    seen: dict[str, Any] = {}
    for equation in jaxpr.eqns:
        given = [one.val if isinstance(one, core.Literal) else values[one] for one in equation.invars]
        results, more = _step(equation, given, taps, output)
        seen |= more
        values.update(zip(equation.outvars, results, strict=True))
    return [one.val if isinstance(one, core.Literal) else values[one] for one in jaxpr.outvars], seen


def _step(equation: Any, given: list[Any], taps: Mapping[str, Any], output: str | None) -> tuple[list[Any], dict[str, Any]]:
    mark = read_mark(equation.primitive, equation.params)
    if mark is not None:
        if mark.side == "in":
            return given, {mark.key: given[0]} if mark.key in taps else {}
        value = given[0] + taps[mark.key] if mark.key in taps else given[0]
        return [value], {OUTPUT: value} if mark.key == output else {}
    keys = {place.mark.key for inner in _inner(equation) for place in places(inner)}
    own = {key: tap for key, tap in taps.items() if key in keys}
    if not own and output not in keys:
        return _evaluated(equation, given), {}
    if equation.primitive.name == "scan":
        return _scanned(equation.params, given, own, output)
    (inner,) = _inner(equation)
    constants = _constants(equation)
    if equation.primitive.name in _REMAT:
        again = jax.checkpoint(
            lambda arguments, taps: run(inner, constants, arguments, taps, output),
            prevent_cse=equation.params["prevent_cse"],
            policy=equation.params["policy"],
        )
        results, seen = again(given, own)
        return list(results), dict(seen)
    return run(inner, constants, given, own, output)


def _evaluated(equation: Any, given: list[Any]) -> list[Any]:
    """What the equation gives, as it stands; by JAX's own evaluation of a jaxpr that holds nothing else."""
    variables = {one: value for one, value in zip(equation.invars, given, strict=True) if not isinstance(one, core.Literal)}
    about = debug_info("tape", _evaluated, (equation, given), {})
    alone = core.Jaxpr((), list(variables), equation.outvars, [equation], equation.effects, about.with_unknown_names())
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*variables.values()))


def _scanned(
    parameters: Mapping[str, Any], given: list[Any], taps: Mapping[str, Any], output: str | None
) -> tuple[list[Any], dict[str, Any]]:
    closed, first, last = parameters["jaxpr"], parameters["num_consts"], parameters["num_consts"] + parameters["num_carry"]

    def body(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
        results, seen = run(closed.jaxpr, closed.consts, [*given[:first], *carry, *slices[0]], slices[1], output)
        return results[: parameters["num_carry"]], (results[parameters["num_carry"] :], seen)

    carry, (results, seen) = jax.lax.scan(
        body,
        given[first:last],
        (given[last:], dict(taps)),
        length=parameters["length"],
        reverse=parameters["reverse"],
        unroll=parameters["unroll"],
    )
    return [*carry, *results], seen


def multiplications(jaxpr: Any) -> int:
    """How many multiplications a jaxpr's products of matrices and convolutions take; those of a loop without a known length once."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [one.aval.shape for one in equation.invars]
        if equation.primitive.name == "dot_general":
            summed = equation.params["dimension_numbers"][0][0]
            total += prod(equation.outvars[0].aval.shape) * prod(shapes[0][axis] for axis in summed)
        elif equation.primitive.name == "conv_general_dilated":
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            total += prod(equation.outvars[0].aval.shape) * prod(shapes[1]) // shapes[1][outputs]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(multiplications(inner) for inner in _inner(equation))
    return total


def _inner(equation: Any) -> list[Any]:
    """The jaxprs that an equation holds."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _constants(equation: Any) -> Sequence[Any]:
    return next((value.consts for value in equation.params.values() if isinstance(value, core.ClosedJaxpr)), ())
