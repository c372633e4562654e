"""``ray_cluster.yaml`` is checked by Ray's own launcher code and holds to the house's security rules."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "ray_cluster.yaml").read_text()


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def start_command(cluster: dict[str, Any], role: str) -> str:
    (command,) = [line for line in cluster[f"{role}_start_ray_commands"] if " start " in line]
    return command


def start_options(command: str) -> dict[str, Any]:
    """The options of a ``ray start`` line as Ray's own command line reads them; unknown ones are refused."""
    arguments = shlex.split(command[command.index(" start ") + len(" start ") :])
    return dict(start.make_context("ray start", arguments).params)


def test_ray_up_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_ray_up_would_refuse_a_misspelt_field(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config({**cluster, "idle_timeout": 5}))


def test_workers_have_gpus_and_start_only_when_needed(cluster: dict[str, Any]) -> None:
    types = prepare_config(cluster)["available_node_types"]
    assert "GPU" not in types["head"]["resources"]
    assert types["gpu_worker"]["resources"]["GPU"] >= 1
    assert types["gpu_worker"]["min_workers"] == 0 < types["gpu_worker"]["max_workers"] <= cluster["max_workers"]
    assert types["head"]["node_config"]["ImageId"] == types["gpu_worker"]["node_config"]["ImageId"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_starts_with_token_authentication(cluster: dict[str, Any], role: str) -> None:
    assert re.search(r"(^|; *)RAY_AUTH_MODE=token \S*ray start ", start_command(cluster, role))


def test_the_token_travels_as_a_file_of_its_owner(cluster: dict[str, Any]) -> None:
    assert ("/home/ubuntu/.ray/auth_token", "~/.ray/auth_token") in cluster["file_mounts"].items()
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


def test_head_serves_its_dashboard_on_loopback_and_the_port_workers_join(cluster: dict[str, Any]) -> None:
    head = start_options(start_command(cluster, "head"))
    worker = start_options(start_command(cluster, "worker"))
    assert head["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"


@pytest.mark.parametrize("role", ["head", "worker"])
def test_fixed_ports_differ_and_lie_outside_the_worker_range(cluster: dict[str, Any], role: str) -> None:
    options = start_options(start_command(cluster, role))
    workers = range(options["min_worker_port"], options["max_worker_port"] + 1)
    ports = [int(port) for port in re.findall(r"--(?!min-|max-)[a-z-]*port=(\d+)", start_command(cluster, role))]
    assert len(ports) >= 6
    assert len(set(ports)) == len(ports)
    assert not [port for port in ports if port in workers]


def test_nodes_install_this_package_with_the_pins(cluster: dict[str, Any]) -> None:
    mounts = {remote: local for remote, local in cluster["file_mounts"].items() if not local.startswith("~")}
    assert all(remote == f"/home/ubuntu/sapt-on-ray/{local}" for remote, local in mounts.items())
    assert not [local for local in mounts.values() if not (ROOT / local).exists()]
    (install,) = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert "~/sapt-on-ray -c ~/sapt-on-ray/constraints.txt" in install


def test_nodes_reach_s3_by_instance_profile_and_no_key_stands_in_the_file(cluster: dict[str, Any]) -> None:
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"]["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::")
    assert not re.search(r"(AKIA|ASIA)[A-Z0-9]{16}|AWS_SECRET|AWS_ACCESS|aws_secret|aws_access", TEXT)
