"""cluster.yaml, against the schema that `ray up` applies and against the promises about security that its comments make.

Offline and without credentials: what the cloud would say to instance types, images or the file system is not tested here.
"""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` completes it, accepted by Ray's schema."""
    complete = prepare_config(copy.deepcopy(config))
    validate_config(complete)
    return complete


def ray_starts(config: dict[str, Any]) -> list[str]:
    return [command for key in START_COMMANDS for command in config[key] if "ray start" in command]


def test_ray_accepts_the_file_and_fills_in_nothing_that_starts_a_node(config: dict[str, Any]) -> None:
    complete = prepared(config)
    assert complete["available_node_types"] == config["available_node_types"]
    assert complete["worker_setup_commands"] == config["setup_commands"]
    assert complete["head_setup_commands"] == config["setup_commands"] + config["head_setup_commands"]
    for key in ("file_mounts", "initialization_commands", *START_COMMANDS):
        assert complete[key] == config[key], f"Ray changed {key}"


@pytest.mark.parametrize(
    "change",
    [
        {"max_workerz": 4},
        {"max_workers": "four"},
        {"available_node_types": {"head": {"resources": {}}}},
    ],
    ids=["unknown key", "wrong type", "node type without configuration"],
)
def test_ray_refuses_a_broken_file(config: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        prepared(config | change)


def test_ray_refuses_a_head_of_no_known_type(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        prepared(config | {"head_node_type": "heaad"})


def test_the_autoscaler_can_go_to_no_workers_and_not_past_its_limit(config: dict[str, Any]) -> None:
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert all(0 < node["max_workers"] <= config["max_workers"] for node in workers.values())
    assert all(node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for node in workers.values())


def test_every_ray_start_has_token_authentication_on_and_usage_statistics_off(config: dict[str, Any]) -> None:
    starts = ray_starts(config)
    assert len(starts) == len(START_COMMANDS)
    for command in starts:
        environment = command[: command.index("ray start")]
        assert re.search(r"\bexport\b[^;]*\bRAY_AUTH_MODE=token\b", environment), command
        assert re.search(r"\bexport\b[^;]*\bRAY_USAGE_STATS_ENABLED=0\b", environment), command
    assert any("RAY_AUTH_MODE=token" in command for command in config["initialization_commands"])


def test_every_node_gets_the_token_and_the_file_does_not_hold_one(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN|AKIA|aws_secret|BEGIN [A-Z ]*PRIVATE KEY", TEXT)


def test_the_dashboard_answers_on_localhost_only(config: dict[str, Any]) -> None:
    hosts = re.findall(r"--dashboard-host[= ](\S+)", " ".join(ray_starts(config)))
    assert hosts == ["127.0.0.1"]
    assert "0.0.0.0" not in TEXT


def test_every_synced_path_exists_and_every_package_is_synced(config: dict[str, Any]) -> None:
    synced = {local.removeprefix("./") for local in config["file_mounts"].values() if local.startswith("./")}
    assert [path for path in sorted(synced) if not (ROOT / path).exists()] == []
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} <= synced


def test_the_nodes_install_the_pinned_versions_for_a_gpu(config: dict[str, Any]) -> None:
    installs = [command for command in config["setup_commands"] + config["head_setup_commands"] if "pip install" in command]
    assert any("-e '.[gpu]'" in command for command in installs)
    assert all("constraints.txt" in command for command in installs)
