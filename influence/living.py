"""What changed in a run's index after it was built: sequences that were appended, removed, and erased from its files.

One small file, replaced in one step, tells it all; so whoever reads the run sees it before a change or after it. Numbers of sequences never
change: appended ones come after those that are there, and removed ones keep their place.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from influence.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Appended:
    """Sequences that came later, in units of their own."""

    name: str  # of their unit of sequences; those of their rows are called <name>-<shard>
    data: str  # fingerprint of the files they came from
    num_sequences: int


@dataclass(frozen=True, kw_only=True)
class Living:
    """The state of an index since it was built."""

    appended: tuple[Appended, ...] = ()
    removed: frozenset[int] = frozenset()  # numbers of sequences that no answer may hold
    erased: frozenset[int] = frozenset()  # those of them that are gone from the files as well
    replaced: Mapping[str, str] = field(default_factory=dict)  # "stage/unit": what the unit's directory is called instead

    @property
    def lexical_unit(self) -> str:
        """What the lexical index over just these texts is called, once something was appended or erased."""
        return "-".join(
            ["with", *(part.name.removeprefix("append-") for part in self.appended[-1:]), str(len(self.appended)), str(len(self.erased))]
        )

    def with_appended(self, part: Appended) -> "Living":
        return replace(self, appended=(*self.appended, part))

    def to_json(self) -> dict[str, Any]:
        return {
            "appended": [vars(part) for part in self.appended],
            "removed": sorted(self.removed),
            "erased": sorted(self.erased),
            "replaced": dict(self.replaced),
        }

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Living":
        """Raises RequestError when the text is not what `to_json` gives."""
        try:
            content = json.loads(text)
            living = cls(
                appended=tuple(Appended(**part) for part in content["appended"]),
                removed=frozenset(int(number) for number in content["removed"]),
                erased=frozenset(int(number) for number in content["erased"]),
                replaced={str(unit): str(name) for unit, name in content["replaced"].items()},
            )
            if min(living.removed, default=0) < 0 or not living.erased <= living.removed:
                raise ValueError
            return living
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RequestError(
                f"{where} is damaged: it does not tell what was appended and removed; restore it, for without it removed sequences would be back"
            ) from None
