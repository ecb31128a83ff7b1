"""How a model was trained, written beside it, so that it can be trained again without some of its sequences.

The file `recipe.json` in the model's directory: `base`, the model before it was trained on the data (a directory, relative to the model's own when it
begins with a dot, or a hub id); `seed`; and the fields of `RetrainingSettings`, those that are left out having their defaults.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from influence.errors import RequestError
from influence.evaluation.retraining import RetrainingSettings

FILE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a model was trained from, and how."""

    base: str | None  # a directory or hub id
    seed: int
    settings: RetrainingSettings

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base, "seed": self.seed, **asdict(self.settings)}


def read_recipe(model: Path, changes: Mapping[str, Any]) -> Recipe:
    """The recipe beside the model, with the changed fields of base, seed and settings; defaults for what neither says.

    Raises RequestError when the file is no recipe, or a value is impossible.
    """
    path = model / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from None
    names = {field.name for field in fields(RetrainingSettings)}
    if not isinstance(found, dict) or found.keys() - names - {"base", "seed"}:
        unknown = f" (it has {min(found.keys() - names - {'base', 'seed'})!r})" if isinstance(found, dict) else ""
        raise RequestError(f"{path} is not a recipe{unknown}: expected base, seed, {', '.join(sorted(names))}")
    base = found.get("base")
    if isinstance(base, str) and base.startswith("."):
        base = str((model / base).resolve())
    merged = {"base": base, "seed": 0, **{key: value for key, value in found.items() if key != "base"}, **changes}
    base, seed = merged.pop("base"), merged.pop("seed")
    try:
        if not (base is None or isinstance(base, str)) or not isinstance(seed, int):
            raise TypeError(f"base is a name and seed a whole number, not {base!r} and {seed!r}")
        return Recipe(base=base, seed=seed, settings=RetrainingSettings(**merged))
    except TypeError as error:
        raise RequestError(f"{path}: {error}") from None
