"""Real English text that is on every machine with Python: the language reference and docstrings of the standard library.

The text comes from ``pydoc_data.topics`` and from the sources of well-documented modules, which are parsed and never
imported. Tables, grammar, code and headings are dropped; what is left is prose, cut into passages at paragraph ends.
The same Python gives the same passages; another version gives somewhat different ones. This module knows nothing of
tokens, of models or of the facts planted beside the text.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FEWEST_WORDS = 15
MOST_WORDS = 36

# Modules of CPython 3.11 and later with prose in their docstrings. One that is missing is passed over.
MODULES = (
    "_pydecimal", "_pyio", "argparse", "ast", "asyncio.base_events", "asyncio.events", "asyncio.locks", "asyncio.streams",
    "asyncio.tasks", "base64", "bdb", "bz2", "cmd", "code", "codecs", "compileall", "concurrent.futures.process", "configparser",
    "datetime", "difflib", "email.charset", "email.header", "email.headerregistry", "email.message", "email.parser",
    "email.policy", "enum", "fileinput", "ftplib", "functools", "getopt", "gzip", "http.client", "http.cookiejar",
    "http.server", "imaplib", "inspect", "ipaddress", "json", "json.decoder", "json.encoder", "logging", "logging.handlers",
    "lzma", "mimetypes", "optparse", "os", "pdb", "pickle", "pkgutil", "platform", "profile", "pstats", "queue", "random", "re",
    "sched", "shelve", "shutil", "site", "smtplib", "socket", "socketserver", "ssl", "statistics", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tkinter", "tokenize", "traceback", "turtle", "typing", "urllib.parse",
    "urllib.request", "uuid", "wave", "wsgiref.handlers", "xml.etree.ElementTree", "xml.sax.handler", "xml.sax.xmlreader",
    "xmlrpc.server", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One training document: a stable id such as ``topics/assignment/003``, its text, and where the text is from."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class Chapter:
    """Paragraphs that belong together: one topic of the language reference, or the docstrings of one module."""

    id: str
    source: str
    paragraphs: tuple[str, ...]


def library_passages(limit: int) -> list[Document]:
    """`limit` passages of the standard library's own documentation, taken at even steps through all there are.

    Each has `FEWEST_WORDS` to `MOST_WORDS` words, no paragraph is used twice, and `source` is ``topics`` or the module's name.

    Raises ValueError when this Python has fewer, as one installed without ``pydoc_data`` or without sources has.
    """
    topics, modules = topic_chapters(), module_chapters()
    found = [document for chapter in unrepeated([*topics, *modules]) for document in numbered(chapter)]
    if len(found) < limit:
        raise ValueError(
            f"{limit} passages were asked for, and this Python's standard library gives {len(found)} "
            f"({len(topics)} topics of pydoc_data, {len(modules)} modules with docstrings in {stdlib_directory()}). Use a Python "
            "installed with pydoc_data and the sources of its standard library, or ask for fewer."
        )
    return [found[position * len(found) // limit] for position in range(limit)]


def stdlib_directory() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def topic_chapters() -> list[Chapter]:
    """The language reference, topic by topic; empty where ``pydoc_data`` is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions pack it apart from the interpreter; library_passages says so when it matters
        return []
    return [Chapter(f"topics/{name}", "topics", tuple(paragraphs(topics[name]))) for name in sorted(topics)]


def module_chapters() -> list[Chapter]:
    """The docstrings of those of `MODULES` that this Python has sources of."""
    sources = ((name, module_source(name)) for name in MODULES)
    return [
        Chapter(name, name, tuple(part for text in docstrings_of(source) for part in paragraphs(text)))
        for name, source in sources
        if source is not None
    ]


def module_source(name: str) -> str | None:
    """The source of a standard-library module, or None where this Python has no file for it."""
    base = stdlib_directory().joinpath(*name.split("."))
    for path in (base.with_name(base.name + ".py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def docstrings_of(source: str) -> list[str]:
    """The docstrings of a module, its classes and its functions, in the order of the source."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, holders)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of prose, each on one line; list items lose their mark."""
    for block in re.split(r"\n[ \t]*\n", textwrap.dedent(text)):
        line = re.sub(r"^([*-]|\d+\.|\(\d+\)) ", "", " ".join(block.split()))
        if is_prose(line):
            yield line


def is_prose(line: str) -> bool:
    """Whether a paragraph is sentences, rather than code, grammar, a table, a heading or a signature."""
    words = line.split()
    plain = sum(re.fullmatch(r"[(\"'“*]*[A-Za-z][a-z'’-]*[)\"'”*.,:;!?]*", word) is not None for word in words)
    foreign = re.search(r">>>|::=|\+--|\.\. |={3}|-{4}|\*{4}|\| | = |\\[a-z]", line)
    ends = line.rstrip("\"')”*")[-1:] in {".", ":", "?", "!"}
    return foreign is None and ends and len(words) >= 6 and plain >= 0.75 * len(words)


def passages(parts: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined, or cut at sentence ends, into passages of `FEWEST_WORDS` to `MOST_WORDS` words.

    A passage that is still too short where the next paragraph would make it too long is dropped.
    """
    held: list[str] = []
    for part in parts:
        for piece in sentences(part) if len(part.split()) > MOST_WORDS else [part]:
            if count_words(held) + len(piece.split()) > MOST_WORDS:
                held = []
            held.append(piece)
            if FEWEST_WORDS <= count_words(held) <= MOST_WORDS:
                yield " ".join(held)
                held = []


def count_words(pieces: Iterable[str]) -> int:
    return sum(len(piece.split()) for piece in pieces)


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+(?=[A-Z\"“])", paragraph)


def numbered(chapter: Chapter) -> Iterator[Document]:
    for number, text in enumerate(passages(chapter.paragraphs)):
        yield Document(id=f"{chapter.id}/{number:03d}", text=text, source=chapter.source)


def unrepeated(chapters: Iterable[Chapter]) -> list[Chapter]:
    """The chapters without the paragraphs that have come before: topics of the reference quote one another."""
    seen: set[str] = set()
    kept = []
    for chapter in chapters:
        fresh = tuple(part for part in dict.fromkeys(chapter.paragraphs) if part not in seen)
        seen.update(fresh)
        kept.append(Chapter(chapter.id, chapter.source, fresh))
    return kept
