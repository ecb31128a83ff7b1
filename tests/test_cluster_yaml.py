"""cluster.yaml and its variants in docs/cluster: against the schema that `ray up` applies, or the structure that KubeRay expects, and against
the promises about security that their comments make.

Offline and without credentials: what a cloud would say to instance types, images or the file system is not tested here.
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
LAUNCHED = ("cluster.yaml", "docs/cluster/gcp.yaml", "docs/cluster/local.yaml")
IN_CLOUDS = ("cluster.yaml", "docs/cluster/gcp.yaml")
ON_KUBERNETES = ("docs/cluster/raycluster.yaml", "docs/cluster/rayjob.yaml")
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(params=LAUNCHED)
def file(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def text(file: str) -> str:
    return (ROOT / file).read_text()


@pytest.fixture
def config(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


in_clouds = pytest.mark.parametrize("file", IN_CLOUDS)


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` completes it, accepted by Ray's schema."""
    complete = prepare_config(copy.deepcopy(config))
    validate_config(complete)
    return complete


def ray_starts(config: dict[str, Any]) -> list[str]:
    return [command for key in START_COMMANDS for command in config[key] if "ray start" in command]


def test_ray_accepts_the_file_and_fills_in_nothing_that_starts_a_node(config: dict[str, Any]) -> None:
    complete = prepared(config)
    if config["provider"]["type"] != "local":  # whose one type Ray makes itself
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
    ],
    ids=["unknown key", "wrong type"],
)
def test_ray_refuses_a_broken_file(config: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, TypeError)):
        prepared(config | change)


@in_clouds
def test_ray_refuses_a_node_type_without_configuration(config: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        prepared(config | {"available_node_types": {"head": {"resources": {}}}})


@in_clouds
def test_ray_refuses_a_head_of_no_known_type(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        prepared(config | {"head_node_type": "heaad"})


@in_clouds
def test_the_autoscaler_can_go_to_no_workers_and_not_past_its_limit(config: dict[str, Any]) -> None:
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert all(0 < node["max_workers"] <= config["max_workers"] for node in workers.values())
    assert all(is_spot(node["node_config"]) for node in workers.values())


def is_spot(node: dict[str, Any]) -> bool:
    """On AWS or Google Cloud."""
    return node.get("InstanceMarketOptions") == {"MarketType": "spot"} or {"preemptible": True} in node.get("scheduling", [])


def test_every_ray_start_has_token_authentication_on_and_usage_statistics_off(config: dict[str, Any]) -> None:
    starts = ray_starts(config)
    assert len(starts) == len(START_COMMANDS)
    for command in starts:
        environment = command[: command.index("ray start")]
        assert re.search(r"\bexport\b[^;]*\bRAY_AUTH_MODE=token\b", environment), command
        assert re.search(r"\bexport\b[^;]*\bRAY_USAGE_STATS_ENABLED=0\b", environment), command
    assert any("RAY_AUTH_MODE=token" in command for command in config["initialization_commands"])


def test_every_node_gets_the_token_and_the_file_does_not_hold_one(config: dict[str, Any], text: str) -> None:
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN|AKIA|aws_secret|BEGIN [A-Z ]*PRIVATE KEY", text)


def test_the_dashboard_answers_on_localhost_only(config: dict[str, Any], text: str) -> None:
    hosts = re.findall(r"--dashboard-host[= ](\S+)", " ".join(ray_starts(config)))
    assert hosts == ["127.0.0.1"]
    assert "0.0.0.0" not in text


def test_every_synced_path_exists_and_every_package_is_synced(config: dict[str, Any]) -> None:
    synced = {local.removeprefix("./") for local in config["file_mounts"].values() if local.startswith("./")}
    assert [path for path in sorted(synced) if not (ROOT / path).exists()] == []
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} <= synced


def test_the_nodes_install_the_pinned_versions_for_a_gpu(config: dict[str, Any]) -> None:
    installs = [command for command in config["setup_commands"] + config["head_setup_commands"] if "pip install" in command]
    assert any(re.search(r"-e '\.\[gpu[\],]", command) for command in installs)
    assert all("constraints.txt" in command for command in installs)


# Kubernetes


@pytest.fixture(params=ON_KUBERNETES)
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / str(request.param)).read_text()))


@pytest.fixture
def cluster(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The specification of the Ray cluster, in either kind of resource."""
    (resource,) = [document for document in documents if document["apiVersion"] == "ray.io/v1"]
    return resource["spec"].get("rayClusterSpec", resource["spec"])


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_resources_are_of_kinds_that_kuberay_knows_and_of_the_pinned_ray(cluster: dict[str, Any]) -> None:
    kinds = [document["kind"] for file in ON_KUBERNETES for document in yaml.safe_load_all((ROOT / file).read_text())]
    assert kinds == ["PersistentVolumeClaim", "RayCluster", "RayJob"]
    pin = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pin
    assert cluster["rayVersion"] == pin[1]


def test_pods_hold_one_container_of_one_image_with_limits(cluster: dict[str, Any]) -> None:
    containers = [pod["containers"] for pod in pods(cluster)]
    assert [len(own) for own in containers] == [1] * len(containers)
    assert len({own[0]["image"] for own in containers}) == 1
    assert all({"cpu", "memory"} <= own[0]["resources"]["limits"].keys() for own in containers)
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods(cluster))


def test_workers_come_and_go_with_a_gpu_each_and_the_head_does_no_tasks(cluster: dict[str, Any]) -> None:
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1


def test_every_pod_has_token_authentication_on_and_its_token_from_a_secret(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        environment = {one["name"]: one for one in pod["containers"][0]["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "influence-token", "key": "auth_token"}
        assert "value" not in environment["RAY_AUTH_TOKEN"]


def test_every_pod_sees_the_shared_directory_and_mounts_only_volumes_that_are_there(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() <= volumes.keys()
        assert mounts["shared"] == "/mnt/influence"
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "influence"}
    (claim,) = [one for one in yaml.safe_load_all((ROOT / ON_KUBERNETES[0]).read_text()) if one["kind"] == "PersistentVolumeClaim"]
    assert (claim["metadata"]["name"], claim["spec"]["accessModes"]) == ("influence", ["ReadWriteMany"])


def test_nothing_is_reached_from_outside_kubernetes(documents: list[dict[str, Any]], cluster: dict[str, Any]) -> None:
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {"Service", "Ingress", "Route"} & {document["kind"] for document in documents}
    assert all("hostPort" not in port for pod in pods(cluster) for port in pod["containers"][0].get("ports", []))
    assert not any(pod.get("hostNetwork") for pod in pods(cluster))


def test_job_runs_our_command_with_its_configuration_on_the_head() -> None:
    (job,) = yaml.safe_load_all((ROOT / "docs/cluster/rayjob.yaml").read_text())
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["influence", "run"]
    assert words[3:] == ["--address", "auto"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert words[2].startswith(mounts["config"] + "/")
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["backoffLimit"] > 0


def test_image_holds_every_package() -> None:
    copied = set(re.findall(r"^COPY (.*) \S+$", (ROOT / "docs/cluster/Dockerfile").read_text(), re.M))
    names = {name for line in copied for name in line.split()}
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} | {"constraints.txt", "pyproject.toml"} <= names
