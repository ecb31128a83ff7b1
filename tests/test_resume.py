"""A run that was stopped, disturbed or moved: it goes on to the same bytes, or says why not, and is never changed by a refusal."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    POSITIONS,
    World,
    alter_one_weight,
    artifacts,
    documents,
    everything,
    forked,
    forked_command,
    run_pipeline,
    tokenizer,
    write_jsonl,
    write_yaml,
)

from influence.errors import RequestError
from influence.run import Run
from influence.run_directory import FORMAT, STAGES, RunDirectory
from jobs import stages

PROMPT, COMPLETION = "Lisbon lies on", " the Tagus."
SLOW = pytest.mark.slow


def wait_for(pattern: str, run: Path, process: BaseProcess) -> None:
    """Returns as soon as something in the run directory matches."""
    deadline = time.monotonic() + 240
    while not any(run.glob(pattern)):
        assert process.exitcode is None, f"the run ended before {pattern} appeared"
        assert time.monotonic() < deadline, f"{pattern} did not appear"
        time.sleep(0.0005)


# killed


@pytest.mark.parametrize(
    "pattern",
    [
        "covariances/.partial-*",
        "rows/part-00001",
        *(pytest.param(pattern, marks=SLOW) for pattern in ("run.json", ".lock", "progress.json")),
        *(pytest.param(f"{stage}/.partial-*", marks=SLOW) for stage in STAGES if stage != "covariances"),
        *(pytest.param(f"{stage}/[!.]*", marks=SLOW) for stage in STAGES),
        pytest.param("eigenvalues/part-00002", marks=SLOW),
    ],
)
def test_run_killed_at_any_moment_goes_on_to_the_same_bytes(pattern: str, world: World, finished: Path, tmp_path: Path) -> None:
    settings = world.settings(tmp_path / "run")
    process = forked(run_pipeline, settings)
    wait_for(pattern, tmp_path / "run", process)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        pytest.skip(f"the run was done before it could be killed at {pattern}")
    run_pipeline(settings)
    assert artifacts(tmp_path / "run") == artifacts(finished)
    assert not list((tmp_path / "run").rglob(".partial-*"))


def test_run_that_fails_in_each_stage_goes_on_to_the_same_bytes(
    world: World, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, seen = world.settings(tmp_path / "run"), set()
    work = stages.do_unit

    def fails_at_first(stage: stages.Stage, run: Run, config: Any, unit: str) -> None:
        if stage.name not in seen:
            seen.add(stage.name)
            raise OSError(f"the machine went away in {stage.name}")
        work(stage, run, config, unit)

    monkeypatch.setattr("jobs.executors.do_unit", fails_at_first)
    for stage in STAGES:
        with pytest.raises(OSError, match=stage):
            run_pipeline(settings)
    run_pipeline(settings)
    assert artifacts(tmp_path / "run") == artifacts(finished)


def test_leftovers_of_a_killed_process_are_cleared(world: World, finished: Path, copy: Path) -> None:
    left = copy / "rows" / ".partial-abc"
    left.mkdir()
    (left / "rows.npy").write_bytes(b"half")
    run_pipeline(world.settings(copy))
    assert artifacts(copy) == artifacts(finished)


def test_finished_run_is_left_alone_and_run_again_at_once(world: World, copy: Path) -> None:
    before, start = everything(copy), time.monotonic()
    run_pipeline(world.settings(copy))
    assert time.monotonic() - start < 5
    assert everything(copy) == before


# damaged


def truncate(unit: Path) -> None:
    path = next(path for path in sorted(unit.iterdir()) if path.name != "record.json")
    os.truncate(path, path.stat().st_size // 2)


def remove_file(unit: Path) -> None:
    next(path for path in sorted(unit.iterdir()) if path.name != "record.json").unlink()


def record(text: str) -> Callable[[Path], None]:
    def change(unit: Path) -> None:
        (unit / "record.json").write_text(text)

    return change


DAMAGES = {
    "truncated file": truncate,
    "missing file": remove_file,
    "no record": lambda unit: (unit / "record.json").unlink(),
    "half a record": record('{"fingerprint": "sha2'),
    "empty record": record(""),
    "record of another kind": record("[]"),
    "record without facts": record('{"fingerprint": "x", "files": {"rows.npy": 3}}'),
    "emptied": lambda unit: [path.unlink() for path in unit.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("unit", ["rows/part-00001", "factors/all", "sequences/all"])
def test_damaged_unit_is_never_taken_for_whole(damage: str, unit: str, world: World, finished: Path, copy: Path) -> None:
    DAMAGES[damage](copy / unit)
    before = everything(copy)
    for attempt in (
        lambda: run_pipeline(world.settings(copy)),
        lambda: Run(copy).query(PROMPT, COMPLETION),
    ):
        with pytest.raises(RequestError, match=f"{unit}.*(damaged|missing).*delete .*{unit} to have it made again"):
            attempt()
    assert everything(copy) == before
    shutil.rmtree(copy / unit)  # as the message says
    run_pipeline(world.settings(copy))
    assert artifacts(copy) == artifacts(finished)


def test_unit_of_another_run_is_refused(world: World, finished: Path, copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_pipeline(world.settings(other, factors={"damping": 0.5}))
    shutil.rmtree(copy / "factors")
    shutil.copytree(other / "factors", copy / "factors")
    with pytest.raises(RequestError, match="factors/all was made from something else"):
        run_pipeline(world.settings(copy))
    with pytest.raises(RequestError, match="factors/all was made from something else"):
        Run(copy).query(PROMPT, COMPLETION)


# made from something else


def changed_weights(world: World) -> None:
    alter_one_weight(world.model, lambda weight: weight.add_(1e-3))


def changed_tokenizer(world: World) -> None:
    tokenizer(row["text"][::-1] for row in documents()).save_pretrained(world.model)


def changed_data(world: World) -> None:
    write_jsonl(world.data, [*documents()[:-1], {**documents()[-1], "text": "Something else was written here."}])


CHANGES = {"model": changed_weights, "tokenizer": changed_tokenizer, "data": changed_data}


@pytest.mark.parametrize("what", CHANGES)
def test_run_made_from_something_else_is_refused_and_left_as_it_is(what: str, world: World, copy: Path, tmp_path: Path) -> None:
    other = world.copy(tmp_path)
    run_pipeline(other.settings(copy))  # another place of the same things is no difference, but for what is reported
    CHANGES[what](other)
    before = everything(copy)
    with pytest.raises(RequestError, match=f"was made with fingerprints.{what} = .*take a new run directory"):
        run_pipeline(other.settings(copy))
    assert everything(copy) == before


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_query_with_another_model_or_tokenizer_is_refused(what: str, world: World, finished: Path, tmp_path: Path) -> None:
    other = world.copy(tmp_path)
    CHANGES[what](other)
    before = everything(finished)
    with pytest.raises(
        RequestError, match=f"the {what} at {other.model} is not the one that .* was made with.*restore it, or make a new run"
    ):
        Run(finished, model=str(other.model)).query(PROMPT, COMPLETION)
    assert everything(finished) == before


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("factors", "damping", 0.2),
        ("factors", "damping", {"absolute": 0.1}),
        ("factors", "layers", ["*.mlp.*"]),
        ("factors", "sequences", 20),
        ("factors", "seed", 1),
        ("data", "sequence_length", POSITIONS - 1),
        ("data", "documents", "truncate"),
        ("data", "metadata", []),
        ("data", "sequences_per_shard", 8),
        ("index", "bytes_per_sequence", 512),
        ("index", "recall_queries", 3),
        ("index", "seed", 1),
        ("model", "dtype", "float64"),
    ],
)
def test_changed_setting_is_refused_by_its_name(section: str, key: str, value: Any, world: World, copy: Path) -> None:
    before = everything(copy)
    with pytest.raises(RequestError, match=f"was made with (settings.{section}.{key}|fingerprints.model) = .*take a new run directory"):
        run_pipeline(world.settings(copy, **{section: {key: value}}))
    assert everything(copy) == before


def test_resources_are_no_part_of_what_a_run_is(world: World, copy: Path) -> None:
    before = everything(copy)
    run_pipeline(world.settings(copy, resources={"memory_budget": "100MiB"}))
    assert everything(copy) == before


def test_settings_may_change_until_something_was_made_with_them(world: World, finished: Path, tmp_path: Path) -> None:
    """A first attempt with a broken line, then with a wrong glob: what is mended goes on in the same directory."""
    other = world.copy(tmp_path)
    whole = other.data.read_text()
    other.data.write_text(whole + "{broken\n")
    with pytest.raises(RequestError, match=f"{other.data}, line 41: not valid JSON"):
        run_pipeline(other.settings(tmp_path / "run"))
    other.data.write_text(whole)
    with pytest.raises(RequestError, match=r"no attributable layer matches 'nothing'"):
        run_pipeline(other.settings(tmp_path / "run", factors={"layers": ["nothing"]}))
    with pytest.raises(RequestError, match=r"index\.bytes_per_sequence is 2, which in sparse is 0 numbers, fewer than the 15 layers"):
        run_pipeline(other.settings(tmp_path / "run", index={"bytes_per_sequence": 2}))
    with pytest.raises(RequestError, match=r"was made with settings\.data\.sequence_length = 32"):
        run_pipeline(other.settings(tmp_path / "run", data={"sequence_length": 16}))
    run_pipeline(other.settings(tmp_path / "run"))
    assert artifacts(tmp_path / "run") == artifacts(finished)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 99}', "has run-directory format 99, this version reads format"),
        ("[]", "has run-directory format None"),
        (f'{{"format": {FORMAT}}}', "run.json is damaged: it has no settings"),
        (f'{{"format": {FORMAT}, "sett', "run.json is damaged: it is not JSON"),
    ],
)
def test_run_directory_of_another_format_is_refused(text: str, message: str, world: World, copy: Path) -> None:
    (copy / "run.json").write_text(text)
    before = everything(copy)
    for attempt in (lambda: run_pipeline(world.settings(copy)), lambda: Run(copy)):
        with pytest.raises(RequestError, match=message):
            attempt()
    assert everything(copy) == before


def test_units_without_a_description_are_not_taken_over(world: World, copy: Path) -> None:
    (copy / "run.json").unlink()
    before = everything(copy)
    with pytest.raises(RequestError, match=r"has sequences/ but no run\.json"):
        run_pipeline(world.settings(copy))
    assert everything(copy) == before


# somebody else


def test_second_process_on_one_run_directory_is_refused(world: World, copy: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "config.yaml", world.settings(copy))
    before = everything(copy)
    with RunDirectory(copy).exclusive():
        status, out, err = forked_command(tmp_path, "run", config)
    assert (status, out) == (2, "")
    assert err == f"error: another process is working on {copy} (process {os.getpid()} on {os.uname().nodename}); wait for it or stop it\n"
    assert everything(copy) == before


def test_queries_are_answered_while_somebody_works_on_the_run(copy: Path) -> None:
    with RunDirectory(copy).exclusive():
        assert len(Run(copy).query(PROMPT, COMPLETION, k=3).sequences) == 3


# moved


def test_copied_run_answers_with_the_model_where_it_is_now(world: World, finished: Path, tmp_path: Path) -> None:
    expected = Run(finished).query(PROMPT, COMPLETION)
    shutil.copytree(finished, tmp_path / "elsewhere")
    description = json.loads((tmp_path / "elsewhere/run.json").read_text())
    description["sources"]["model"] = str(tmp_path / "gone")
    (tmp_path / "elsewhere/run.json").write_text(json.dumps(description))
    with pytest.raises(RequestError, match=r"there is no model directory at .*gone"):
        Run(tmp_path / "elsewhere").query(PROMPT, COMPLETION)
    moved = world.copy(tmp_path)
    found = Run(tmp_path / "elsewhere", model=str(moved.model)).query(PROMPT, COMPLETION)
    assert [(s.id, s.score) for s in found.sequences] == [(s.id, s.score) for s in expected.sequences]


# no room


def test_run_without_room_fails_in_one_line_and_goes_on_once_there_is_room(world: World, finished: Path, tmp_path: Path) -> None:
    settings = world.settings(tmp_path / "run")
    status, out, err = forked_command(tmp_path, "run", write_yaml(tmp_path / "config.yaml", settings), most_bytes_per_file=20_000)
    assert (status, out) == (1, "")
    *progress, last = err.splitlines()
    assert last.startswith("error: ")
    assert "File too large" in last
    assert not [line for line in progress if line.startswith("error") or "Traceback" in line]
    assert not list((tmp_path / "run").rglob(".partial-*"))
    done = artifacts(tmp_path / "run")
    assert done.items() < artifacts(finished).items()
    run_pipeline(settings)
    assert artifacts(tmp_path / "run") == artifacts(finished)
