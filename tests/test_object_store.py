"""A run in an object store, over HTTP to a real server: the same units as in a directory, never half of one, and one process at work at a time."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from object_server import BUCKET, object_server
from small_run import Influence, World, artifacts, forked, run_pipeline, write_jsonl, write_yaml

from influence import lease as leases
from influence.errors import RequestError
from influence.lease import lease
from influence.object_store import ObjectStore
from influence.run import Run
from influence.run_directory import STAGES, write_json
from influence.service.catalog import Catalog
from influence.service.settings import ServiceSettings, named_runs
from influence.stored_run import StoredRunDirectory

PROMPT, COMPLETION = "Lisbon lies on", " the Tagus."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with object_server(tmp_path_factory.mktemp("server") / "log") as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        yield dict(running.environment)


@pytest.fixture
def store(server: dict[str, str], request: pytest.FixtureRequest) -> ObjectStore:
    """An empty place in the bucket, of this test alone."""
    return ObjectStore(f"s3://{BUCKET}/{abs(hash(request.node.nodeid)):x}/run")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, the cache is another, empty one."""
    return lambda: monkeypatch.setenv("INFLUENCE_CACHE", str(tmp_path / f"cache-{time.monotonic_ns()}"))


@pytest.fixture(scope="module")
def stored(server: dict[str, str], world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run in the store; never to be changed."""
    url = f"s3://{BUCKET}/finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLUENCE_CACHE", str(tmp_path_factory.mktemp("stored")))
        run_pipeline(world.settings(url))
    return url


@pytest.fixture(scope="module")
def objects(stored: str) -> Mapping[str, bytes]:
    """What the finished run in the store consists of."""
    source = ObjectStore(stored)
    return source.get_all(["run.json", *(name for stage in STAGES for name in source.names(stage))])


@pytest.fixture
def stored_copy(objects: Mapping[str, bytes], store: ObjectStore) -> ObjectStore:
    """The finished run in a place of its own, to be changed."""
    for name, content in objects.items():
        store.put(name, content)
    return store


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead are taken for dead sooner."""
    monkeypatch.setattr(leases, "SECONDS", 3.0)
    monkeypatch.setattr(leases, "RENEWED_EVERY", 0.5)


def fetched(url: str) -> dict[str, str]:
    """sha256 of every file of every unit in the store, by way of this machine's cache."""
    directory = StoredRunDirectory(url)
    for stage in STAGES:
        directory.bring(stage, directory.unit_names(stage))
    return artifacts(directory.path)


# the same run


def test_run_in_a_store_has_the_units_of_one_in_a_directory_to_the_byte(
    stored: str, finished: Path, other_machine: Callable[[], None]
) -> None:
    other_machine()
    assert fetched(stored) == artifacts(finished)
    assert Run(stored).fingerprints == Run(finished).fingerprints


def test_another_machine_answers_as_from_a_directory(stored: str, finished: Path, other_machine: Callable[[], None]) -> None:
    other_machine()
    found, expected = (Run(place).query(PROMPT, COMPLETION) for place in (stored, finished))
    assert [(one.id, one.score) for one in found.sequences] == [(one.id, one.score) for one in expected.sequences]


def test_status_of_a_stored_run_fetches_no_rows(stored: str, influence: Influence, cache: Path) -> None:
    status = influence("status", stored, "--json").json
    assert status["run"] == stored
    assert status["finished"]
    assert not list(cache.glob("*/rows/*"))
    assert "finished" in influence("status", stored, "--verify").out
    assert list(cache.glob("*/rows/*"))


def test_finished_run_in_a_store_is_run_again_at_once(stored: str, world: World) -> None:
    before = ObjectStore(stored).get("progress.json")
    run_pipeline(world.settings(stored))
    assert ObjectStore(stored).get("progress.json") == before


def test_run_of_other_data_is_refused(stored: str, world: World, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", [{"id": "a", "text": "Something else.", "source": "x"}])
    with pytest.raises(RequestError, match=rf"{stored} was made with fingerprints\.data"):
        run_pipeline(world.settings(stored, data={"files": str(data)}))


def test_answers_are_kept_in_the_store_and_reported_from_another_machine(
    stored_copy: ObjectStore, influence: Influence, other_machine: Callable[[], None], tmp_path: Path
) -> None:
    asked = influence("query", stored_copy.url, PROMPT, COMPLETION, "-k", "3", "--json").json
    other_machine()
    assert [answer["results"] for answer in StoredRunDirectory(stored_copy.url).answers()] == [asked["results"]]
    page = tmp_path / "report.html"
    report = influence("report", stored_copy.url, "-k", "3", "--out", page, "--json").json
    assert [one["id"] for one in report["queries"][0]["results"]] == [one["id"] for one in asked["results"]]
    assert "Lisbon" in page.read_text()


def test_service_serves_a_stored_run(stored: str, tmp_path: Path) -> None:
    settings = ServiceSettings(runs=named_runs([stored]), state_dir=tmp_path / "state")
    opened = Catalog(settings).loaded("finished")
    assert opened.run.query(PROMPT, COMPLETION, k=1).sequences


def test_run_made_anew_under_a_url_does_not_read_the_cache_of_the_old_one(store: ObjectStore) -> None:
    description = {"settings": {}, "fingerprints": {}, "sources": {}}
    caches = []
    for _ in range(2):
        directory = StoredRunDirectory(store.url)
        directory.create(description, lambda _: dict.fromkeys(STAGES, ""))
        caches.append(directory.path)
        store.delete("run.json")
    assert caches[0] != caches[1]


# never half a unit


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["covariances", "eigenbases", "rows"])
def test_run_killed_while_it_writes_to_a_store_goes_on_to_the_same_bytes(
    stage: str, store: ObjectStore, world: World, finished: Path, other_machine: Callable[[], None], quick: None
) -> None:
    settings = world.settings(store.url)
    process = forked(run_pipeline, settings)
    deadline = time.monotonic() + 240
    while not store.names(stage):
        assert process.exitcode is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    other_machine()
    run_pipeline(settings)
    other_machine()
    assert fetched(store.url) == artifacts(finished)


def test_unit_without_its_record_is_not_done_and_is_made_again(
    stored_copy: ObjectStore, world: World, finished: Path, other_machine: Callable[[], None]
) -> None:
    stored_copy.delete("rows/part-00001/record.json")
    with pytest.raises(RequestError, match="rows/part-00001 is missing"):
        Run(stored_copy.url).path_of("rows", "part-00001")
    run_pipeline(world.settings(stored_copy.url))
    other_machine()
    run = Run(stored_copy.url)
    files = run.path_of("rows", "part-00001")
    assert (files / "rows.npy").read_bytes() == (finished / "rows/part-00001/rows.npy").read_bytes()


def filled(number: int) -> Callable[[Path], None]:
    return lambda directory: np.save(directory / "rows.npy", np.full(5, number), allow_pickle=False)


def content(directory: StoredRunDirectory) -> int:
    return int(np.load(directory.unit_path("rows", "part-00000") / "rows.npy")[0])


@pytest.fixture
def empty(store: ObjectStore) -> ObjectStore:
    StoredRunDirectory(store.url).create({"settings": {}, "fingerprints": {}, "sources": {}}, lambda _: {})
    return store


def test_of_two_who_do_one_unit_the_first_is_kept_whole(empty: ObjectStore, other_machine: Callable[[], None]) -> None:
    """As when a slow node's unit is taken over, on GPUs that round differently."""
    slow = StoredRunDirectory(empty.url)
    _ = slow.path

    def write(directory: Path) -> None:
        other_machine()
        StoredRunDirectory(empty.url).write_unit("rows", "part-00000", "print", filled(1))
        filled(2)(directory)

    slow.write_unit("rows", "part-00000", "print", write)
    assert content(slow) == 1
    other_machine()
    assert content(StoredRunDirectory(empty.url)) == 1


def test_files_that_a_dead_process_left_do_not_get_into_a_unit(empty: ObjectStore, other_machine: Callable[[], None]) -> None:
    empty.put("rows/part-00000/rows.npy", b"of somebody who never wrote the record")
    StoredRunDirectory(empty.url).write_unit("rows", "part-00000", "print", filled(2))
    other_machine()
    assert content(StoredRunDirectory(empty.url)) == 2


def test_unit_of_something_else_is_refused(empty: ObjectStore, other_machine: Callable[[], None]) -> None:
    StoredRunDirectory(empty.url).write_unit("rows", "part-00000", "print", filled(1))
    for machine in (lambda: None, other_machine):
        machine()
        directory = StoredRunDirectory(empty.url)
        for ask in (directory.is_done, lambda stage, unit, fingerprint, own=directory: own.missing(stage, [unit], fingerprint)):
            with pytest.raises(RequestError, match="was made from something else"):
                ask("rows", "part-00000", "another")


DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "truncated": (lambda content: content[:-7], "is damaged: .* bytes, expected"),
    "swapped": (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged: its checksum differs"),
    "gone": (lambda content: None, "is missing"),
}


@pytest.mark.parametrize("damage", [pytest.param(name, marks=[pytest.mark.slow] * (name != "truncated")) for name in DAMAGES])
def test_damaged_object_is_refused_by_name_and_leaves_nothing_in_the_cache(
    damage: str, stored_copy: ObjectStore, influence: Influence, other_machine: Callable[[], None], cache: Path
) -> None:
    change, message = DAMAGES[damage]
    name = "rows/part-00001/rows.npy"
    changed = change(stored_copy.get(name) or b"")
    stored_copy.delete(name) if changed is None else stored_copy.put(name, changed)
    with pytest.raises(RequestError, match=f"{stored_copy.url}/{name} {message}"):
        Run(stored_copy.url).path_of("rows", "part-00001")
    influence("query", stored_copy.url, PROMPT, COMPLETION).says(f"{stored_copy.url}/{name}")
    assert not [path for path in cache.rglob("*") if "part-00001" in path.name and "rows" in path.parts]
    assert not list(cache.rglob(".partial-*"))


def test_damaged_record_is_refused_by_name(stored_copy: ObjectStore) -> None:
    stored_copy.put("factors/all/record.json", b'{"fingerprint": "sha2')
    with pytest.raises(RequestError, match=f"{stored_copy.url}/factors/all/record.json is damaged"):
        Run(stored_copy.url).path_of("factors")


# one at a time


def test_second_driver_of_a_stored_run_is_refused(
    stored: str, influence: Influence, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEWED_EVERY", 1.0)
    moved = world.copy(tmp_path)
    config = write_yaml(tmp_path / "config.yaml", moved.settings(f"{stored}", data={"metadata": ["source"]}))
    with StoredRunDirectory(stored).exclusive():
        refused = influence("run", config)
    refused.says(f"another process is working on {stored} (process {os.getpid()} on {os.uname().nodename}); wait for it or stop it")


def test_right_that_was_given_back_is_taken_at_once(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SECONDS", 10_000.0)
    for _ in range(3):
        with lease(store):
            pass
    assert len(store.names("lock")) == 1


def test_right_of_a_process_that_died_is_taken_over_and_not_given_back_to_it(store: ObjectStore, quick: None) -> None:
    store.create("lock/00000007.json", json.dumps({"holder": "the dead", "renewals": 3}).encode())
    with lease(store):
        store.put("lock/00000007.json", json.dumps({"holder": "the dead", "renewals": 4}).encode())  # who was not dead after all
        with pytest.raises(RequestError, match="another process is working on"), lease(store):
            pass


def test_of_many_who_claim_at_once_one_gets_the_right(store: ObjectStore, quick: None) -> None:
    over, held, refused = threading.Event(), [], []

    def claim(_: int) -> None:
        try:
            with lease(store):
                held.append(1)
                over.wait(60)
        except RequestError:
            refused.append(1)
            if len(refused) == 5:
                over.set()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(claim, range(6)))
    assert (len(held), len(refused)) == (1, 5)


# what cannot work


def test_changes_that_need_files_are_refused_in_one_line(stored: str, influence: Influence, world: World, tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    ids.write_text("doc-00\n")
    for words in (["append", stored, world.data], ["remove", stored, "--ids", ids], ["remove", stored, "--erase"]):
        influence(*words).says(f"{stored} is in an object store, where sequences are neither appended nor removed")
    for words in (["report", stored, PROMPT, COMPLETION], ["evaluate", stored, "fidelity"]):
        influence(*words).says("say with --out where this goes")


def test_sequences_that_were_removed_before_a_run_was_copied_to_a_store_stay_removed(stored_copy: ObjectStore) -> None:
    best = Run(stored_copy.url).query(PROMPT, COMPLETION, k=1).sequences[0].id
    run = Run(stored_copy.url)
    stored_copy.put(
        "living.json", json.dumps({"appended": [], "removed": [run.store.ids.index(best)], "erased": [], "replaced": {}}).encode()
    )
    assert best not in [one.id for one in Run(stored_copy.url).query(PROMPT, COMPLETION, k=10).sequences]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://nowhere/runs/mine", "s3://nowhere/runs/mine is not a run directory: it has no run.json"),
        (f"s3://{BUCKET}", "expected a bucket and a name in it"),
        ("ftp://models/run", "runs are kept in directories and at s3:// or gs://, not at ftp://"),
    ],
)
def test_place_that_holds_no_run_is_refused(place: str, message: str, server: dict[str, str], influence: Influence) -> None:
    influence("status", place).says(message)


def test_demo_is_not_made_in_an_object_store(influence: Influence) -> None:
    influence("demo", "--out", f"s3://{BUCKET}/demo").says("the demo is made in a local directory")


def test_run_in_a_bucket_that_is_not_there_is_refused(server: dict[str, str], world: World, influence: Influence, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "config.yaml", world.settings("s3://nowhere/run"))
    influence("run", config).says("s3://nowhere/run: The specified bucket does not exist")


def test_missing_credentials_are_one_line(
    server: dict[str, str], influence: Influence, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    influence("status", f"s3://{BUCKET}/finished").says("Unable to locate credentials: give credentials as for the store's own tools")


def test_run_copied_out_of_a_store_is_a_run_directory(stored: str, finished: Path, tmp_path: Path) -> None:
    store, copy = ObjectStore(stored), tmp_path / "copy"
    for stage in ("run.json", *STAGES):
        for name in store.names(stage) or [stage]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            assert store.fetch(name, copy / name)
    assert artifacts(copy) == artifacts(finished)
    write_json(copy / "progress.json", {})
    shutil.rmtree(copy / "scans")
    assert Run(copy).query(PROMPT, COMPLETION, k=2).sequences
