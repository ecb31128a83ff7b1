"""The one-way rule and the refusals that hold for whole packages, kept by walking the syntax trees of all modules.

A rule is a function from one module to what is wrong with it. Nothing is imported, so a rule cannot be evaded by an import inside a
function; an import under `TYPE_CHECKING` counts too, because it is knowledge all the same. Each rule is shown to catch its violation.
"""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ekfac", "indexing", "influence", "jobs")  # a package imports from those to its left and from itself

IN_JAX = (
    *("ekfac.jax_compiled", "ekfac.jax_devices", "ekfac.jax_marks", "ekfac.jax_model", "ekfac.jax_tape", "ekfac.jax_torch"),
    *("ekfac.flax_linen", "ekfac.flax_nnx"),
)

# Who may import what. A name on the right is a package or a module with everything below it.
ONLY_IN = {
    "ray": ("jobs",),
    "faiss": ("indexing",),
    "fsspec": ("influence.object_store",),
    "typer": ("jobs",),
    "fastapi": ("influence.service", "jobs"),
    "starlette": ("influence.service", "jobs"),
    "uvicorn": ("influence.service", "jobs"),
    "prometheus_client": ("influence.service",),
    "httpx": ("influence.client",),
    "jax": (*IN_JAX, "influence.jax_model"),
    "flax": ("ekfac.flax_linen", "ekfac.flax_nnx", "influence.jax_model"),
    "orbax": ("influence.jax_model",),
}
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
PICKLING_FUNCTIONS = ("torch.load", "torch.save", "pandas.read_pickle", "ray.cloudpickle")
NEVER_TRUE = ("allow_pickle", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class Module:
    name: str  # dotted, from the package down: "influence.report.html"
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


@cache
def modules(root: Path) -> list[Module]:
    """Every module of the four packages under `root`, also of those that are not there yet: none."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name=name, path=path, tree=ast.parse(path.read_text(encoding="utf-8"), filename=str(path))))
    return found


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def bindings(module: Module) -> Iterator[tuple[str, str]]:
    """(local name, dotted name of what it is) for every import statement, relative ones resolved."""
    base = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname or alias.name.split(".")[0], alias.name if alias.asname else alias.name.split(".")[0])
                yield ("", alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = base.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                yield (alias.asname or alias.name, f"{source}.{alias.name}".lstrip("."))


def dotted(expression: ast.expr, names: dict[str, str]) -> str:
    """The dotted name that an expression such as `np.load` stands for under this module's imports; empty if it is not one."""
    if isinstance(expression, ast.Name):
        return names.get(expression.id, expression.id)
    if isinstance(expression, ast.Attribute):
        left = dotted(expression.value, names)
        return f"{left}.{expression.attr}" if left else ""
    return ""


def calls(module: Module) -> Iterator[tuple[str, ast.Call]]:
    names = dict(bindings(module))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func, names), node


def imports(module: Module) -> set[str]:
    """Everything the module imports, by statement or by a literal given to `importlib.import_module` or `__import__`."""
    named = {name for _, name in bindings(module)}
    for function, call in calls(module):
        first = call.args[0] if call.args else None
        if function in ("importlib.import_module", "__import__") and isinstance(first, ast.Constant):
            named.add(str(first.value))
    return named


# --- the rules ---


def upward_imports(module: Module) -> list[str]:
    above = PACKAGES[PACKAGES.index(module.package) + 1 :]
    return [f"imports {name}, which is above it" for name in imports(module) if name.split(".")[0] in above]


def misplaced_libraries(module: Module) -> list[str]:
    return [
        f"imports {name}, which belongs in {' or '.join(places)}"
        for name in imports(module)
        for library, places in ONLY_IN.items()
        if within(name, library) and not any(within(module.name, place) for place in places)
    ]


def pickles(module: Module) -> list[str]:
    imported = [name for name in imports(module) if name.split(".")[0] in PICKLES or name in PICKLING_FUNCTIONS]
    called = [function for function, _ in calls(module) if function in PICKLING_FUNCTIONS]
    return [f"uses {name}: no pickle is read or written here" for name in imported + called]


def trusted_inputs(module: Module) -> list[str]:
    """`allow_pickle` or `trust_remote_code` that is anything but the literal False, as an argument or as a key of a dictionary."""
    given: list[tuple[object, ast.expr]] = []
    for function, call in calls(module):
        given += [(keyword.arg, keyword.value) for keyword in call.keywords]
        given += [("allow_pickle", value) for value in call.args[2:3] if function == "numpy.load"]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Dict):
            given += [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
    return [
        f"sets {name}: files and models of others must not run code"
        for name, value in given
        if name in NEVER_TRUE and not (isinstance(value, ast.Constant) and value.value is False)
    ]


def names_without_a_noun(module: Module) -> list[str]:
    return ["is named utils: say what it does"] if re.fullmatch(r"_?utils?", module.name.rpartition(".")[2]) else []


def missing_docstring(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else ["opens with no docstring: say what it does and what it does not know"]


RULES = (upward_imports, misplaced_libraries, pickles, trusted_inputs, names_without_a_noun, missing_docstring)
Rule = Callable[[Module], list[str]]


def violations(root: Path, rule: Rule) -> list[str]:
    return [f"{module.path.relative_to(root)} {wrong}" for module in modules(root) for wrong in sorted(rule(module))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps(rule: Rule) -> None:
    assert violations(ROOT, rule) == []


def test_every_directory_and_file_of_the_packages_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    directories = {str(module.path.parent.relative_to(ROOT)).replace("/", ".") for module in modules(ROOT)}
    assert directories <= set(setuptools["packages"]), "add it to [tool.setuptools] packages"
    others = [
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".py" and path.parent.name != "__pycache__"
    ]
    patterns = [f"{package.replace('.', '/')}/{pattern}" for package, globs in setuptools["package-data"].items() for pattern in globs]
    left_out = [str(path) for path in others if not any(fnmatch(str(path), pattern) for pattern in patterns)]
    assert left_out == [], "add it to [tool.setuptools.package-data]"


# --- the rules catch what they forbid, and nothing else ---

CAUGHT: list[tuple[Rule, str, str]] = [
    (upward_imports, "ekfac/a.py", "import influence"),
    (upward_imports, "ekfac/a.py", "from indexing.search import Candidates"),
    (upward_imports, "indexing/a.py", "def f():\n    from influence import data"),
    (upward_imports, "indexing/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jobs.cli"),
    (upward_imports, "influence/report/a.py", "from ... import jobs"),
    (upward_imports, "influence/a.py", "import importlib\nimportlib.import_module('jobs.cli')"),
    (misplaced_libraries, "influence/a.py", "import ray"),
    (misplaced_libraries, "influence/a.py", "from ray.data import Dataset"),
    (misplaced_libraries, "influence/a.py", "import faiss.contrib as contrib"),
    (misplaced_libraries, "jobs/a.py", "import faiss"),
    (misplaced_libraries, "influence/a.py", "import typer"),
    (misplaced_libraries, "influence/services.py", "import fastapi"),
    (misplaced_libraries, "ekfac/a.py", "import uvicorn"),
    (misplaced_libraries, "indexing/a.py", "from starlette import requests"),
    (misplaced_libraries, "influence/a.py", "import prometheus_client"),
    (misplaced_libraries, "jobs/a.py", "import httpx"),
    (pickles, "jobs/a.py", "import pickle"),
    (pickles, "jobs/a.py", "from ray import cloudpickle"),
    (pickles, "ekfac/a.py", "import torch as t\nt.load('x')"),
    (pickles, "ekfac/a.py", "from torch import load as read"),
    (pickles, "ekfac/a.py", "import torch.nn\ntorch.save({}, 'x')"),
    (trusted_inputs, "indexing/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (trusted_inputs, "indexing/a.py", "import numpy as np\nnp.load('x', None, True)"),
    (trusted_inputs, "influence/a.py", "def f(trust):\n    g(trust_remote_code=trust)"),
    (trusted_inputs, "influence/a.py", "options = {'trust_remote_code': True}"),
    (names_without_a_noun, "jobs/utils.py", ""),
    (names_without_a_noun, "jobs/utils/__init__.py", ""),
    (missing_docstring, "ekfac/a.py", "x = 1"),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (upward_imports, "jobs/a.py", "import ekfac, indexing, influence\nfrom . import cli"),
    (upward_imports, "influence/report/__init__.py", "from .. import data\nfrom . import jobs"),
    (upward_imports, "ekfac/a.py", "import influence_functions"),
    (misplaced_libraries, "jobs/a.py", "import ray.serve, typer, uvicorn"),
    (misplaced_libraries, "indexing/a.py", "import faiss, rayon"),
    (misplaced_libraries, "influence/service/app.py", "from starlette.applications import Starlette"),
    (misplaced_libraries, "influence/service.py", "import fastapi"),
    (misplaced_libraries, "influence/client.py", "import httpx"),
    (pickles, "ekfac/a.py", "import json\nfrom safetensors.torch import load_file\njson.load(open('x'))"),
    (trusted_inputs, "indexing/a.py", "import numpy as np\nnp.load('x', 'r')\nnp.load('x', allow_pickle=False)"),
    (names_without_a_noun, "jobs/utilities_of_a_bank.py", ""),
    (missing_docstring, "ekfac/a.py", '"""It adds."""'),
]


def planted(tmp_path: Path, path: str, source: str) -> Path:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    return tmp_path


@pytest.mark.parametrize(("rule", "path", "source"), CAUGHT)
def test_rule_catches(tmp_path: Path, rule: Rule, path: str, source: str) -> None:
    assert [wrong.split()[0] for wrong in violations(planted(tmp_path, path, source), rule)][:1] == [path]


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_rule_allows(tmp_path: Path, rule: Rule, path: str, source: str) -> None:
    assert violations(planted(tmp_path, path, source), rule) == []
