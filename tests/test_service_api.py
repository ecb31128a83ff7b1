"""The contract of the HTTP interface: what OpenAPI says is what happens, for any input that a machine can think of."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from served import application
from test_service import run  # noqa: F401

from influence.errors import RequestError
from influence.service import Limits, ServiceSettings
from influence.service.answers import check_limits, kind_of, question_of
from influence.service.bodies import QueryBody
from influence.service.errors import without_paths
from influence.service.logs import JsonLines
from influence.service.settings import RUN_NAME, named_runs
from influence.service.tokens import Tokens, add_token, read_tokens, remove_tokens

settings.register_profile("seeded", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("seeded")

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
bodies = st.dictionaries(st.sampled_from([*QueryBody.model_fields, "unknown"]), values, max_size=6)
valid = st.fixed_dictionaries(
    {"prompt": st.text(), "completion": st.text(min_size=1)},
    optional={
        "k": st.integers(1, 100),
        "opponents": st.booleans(),
        "exact": st.booleans(),
        "normalize": st.booleans(),
        "bm25": st.booleans(),
        "candidates": st.none() | st.integers(1, 2000),
        "layers": st.lists(st.text(), max_size=3),
        "where": st.none() | st.text(),
        "contrast": st.none() | st.text(),
    },
)


@given(bodies)
def test_any_object_is_a_query_or_refused_as_one(body: dict[str, Any]) -> None:
    try:
        parsed = QueryBody.model_validate(body)
        check_limits(parsed, Limits())
    except (ValidationError, RequestError):
        return
    assert QueryBody.model_validate(parsed.model_dump(exclude_defaults=True)) == parsed
    assert parsed.options().k >= 1


@given(valid, valid)
def test_queries_are_answered_together_only_when_they_differ_in_nothing_but_the_question(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    first, second = QueryBody.model_validate(one), QueryBody.model_validate(other)
    alike = first.options() == second.options()
    assert (kind_of("run", ["index"], first) == kind_of("run", ["index"], second)) == alike
    assert kind_of("run", ["index"], first) != kind_of("another", ["index"], first)
    assert kind_of("run", ["index"], first) != kind_of("run", ["another"], first)
    assert (question_of(["state"], first) == question_of(["state"], second)) == (first == second)
    assert question_of(["state"], first) != question_of(["later"], first)


@given(st.text())
def test_no_name_of_a_run_leaves_its_directory(name: str) -> None:
    if RUN_NAME.fullmatch(name):
        assert Path("/runs", name).parent == Path("/runs")
        assert name not in (".", "..")


@given(st.text(alphabet="abc/. ", max_size=40), st.text(alphabet="abc/. ", max_size=40))
def test_known_paths_are_named_in_messages(before: str, after: str) -> None:
    path = "/srv/my runs/demo"
    assert path not in without_paths(f"{before} {path}/rows {after}", {path: "demo", "/srv/my runs": "the runs"})


def test_of_unknown_paths_the_last_part_is_told() -> None:
    message = "there is no model at /home/ada/models/gpt2: it is not '/home/ada/x.json', a/b, 1/2 or /."
    assert without_paths(message, {}) == "there is no model at gpt2: it is not 'x.json', a/b, 1/2 or /."


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/srv/my runs/demo is damaged", "demo is damaged"),
        ("no file /srv/my big old runs/demo/rows.npy: restore it", "no file rows.npy: restore it"),
        ("No such file or directory: '/srv/a b/it s/a file.json'", "No such file or directory: 'a file.json'"),
        ('No such file: "/srv/ada\'s/x.json"', 'No such file: "x.json"'),
        ("/secret is gone, and/or '/data'", "secret is gone, and/or 'data'"),
    ],
)
def test_no_part_but_the_last_of_an_unknown_path_is_told_spaces_or_not(message: str, told: str) -> None:
    assert without_paths(message, {}) == told


def test_a_file_of_tokens_keeps_no_token_and_knows_each(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    first, second = add_token(file, "ada", ("query",)), add_token(file, "ada", ("admin",))
    assert first not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    tokens = Tokens(file)
    users = [tokens.user(token) for token in (first, second, first[:-1], "", "\udcff")]
    assert [user and user.scopes for user in users] == [{"query"}, {"admin"}, None, None, None]
    assert len({entry["salt"] for entry in read_tokens(file)}) == 2
    assert remove_tokens(file, "ada") == 2
    assert tokens.user(first) is None
    with pytest.raises(RequestError, match="scopes are query and admin"):
        add_token(file, "ada", ("everything",))
    for content in ("", "[]", '{"tokens": [{"name": "x"}]}', '{"tokens": [{"name": "x", "scopes": ["root"], "salt": "00", "hash": "00"}]}'):
        file.write_text(content)
        with pytest.raises(RequestError, match="is no file of tokens"):
            Tokens(file)


def test_a_log_line_is_one_json_object() -> None:
    record = logging.makeLogRecord({"msg": "two\nlines %s", "args": ("here",), "levelname": "INFO", "run": Path("demo")})
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line) | {"message": "two\nlines here", "run": "demo"} == json.loads(line)


@pytest.fixture(scope="module")
def url(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    limits = Limits(refine_steps=2, refine_sequences=8)
    with application(ServiceSettings(runs=named_runs([run]), state_dir=tmp_path_factory.mktemp("state"), limits=limits)) as address:
        yield address


@pytest.mark.slow
def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    """Requests made from the OpenAPI document, valid and not, to every route, and sequences of them.

    Left out: the check that whatever fits the schema is accepted, because a condition or a text can be wrong in ways that no schema says; and
    event streams, which last as long as their query.
    """
    rejections = ["400", "401", "403", "404", "405", "409", "413", "422", "429", "503"]  # its own list has no 413
    (tmp_path / "schemathesis.toml").write_text(f"[checks]\nnegative_data_rejection.expected-statuses = {rejections}\n")
    words = [f"{url}/openapi.json", "--max-examples", "15", "--generation-deterministic", "--max-time", "30", "--no-color"]
    words += ["--exclude-checks", "positive_data_acceptance", "--exclude-path", "/v1/queries/{id}/events", "--continue-on-failure"]
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    done = subprocess.run([sys.executable, "-c", program, "run", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, "\n".join(line[:300] for line in done.stdout.partition("FAILURES")[2].splitlines()[:150])
