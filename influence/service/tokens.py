"""Who may ask: bearer tokens with scopes. The file holds salted hashes; a token itself is shown once, when it is made.

A token has 256 random bits, so one round of SHA-256 is enough: there is no dictionary to try.
"""

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from influence.errors import RequestError
from influence.run_directory import write_json

Scope = Literal["query", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, kw_only=True)
class User:
    """Who asks, and what they may: `query` to ask and read, `admin` to read metrics and to cancel the queries of others as well."""

    name: str
    scopes: frozenset[str]


LOCAL = User(name="local", scopes=frozenset(SCOPES))
"""Whoever asks a service without tokens, which listens to this machine only."""


class Tokens:
    """The tokens of a file, read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[tuple[int, int], list[dict[str, Any]]] | None = None
        self._entries()

    def user(self, token: str) -> User | None:
        """Whose token it is. Takes the same time for every token that is not in the file."""
        found = None
        for entry in self._entries():
            if hmac.compare_digest(_hash(token, entry["salt"]), entry["hash"]):
                found = User(name=entry["name"], scopes=frozenset(entry["scopes"]))
        return found

    def _entries(self) -> list[dict[str, Any]]:
        try:
            facts = self.path.stat()
        except OSError as error:
            raise RequestError(f"the file of tokens {self.path} cannot be read: {error.strerror}") from None
        version = (facts.st_mtime_ns, facts.st_size)
        if self._read is None or self._read[0] != version:
            self._read = (version, read_tokens(self.path))
        return self._read[1]


def read_tokens(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of tokens: name, scopes, salt, hash. Raises RequestError when it is not such a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for entry in content["tokens"]:
            known = isinstance(entry["name"], str) and set(entry["scopes"]) <= set(SCOPES)
            if not known or len(bytes.fromhex(entry["salt"])) < 16 or len(bytes.fromhex(entry["hash"])) != 32:
                raise ValueError
        return list(content["tokens"])
    except OSError as error:
        raise RequestError(f"the file of tokens {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{path} is no file of tokens: `influence tokens add` makes one") from None


def add_token(path: Path, name: str, scopes: tuple[str, ...]) -> str:
    """Adds a new token of this user to the file, which is made if it is not there, and returns it. Raises RequestError for an unknown scope."""
    if not scopes or not set(scopes) <= set(SCOPES):
        raise RequestError(f"scopes are {' and '.join(SCOPES)}, not {', '.join(scopes) or 'none'}")
    entries = read_tokens(path) if path.exists() else []
    token, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
    entries.append({"name": name, "scopes": list(scopes), "salt": salt, "hash": _hash(token, salt)})
    _write(path, entries)
    return token


def remove_tokens(path: Path, name: str) -> int:
    """Takes all tokens of this user out of the file; returns how many there were."""
    entries = read_tokens(path)
    kept = [entry for entry in entries if entry["name"] != name]
    _write(path, kept)
    return len(entries) - len(kept)


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    write_json(path, {"tokens": entries})
    path.chmod(0o600)


def _hash(token: str, salt: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + token.encode("utf-8", "surrogateescape")).hexdigest()
