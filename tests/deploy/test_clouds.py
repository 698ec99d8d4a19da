"""`ray up` files: Ray's own checks, EC2's own description of a request, and a stand-in of EC2 for the network."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

CLOUDS = Path(__file__).parents[2] / "deploy" / "clouds"
FILES = ("aws", "gcp")


def read(cloud: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLOUDS / f"{cloud}.yaml").read_text())
    return config


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An EC2 that is none, with a default VPC."""
    moto = pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with moto.mock_aws():
        yield boto3.client("ec2", region_name="us-west-2")


@pytest.fixture(scope="module")
def network() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aws_network", CLOUDS / "aws_network.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cloud", FILES)
def test_ray_takes_the_file(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(cloud)
    if cloud == "gcp":  # Ray asks Google itself for no more than this
        config["provider"]["project_id"] = "some-project"
    validate_config(prepare_config(config))


@pytest.mark.parametrize("cloud", FILES)
def test_workers_are_spot_and_come_only_when_needed(cloud: str) -> None:
    types = read(cloud)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] == 0 and types["gpu"]["resources"]["GPU"] >= 1
    node = types["gpu"]["node_config"]
    spot = node["InstanceMarketOptions"]["MarketType"] if cloud == "aws" else node["scheduling"]["provisioningModel"]
    assert spot.lower() == "spot"


@pytest.mark.parametrize("cloud", FILES)
def test_the_token_is_asked_for_and_the_dashboard_stays_inside(cloud: str) -> None:
    config = read(cloud)
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    assert any("RAY_AUTH_MODE=token" in one for one in config["setup_commands"])
    assert any("--dashboard-host=127.0.0.1" in one for one in config["head_start_ray_commands"])
    assert any("--constraint constraints.txt" in one for one in config["setup_commands"])


@pytest.mark.parametrize("cloud", FILES)
def test_nothing_of_anybodys_is_in_it(cloud: str) -> None:
    text = (CLOUDS / f"{cloud}.yaml").read_text()
    assert "SET" in text and "0.0.0.0" not in text and "AKIA" not in text and "PRIVATE KEY" not in text


@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_the_node_is_a_request_that_ec2_describes(kind: str) -> None:
    botocore = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    request = {**read("aws")["available_node_types"][kind]["node_config"], "MinCount": 1, "MaxCount": 1}
    shape = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    assert request["MetadataOptions"]["HttpTokens"] == "required"
    market = request.get("InstanceMarketOptions")
    if market is not None:
        known = shape.members["InstanceMarketOptions"].members["MarketType"].enum
        assert market["MarketType"] in known


def test_the_group_lets_in_ssh_from_one_network_and_its_own_nodes(aws: Any, network: ModuleType, capsys: Any) -> None:
    assert network.main(["--region", "us-west-2", "--from", "198.51.100.7/32"]) == 0
    [group] = aws.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["onestage"]}])["SecurityGroups"]
    number = group["GroupId"]
    assert f"SecurityGroupIds: [{number}]" in capsys.readouterr().out
    everybody = {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    aws.authorize_security_group_ingress(GroupId=number, IpPermissions=[everybody])
    assert network.main(["--region", "us-west-2", "--from", "203.0.113.0/24"]) == 0
    [group] = aws.describe_security_groups(GroupIds=[number])["SecurityGroups"]
    ways = [
        (
            one["IpProtocol"],
            one.get("FromPort"),
            [ip["CidrIp"] for ip in one["IpRanges"]],
            [pair["GroupId"] for pair in one["UserIdGroupPairs"]],
        )
        for one in group["IpPermissions"]
    ]
    assert sorted(ways, key=str) == sorted(
        [("tcp", 22, ["203.0.113.0/24"], []), ("-1", ways[1][1], [], [number])], key=str
    )


@pytest.mark.parametrize("source", ["0.0.0.0/0", "everywhere", "198.51.100.7/24"])
def test_the_whole_world_is_not_let_in(source: str, network: ModuleType) -> None:
    with pytest.raises(SystemExit) as refused:
        network.main(["--region", "us-west-2", "--from", source])
    assert refused.value.code == 2


def test_ray_leaves_the_group_as_it_is(aws: Any, network: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a node names none, Ray makes one that is open to the world on port 22."""
    from ray.autoscaler._private.aws import config as ray_aws
    from ray.autoscaler._private.util import prepare_config

    vpc = aws.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = network.closed_group(aws, name="onestage", vpc=vpc, source="198.51.100.7/32")
    before = aws.describe_security_groups()["SecurityGroups"]
    config = prepare_config(read("aws"))
    for kind in config["available_node_types"].values():
        kind["node_config"]["SecurityGroupIds"] = [group]
    after = ray_aws._configure_security_group(config)
    for kind in after["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] == [group]
    assert aws.describe_security_groups()["SecurityGroups"] == before


def gcp(*words: str, there: bool, folder: Path) -> tuple[int, list[str]]:
    """What gcp-network asks gcloud for, which says of everything that it is there or not."""
    asked = folder / "asked"
    stub = folder / "gcloud"
    stub.write_text(
        f'#!/bin/sh\necho "$*" >> {asked}\ncase "$*" in *describe*) exit {0 if there else 1};; esac\n', encoding="utf-8"
    )
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    argv = [str(CLOUDS / "gcp-network"), *words]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, asked.read_text().splitlines() if asked.exists() else []


def test_googles_network_lets_in_ssh_from_one_network_and_its_own_nodes(tmp_path: Path) -> None:
    code, asked = gcp("project", "us-west1", "198.51.100.7/32", there=False, folder=tmp_path)
    rules = [one for one in asked if "firewall-rules create" in one]
    assert code == 0 and len(rules) == 2
    assert "--allow=tcp:22 --source-ranges=198.51.100.7/32" in rules[0]
    assert "--allow=all --source-ranges=10.77.0.0/20" in rules[1]


def test_googles_network_is_made_once(tmp_path: Path) -> None:
    code, asked = gcp("project", "us-west1", "198.51.100.7/32", there=True, folder=tmp_path)
    assert code == 0 and not [one for one in asked if " create " in one]


@pytest.mark.parametrize("source", ["0.0.0.0/0", "198.51.100.7", "x"])
def test_googles_network_is_not_opened_to_the_world(source: str, tmp_path: Path) -> None:
    assert gcp("project", "us-west1", source, there=False, folder=tmp_path) == (2, [])


def test_the_shell_is_clean() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    argv = [str(shellcheck), "--format=json", str(CLOUDS / "gcp-network")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout) == []
