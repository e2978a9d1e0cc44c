"""What is decided and written for machines of a cloud without asking one."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from ftlaunch.cluster import cloud_watchdog as dog
from ftlaunch.cluster.base import Need
from ftlaunch.cluster.cloud import Cloud
from ftlaunch.cluster.cloud_access import Access, key_problems, public_key
from ftlaunch.cluster.cloud_boot import cloud_config, environment_of, metadata, pinned, setup_script, watchdog
from ftlaunch.cluster.cloud_checks import paths
from ftlaunch.cluster.cloud_config import as_label, launcher_config, tags_of
from ftlaunch.cluster.clouds.base import Boot
from ftlaunch.cluster.clouds.table import CLOUDS, cloud_of
from ftlaunch.launcher.plan_cost import PRICES, cost_text, plan_cost
from ftlaunch.launcher.unknown import Unknown
from ftlaunch.recipes.schema_cloud import CloudCluster

KEY = "ssh-rsa AAAA somebody"
OF = {
    "aws": {"regions": ["us-east-1"], "image": "ami-0123456789abcdef0", "instance_type": "g5.12xlarge"},
    "gcp": {
        "regions": ["us-central1-a"], "instance_type": "a2-highgpu-8g", "project": "acme",
        "image": "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64",
    },
    "azure": {
        "regions": ["eastus"], "instance_type": "Standard_NC24ads_A100_v4",
        "image": "canonical:ubuntu-24_04:server:latest",
        "subscription": "00000000-0000-0000-0000-000000000000", "resource_group": "ftlaunch",
    },
}  # fmt: skip


def section(provider: str = "aws", **changes: object) -> CloudCluster:
    values = {"type": "cloud", "provider": provider, **OF[provider], **changes}
    return CloudCluster.model_validate_json(json.dumps(values))


# --- what Ray is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", CLOUDS)
@pytest.mark.parametrize("spot", [False, True])
def test_rays_own_validation_takes_it(provider, spot, tmp_path):
    """As `ray up` reads it: its YAML parser, its defaults, its schema."""
    import yaml

    config = section(provider, spot=spot, nodes={"min": 2, "max": 4}, tags={"team": "nlp"}, setup=["echo 'a b'"])
    values = yaml.safe_load(Cloud(config, Need("/")).render())
    prepared = prepare_config(values)
    validate_config(prepared)
    assert prepared["provider"]["type"] == provider
    assert prepared["available_node_types"]["worker"]["max_workers"] == prepared["max_workers"] == 3
    assert prepared["idle_timeout_minutes"] == 10
    assert prepared["setup_commands"][0] == "echo 'a b'"
    assert "watchdog" not in json.dumps(values)
    validate_config(prepare_config(launcher_config(config, config.regions[0], Boot(KEY, watched=True), "k", "k.pub")))


def test_what_makes_a_machine_of_aws_end_with_itself():
    config = section(spot=True, disk_gb=300, identity="arn:aws:iam::1:instance-profile/p", tags={"team": "nlp"})
    node = cloud_of("aws").machine(config, "us-east-1", Boot(KEY, watched=True))
    assert node["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert node["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"] is True
    assert node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 300
    assert node["InstanceMarketOptions"]["SpotOptions"]["InstanceInterruptionBehavior"] == "terminate"
    assert node["IamInstanceProfile"] == {"Arn": "arn:aws:iam::1:instance-profile/p"}
    assert len(node["UserData"]) <= 16384  # what EC2 takes


def test_what_makes_machines_of_the_others_end():
    google = cloud_of("gcp").machine(section("gcp", spot=True), "us-central1-a", Boot(KEY, watched=True))
    assert google["disks"][0]["autoDelete"] is True
    assert google["scheduling"]["instanceTerminationAction"] == "DELETE"
    script = {item["key"]: item["value"] for item in google["metadata"]["items"]}["startup-script"]
    compile(script, "startup-script", "exec")
    assert len(script) <= 256 * 1024  # what Compute Engine takes
    azure = cloud_of("azure").machine(section("azure", spot=True), "eastus", Boot(KEY, watched=True))
    assert azure["azure_arm_parameters"]["evictionPolicy"] == "Delete"
    assert set(azure["azure_arm_parameters"]) <= set(azure_template()["parameters"])


def azure_template() -> dict[str, Any]:
    """Ray's own."""
    import ray

    place = Path(ray.__file__).parent / "autoscaler/_private/_azure/azure-vm-template.json"
    return dict(json.loads(place.read_text()))


def test_rays_template_for_azure_gets_a_watchdog_and_what_goes_with_a_machine():
    """As Ray's provider hands it to the resource manager's client."""
    told = []
    deployments = SimpleNamespace(begin_create_or_update=lambda **values: told.append(values))
    provider = SimpleNamespace(resource_client=SimpleNamespace(deployments=deployments, resources="others"))
    node = cloud_of("azure").machine(section("azure"), "eastus", Boot(KEY, watched=True))
    cloud_of("azure").complete(provider, node)
    assert provider.resource_client.resources == "others"
    values = {"properties": {"template": azure_template(), "parameters": {}}}
    provider.resource_client.deployments.create_or_update(
        resource_group_name="g", deployment_name="d", parameters=values
    )
    [call] = told
    assert (call["resource_group_name"], call["deployment_name"]) == ("g", "d")
    public, private, _, machine = (
        each["properties"] for each in call["parameters"]["properties"]["template"]["resources"]
    )
    text = base64.b64decode(machine["osProfile"]["customData"]).decode()
    assert text == cloud_config(section("azure"), KEY, watched=True)
    assert "delete_at_azure" in text
    assert machine["storageProfile"]["osDisk"]["deleteOption"] == "Delete"
    assert machine["networkProfile"]["networkInterfaces"][0]["properties"] == {"deleteOption": "Delete"}
    addresses = public["ipConfigurations"][0]["properties"]["publicIpAddress"]
    assert addresses["properties"] == {"deleteOption": "Delete"}
    assert "publicIpAddress" not in private["ipConfigurations"][0]["properties"]


def test_the_machine_section_wins_and_labels_are_plain():
    node = cloud_of("aws").machine(section(machine={"SubnetIds": ["subnet-1"]}), "us-east-1", Boot(KEY, watched=True))
    assert node["SubnetIds"] == ["subnet-1"]
    assert as_label("Llama 3.1 / Support_Bot!") == "llama-3-1-support-bot"
    assert as_label("日本") == "run"
    assert all(len(value) <= 63 for value in tags_of("x" * 100, "abcd1234", 1e9).values())


def test_disks_that_go_with_their_machines_hold_no_checkpoints():
    need = Need("/", "/nfs/runs", {"model.path": "/models/m"}, {"data.train.0.path": "/data/*.jsonl"})
    assert [line.partition(":")[0] for line in paths(section(), need)] == [
        "checkpoint.path", "model.path", "data.train.0.path",
    ]  # fmt: skip
    config = section(shared_paths=["/nfs", "/models", "/data"])
    assert list(paths(config, need)) == []


def test_key_files(tmp_path):
    key = tmp_path / "key"
    assert "is not there" in next(key_problems(section(identity_file=str(key))))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    assert list(key_problems(section(identity_file=str(key)))) == []
    assert public_key(key).split()[:2] == key.with_name("key.pub").read_text().split()[:2]
    key.chmod(0o644)
    assert "chmod 600" in next(key_problems(section(identity_file=str(key))))
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "hush", "-f", str(locked)], check=True)
    assert public_key(locked) == locked.with_name("locked.pub").read_text().strip()  # for ssh-agent
    locked.with_name("locked.pub").unlink()
    assert "no private key that can be read" in next(key_problems(section(identity_file=str(locked))))


def test_files_of_a_login_are_closed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    old = os.umask(0)
    try:
        access = Access(section())
        known = "10.0.0.1 ssh-ed25519 AAAA\n"
        again = Access(section(), known)
    finally:
        os.umask(old)
    assert "accept-new" in access.ssh_config.read_text()
    assert "StrictHostKeyChecking yes" in again.ssh_config.read_text()
    assert again.host_keys == known
    for file in again.ssh_config.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
    access.close()
    again.close()
    assert not again.ssh_config.exists()


# --- what is installed ------------------------------------------------------------------------------------------------


def test_versions_of_here_are_installed_there():
    import ray

    assert f"ray[data,train]=={ray.__version__}" in pinned()
    assert not [each for each in pinned() if "+" in each]  # a local build is nowhere else
    lines = setup_script(section(setup=["echo hello"])).splitlines()
    assert lines[:2] == ["set -e", "echo hello"]
    place = environment_of(section())
    assert Path(place).relative_to("/home") == Path("ubuntu/.ftlaunch")
    assert lines[2] == f"python3 -m venv {place}"
    assert lines[3].startswith(f"{place}/bin/python -m pip install")
    assert setup_script(section(python="/opt/p/bin/python")).split() == ["set", "-e"]


def test_the_environment_is_made(tmp_path, monkeypatch):
    """For real, but for what is in every environment already."""
    place = tmp_path / "a home's .ftlaunch"
    monkeypatch.setattr("ftlaunch.cluster.cloud_boot.environment_of", lambda _config: str(place))
    monkeypatch.setattr("ftlaunch.cluster.cloud_boot.pinned", lambda: ["pip>=1"])
    done = subprocess.run(["bash", "-s"], input=setup_script(section()), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "bin" / "python").exists()


def test_the_first_line_that_fails_ends_the_setup(tmp_path):
    text = setup_script(section(setup=[f"cd {tmp_path}", "touch first", "false", "touch second"], python="/p"))
    done = subprocess.run(["bash", "-s"], input=text, text=True, check=False)
    assert done.returncode == 1
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


# --- the watchdog -----------------------------------------------------------------------------------------------------

SETTINGS = {"idle_s": 600.0, "linger_s": 60.0, "begin_s": 3600.0, "max_s": None}


@pytest.mark.parametrize(
    ("seen", "ends_s"),
    [
        ([], 601),  # nobody came
        ([(0, 3000, dog.HELD)], 3601),  # a launcher that went away
        ([(0, 90000, dog.HELD)], 4200),  # one that was cut off and never noticed
        ([(100, 50000, b"job")], 50061),
        ([(100, 500, dog.HELD), (400, 5000, b"job")], 5061),
        ([(0, 90000, dog.HELD), (100, 50000, b"job")], 50061),
        ([(100, 130, b"job"), (150, 5000, b"job")], 5061),  # its first process was not its last
    ],
)
def test_when_a_machine_ends(seen, ends_s):
    """`seen`: (from, to, mark) in seconds."""
    watch = dog.Watch(SETTINGS)
    for now_s in range(100000):
        marks = {mark for start, end, mark in seen if start <= now_s < end}
        if watch.why_end(marks, float(now_s)) is not None:
            break
    assert now_s == pytest.approx(ends_s, abs=1)  # one second between looks


def test_a_machine_ends_after_its_hours():
    watch = dog.Watch({**SETTINGS, "max_s": 7200.0})
    assert watch.why_end({b"job"}, 7200.0) is None
    assert "as long as it may" in watch.why_end({b"job"}, 7201.0)


MACHINE = "/subscriptions/S/resourceGroups/G/providers/M/virtualMachines/V"


class _Provider(BaseHTTPRequestHandler):
    """A metadata server and an API in one, after the providers' documentation. `refuse`: methods that are."""

    asked: ClassVar[list[tuple[str, str, dict[str, str], str]]]
    refuse: ClassVar[frozenset[str]]
    ANSWERS: ClassVar[dict[str, str]] = {
        "/computeMetadata/v1/instance/service-accounts/default/token": '{"access_token": "t0", "expires_in": 3599}',
        "/computeMetadata/v1/instance/zone": "projects/123/zones/us-central1-a",
        "/computeMetadata/v1/instance/name": "ftlaunch-x-1-compute",
        "/metadata/identity/oauth2/token": '{"access_token": "t1"}',
        "/metadata/instance/compute": f'{{"resourceId": "{MACHINE}"}}',
    }

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.asked.append((self.command, self.path, dict(self.headers), body))
        self.send_response(403 if self.command in self.refuse else 200)
        self.end_headers()
        self.wfile.write(self.ANSWERS.get(self.path.partition("?")[0], "{}").encode())

    do_GET = do_DELETE = do_PATCH = _answer

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def provider(monkeypatch):
    class Handler(_Provider):
        asked: ClassVar[list[Any]] = []
        refuse: ClassVar[frozenset[str]] = frozenset()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    commands: list[list[str]] = []
    monkeypatch.setattr(dog.subprocess, "call", lambda command: commands.append(command) or 0)
    yield Handler, {"metadata": base, "api": base}, commands
    server.shutdown()
    server.server_close()


def test_a_machine_of_google_deletes_itself(provider):
    handler, settings, commands = provider
    dog.delete_at_google(settings)
    method, path, headers, _ = handler.asked[-1]
    assert (method, path) == ("DELETE", "/compute/v1/projects/123/zones/us-central1-a/instances/ftlaunch-x-1-compute")
    assert headers["Authorization"] == "Bearer t0"
    assert all(headers["Metadata-Flavor"] == "Google" for _, _, headers, _ in handler.asked[:-1])
    assert commands == [["systemctl", "poweroff"]]
    handler.refuse = frozenset({"DELETE"})  # it may not: then it stops
    with pytest.raises(OSError, match="403"):
        dog.delete_at_google(settings)
    assert len(commands) == 2


def test_a_machine_of_azure_deletes_itself(provider):
    handler, settings, commands = provider
    dog.delete_at_azure(settings)
    method, path, headers, _ = handler.asked[-1]
    assert (method, path.partition("?")[0]) == ("DELETE", MACHINE)
    assert headers["Authorization"] == "Bearer t1"
    assert commands == []  # a stopped machine would be paid for


def test_there_is_one_watchdog_and_it_ends_the_machine(tmp_path):
    """The program as it travels, with a `systemctl` that only notes that it was asked."""
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    (tmp_path / "systemctl").chmod(0o755)
    lock = tmp_path / "lock"
    text = watchdog(section(idle_minutes=0.001), detached=True).replace("/run/ftlaunch-watchdog.lock", str(lock))
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # Others on this machine may have marks: what this one sees is nothing of theirs.
    text = text.replace('Path("/proc").iterdir()', "[]")
    holder = os.open(lock, os.O_RDWR | os.O_CREAT)
    dog.fcntl.flock(holder, dog.fcntl.LOCK_EX)
    second = subprocess.run([sys.executable, "-"], input=text, text=True, capture_output=True, env=environ, check=True)
    assert second.stdout == "the machine is watched\n"
    os.close(holder)
    assert not (tmp_path / "asked").exists()
    subprocess.run([sys.executable, "-"], input=text, text=True, capture_output=True, env=environ, check=True)
    deadline = threading.Event()
    for _ in range(300):
        if (tmp_path / "asked").exists() and (tmp_path / "asked").read_text().endswith("\n"):
            break
        deadline.wait(0.1)
    assert (tmp_path / "asked").read_text() == "poweroff\n"
    [pid] = [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/fd")
        if path.parent.name != str(os.getpid()) and str(lock) in _links(path)
    ]  # fmt: skip
    os.kill(pid, 9)


def _links(folder: Path) -> list[str]:
    try:
        return [os.readlink(each) for each in folder.iterdir()]
    except OSError:
        return []


def test_no_secret_travels_with_a_machine():
    config = section(env=["HF_TOKEN"])
    text = cloud_config(config, KEY, watched=True) + json.dumps(metadata(config, KEY, watched=True))
    assert "HF_TOKEN" not in text


# --- what the provider says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "means"),
    [
        ("InsufficientInstanceCapacity", "room"),
        ("VcpuLimitExceeded", "room"),
        ("UnauthorizedOperation", "mendable"),
        ("InvalidAMIID.NotFound", "mendable"),
        ("RequestLimitExceeded", "down"),
    ],
)
def test_what_refusals_of_aws_mean(code, means):
    from botocore.exceptions import ClientError
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    assert cloud_of("aws").meaning(ClientError({"Error": {"Code": code, "Message": "m"}}, "RunInstances")) == means
    assert cloud_of("aws").meaning(NodeLaunchException(code, "m", None)) == means


def test_what_other_failures_of_aws_mean():
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError

    assert cloud_of("aws").meaning(EndpointConnectionError(endpoint_url="u")) == "down"
    assert cloud_of("aws").meaning(NoCredentialsError()) == "mendable"
    assert cloud_of("gcp").meaning(Exception({"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED"}]})) == "room"


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_an_estimate_from_the_table_or_the_users_own():
    cost = plan_cost(section(nodes=4, max_hours=10))
    assert cost.usd_per_hour == pytest.approx(4 * PRICES["aws"]["g5.12xlarge"])
    assert cost.most_usd == pytest.approx(40 * PRICES["aws"]["g5.12xlarge"])
    text = cost_text(cost)
    assert "about $22.69 an hour, at most about $226.88" in text
    assert "estimate" in text
    assert "January 2025" in text
    own = plan_cost(section(nodes={"min": 1, "max": 2}, prices={"g5.12xlarge": 2.5}))
    assert (own.usd_per_hour, own.source) == (5.0, "cluster.prices")
    unknown = plan_cost(section(instance_type="x9.huge"))
    assert isinstance(unknown, Unknown)
    assert "cluster.prices: {x9.huge: DOLLARS}" in str(unknown)


def test_the_plan_shows_the_estimate(tmp_path):
    from rich.console import Console
    from tiny import recipe_for, write_recipe

    from ftlaunch.launcher.hardware import Machine
    from ftlaunch.launcher.plan import make_plan
    from ftlaunch.launcher.plan_view import render_plan
    from ftlaunch.recipes.load import load_recipe

    cluster = {"type": "cloud", "provider": "aws", **OF["aws"], "nodes": 2, "gpus_per_node": 4}
    path = write_recipe(tmp_path / "a.yaml", recipe_for(tmp_path, cluster=cluster))
    text = io.StringIO()
    plan = make_plan(load_recipe(path, environ={}), Machine())
    Console(file=text, width=200).print(render_plan(plan))
    assert "about $11.34 an hour" in text.getvalue()
    assert "InstanceType: g5.12xlarge" in text.getvalue()
