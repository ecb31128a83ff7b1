"""What travels with a run that is done elsewhere: relative paths do, absolute ones are places there, and what cannot work is refused."""

from pathlib import Path

import pytest
from small_run import World, artifacts, run_pipeline, write_jsonl, write_yaml

from influence.config import Config, load_config, read_config
from influence.errors import RequestError
from jobs import packing
from jobs.packing import CONFIG_FILE, pack


@pytest.fixture
def here(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that is worked in, with a model and data."""
    world.copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(world: World, **changes: dict[str, object]) -> Config:
    settings = world.settings(Path("/mnt/shared/run"), **changes)
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    return read_config(None, flat)


def unpacked(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The configuration as it is read where the job runs."""
    monkeypatch.chdir(directory)
    return load_config(Path(CONFIG_FILE), {})


@pytest.fixture
def luggage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("luggage")


def test_relative_model_and_data_travel_and_are_the_same_there(
    here: Path, world: World, luggage: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(configured(world, model={"name": "model"}, data={"files": ["./train.jsonl"]}), luggage)
    config = unpacked(luggage, monkeypatch)
    assert config.model.name == str(luggage / "model")
    assert [Path(name).resolve().is_relative_to(luggage.resolve()) for name in config.data.files] == [True]
    settings = config.model_dump(mode="json", include={"model", "data", "factors", "index"}) | {"run": {"dir": str(tmp_path / "run")}}
    run_pipeline(settings)
    assert artifacts(tmp_path / "run") == artifacts(finished)


def test_the_code_of_a_flax_model_travels(here: Path, world: World, luggage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"no file mine\.py for model\.flax"):
        pack(configured(world, model={"name": "model", "flax": "mine.py:build"}), luggage)
    (here / "mine.py").write_text("def build(settings): ...")
    pack(configured(world, model={"name": "model", "flax": "mine.py:build"}, data={"files": ["./train.jsonl"]}), luggage)
    assert unpacked(luggage, monkeypatch).model.flax == f"{(luggage / 'code' / 'mine.py').resolve()}:build"


def test_globs_travel_as_their_files_in_order(here: Path, world: World, luggage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a"):
        write_jsonl(here / f"{name}.jsonl", [{"text": name, "source": name}])
    pack(configured(world, model={"name": "gpt2"}, data={"files": ["[ab].jsonl", "train.jsonl"]}), luggage)
    config = unpacked(luggage, monkeypatch)
    assert [Path(name).name for name in config.data.files] == ["a.jsonl", "b.jsonl", "train.jsonl"]
    assert all(Path(name).is_file() for name in config.data.files)


def test_absolute_paths_and_hub_names_stay_as_they_are(here: Path, world: World, luggage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(configured(world, model={"name": str(here / "model")}, data={"files": "/mnt/data/*.jsonl"}), luggage)
    config = unpacked(luggage, monkeypatch)
    assert (config.model.name, config.data.files) == (str(here / "model"), ["/mnt/data/*.jsonl"])
    assert [path.name for path in luggage.iterdir()] == [CONFIG_FILE]
    pack(configured(world, model={"name": "openai-community/gpt2"}, data={"files": "someone/corpus"}), luggage)
    config = unpacked(luggage, monkeypatch)
    assert (config.model.name, config.data.files) == ("openai-community/gpt2", ["someone/corpus"])


def test_settings_travel_but_for_the_address(here: Path, world: World, luggage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "factors": {"damping": {"absolute": 1e-4}, "layers": ["*.mlp.*"]},
        "resources": {"workers": 3, "address": "http://head:8265", "memory_budget": "4GiB"},
    }
    config = configured(world, model={"name": "gpt2"}, data={"files": "someone/corpus"}, **changes)
    pack(config, luggage)
    found = unpacked(luggage, monkeypatch)
    assert found.identity() == config.identity()
    assert (found.resources.workers, found.resources.memory_budget, found.resources.address) == (3, 4 * 2**30, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"dir": "runs/mine"}}, "run.dir is runs/mine, a directory of this machine"),
        ({"model": {"name": "./nothing"}}, "there is no model directory at ./nothing"),
        ({"data": {"files": "nothing.jsonl"}}, "no data file at nothing.jsonl"),
        ({"data": {"files": "*.nothing"}}, r"no file matches \*.nothing"),
    ],
)
def test_what_cannot_work_elsewhere_is_refused(
    changes: dict[str, dict[str, object]], message: str, here: Path, world: World, luggage: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        pack(configured(world, **changes), luggage)


def test_too_much_to_travel_is_refused(here: Path, world: World, luggage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TRAVELS_AT_MOST", sum(path.stat().st_size for path in (here / "model").iterdir()) + 10)
    config = write_yaml(here / "config.yaml", world.settings(Path("/mnt/run"), model={"name": "model"}, data={"files": "train.jsonl"}))
    with pytest.raises(RequestError, match=r"data.files: with train.jsonl, .* MiB would travel"):
        pack(read_config(config, {}), luggage)


def test_run_directory_in_an_object_store_travels_as_it_is(
    here: Path, world: World, luggage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(configured(world, run={"dir": "s3://bucket/run"}), luggage)
    assert unpacked(luggage, monkeypatch).run.dir == "s3://bucket/run"
