"""Machines of a cloud: what is asked of EC2 before and while they are made, and that none is left, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from cloud_site import AWAY, HOME, CloudSite, wait_until
from processes import Command, ftlaunch, run
from tiny import recipe_for, write_recipe
from training import read_run

from ftlaunch.cluster.base import Driver, Need
from ftlaunch.cluster.cloud import Cloud
from ftlaunch.cluster.cloud_machines import STALE_S, Machines
from ftlaunch.recipes.errors import InfrastructureError, UserError
from ftlaunch.recipes.schema_cloud import CloudCluster


def section(site: CloudSite, **changes: object) -> CloudCluster:
    return CloudCluster.model_validate_json(json.dumps(site.cluster(**changes)))


@pytest.fixture
def site(cloud: CloudSite, monkeypatch) -> CloudSite:
    """With this process as its client, and every region with room."""
    for name, value in cloud.environ.items():
        monkeypatch.setenv(name, value)
    cloud.full()
    cloud.boots = False
    (cloud.folder / "asked").write_text("")
    assert cloud.machines() == []
    return cloud


def never(_demand):
    raise AssertionError("nothing is driven")


DRIVER = Driver("m:f", never)


# --- before anything is made ------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_at_once(site, tmp_path, monkeypatch):
    # Nobody is asked while there is something to mend here.
    monkeypatch.setattr("ftlaunch.cluster.clouds.aws.Aws.problems", None)
    key = tmp_path / "key"
    key.write_text("")
    key.chmod(0o644)
    changes = {"env": ["NOT_SET_ANYWHERE"], "identity_file": str(key)}
    said = "\n".join(Cloud(section(site, **changes), Need("/", "/runs")).problems())
    assert "cluster.env: NOT_SET_ANYWHERE is not set here" in said
    assert f"chmod 600 {key}" in said
    assert "checkpoint.path: /runs would be on the machines' own disks" in said


def test_what_ec2_does_not_have(site):
    assert Cloud(section(site), Need("/")).problems() == []
    changes = {"instance_type": "x9.huge", "image": "ami-00000000000000000", "regions": [HOME]}
    said = Cloud(section(site, **changes), Need("/")).problems()
    assert len(said) == 2
    assert f"cluster.instance_type: there is no x9.huge in {HOME}" in said[0]
    assert f"cluster.image: there is no image ami-00000000000000000 in {HOME}" in said[1]
    said = Cloud(section(site, instance_type="g4dn.12xlarge", gpus_per_node=8), Need("/")).problems()
    assert said == ["cluster.gpus_per_node is 8, g4dn.12xlarge has 4"]


def test_no_credentials(site, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    [said] = Cloud(section(site), Need("/")).problems()
    assert "there are no credentials: set AWS_ACCESS_KEY_ID" in said


def test_a_package_that_is_not_installed(site, monkeypatch):
    monkeypatch.setattr("ftlaunch.cluster.clouds.aws.Aws.modules", ("boto3", "no_such_package.inner"))
    [said] = Cloud(section(site), Need("/")).problems()
    assert said == "cluster.provider aws needs no_such_package.inner: pip install 'ftlaunch[aws]'"


def test_a_provider_that_does_not_answer(site, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(InfrastructureError, match="Could not connect"):
        Cloud(section(site), Need("/")).problems()


# --- making them ------------------------------------------------------------------------------------------------------


def launch(site: CloudSite, **changes: object) -> Cloud:
    """As far as machines that are made, and have not been reached yet."""
    cluster = Cloud(section(site, **changes), Need("/", name="Some Run"))
    cluster._job, cluster._is_ours = "12345678", True
    from ftlaunch.cluster.cloud_access import Access

    cluster._access = Access(cluster._config)
    cluster._make()
    return cluster


def regions(site: CloudSite) -> dict[str, object]:
    return {"regions": [HOME, AWAY], "image": {HOME: site.image, AWAY: site.image}, "machine": {}}


def test_machines_say_whose_they_are_and_end_with_themselves(site):
    cluster = launch(site, nodes=3, tags={"team": "nlp"}, spot=True)
    made = site.machines("pending", "running")
    assert len(made) == 3
    for machine in made:
        tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
        assert tags["ray-cluster-name"] == "ftlaunch"
        assert tags["ftlaunch-run"] == "some-run"
        assert (tags["ftlaunch-job"], tags["ftlaunch-state"], tags["team"]) == ("12345678", "starting", "nlp")
        assert "IamInstanceProfile" not in machine
        ends = site.client().describe_instance_attribute(
            InstanceId=machine["InstanceId"], Attribute="instanceInitiatedShutdownBehavior"
        )
        assert ends["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
    assert cluster.standing() is None  # no run is there
    assert not [line for line in site.asked() if "Role" in line or "InstanceProfile" in line]
    cluster.down()
    assert site.machines() == []


def test_the_next_region_where_one_has_no_room(site):
    site.full(f"{HOME} InsufficientInstanceCapacity We currently do not have sufficient m5.large capacity")
    cluster = launch(site, nodes=2, **regions(site))
    assert {machine["Region"] for machine in site.machines()} == {AWAY}
    cluster.down()
    assert site.machines() == []


def test_fewer_than_were_asked_for(site):
    site.full(room=2)
    with pytest.raises(InfrastructureError, match=f"{HOME}: 2 of 3 machines were given"):
        Cloud(section(site, nodes=3), Need("/")).up(DRIVER, never)
    assert site.machines() == []
    cluster = launch(site, nodes={"min": 2, "max": 3})  # enough
    assert len(site.machines()) == 2
    cluster.down()
    assert site.machines() == []


def test_no_room_anywhere(site):
    site.full(
        f"{HOME} InsufficientInstanceCapacity We currently do not have sufficient capacity",
        f"{AWAY} VcpuLimitExceeded You have requested more vCPU capacity than your current limit of 8 allows",
    )
    with pytest.raises(InfrastructureError) as caught:
        Cloud(section(site, nodes=2, **regions(site)), Need("/")).up(DRIVER, never)
    assert "there is no room for 2 machines of m5.large" in str(caught.value)
    assert f"{HOME}: InsufficientInstanceCapacity: We currently do not have" in str(caught.value)
    assert f"{AWAY}: VcpuLimitExceeded: You have requested more vCPU" in str(caught.value)
    assert site.machines() == []


def test_a_refusal_that_no_region_changes(site):
    site.full(f"{HOME} UnauthorizedOperation You are not authorized to perform this operation.")
    with pytest.raises(UserError, match="UnauthorizedOperation: You are not authorized"):
        Cloud(section(site, **regions(site)), Need("/")).up(DRIVER, never)
    assert not [line for line in site.asked() if line.startswith(AWAY)]
    assert site.machines() == []
    with pytest.raises(UserError, match=f"{HOME}: .*subnet-00000000"):
        Cloud(section(site, machine={"SubnetIds": ["subnet-00000000"]}), Need("/")).up(DRIVER, never)


def test_machines_that_nobody_can_log_in_to_are_given_back(site, monkeypatch):
    monkeypatch.setattr("ftlaunch.cluster.cloud_access.REACH_S", 1.0)
    monkeypatch.setattr("ftlaunch.cluster.cloud_access.CONNECT_S", 1)
    monkeypatch.setattr("ftlaunch.cluster.ssh_connection.CONNECT_S", 1)
    with pytest.raises(InfrastructureError, match="after it began to run"):
        Cloud(section(site, nodes=2), Need("/")).up(DRIVER, never)
    assert f"{HOME} RunInstances" in site.asked()
    assert site.machines() == []


def test_what_a_dead_launcher_has_left_is_ended_by_the_next(site):
    left = launch(site, nodes=2)
    left._is_ours = False
    left.down()
    [first, second] = sorted(machine["InstanceId"] for machine in site.machines())
    begun = [{"Key": "ftlaunch-begun", "Value": str(10**9)}]
    site.client().create_tags(Resources=[first], Tags=begun)
    other = Machines(section(site), HOME, "87654321")
    assert other.end_stale() == [first]
    assert [machine["InstanceId"] for machine in site.machines()] == [second]  # it may be on its way
    site.client().create_tags(Resources=[second], Tags=[*begun, {"Key": "ftlaunch-state", "Value": "running"}])
    assert other.end_stale() == []  # a run is on it
    Machines(section(site), HOME, "12345678").end()
    assert site.machines() == []
    assert STALE_S > 3600  # longer than any launcher takes


# --- machines that have power -----------------------------------------------------------------------------------------


@pytest.fixture
def work(cloud: CloudSite, request) -> Path:
    """A folder that all machines share."""
    cloud.boots = True
    cloud.full()
    path = cloud.hosts.folder / request.node.name[:40]
    path.mkdir()
    return path


def prepare(cloud: CloudSite, work: Path, name: str, steps: int, **changes: object) -> Path:
    """A recipe whose machines end themselves after half a minute without a run; the directory of its run."""
    cluster = cloud.cluster(
        shared_paths=[str(work)], python=sys.executable, idle_minutes=0.4, doctor=False,
        env=["OMP_NUM_THREADS", "HF_HUB_*"], **changes,
    )  # fmt: skip
    write_recipe(work / f"{name}.yaml", {**recipe_for(work, train={"max_steps": steps}, cluster=cluster), "name": name})
    return work / "runs" / name


def test_machines_end_without_anybody(cloud, work):
    """Those of a launcher that got SIGKILL while lines of `setup` ran on them, and those of a run that went on without
    its launcher and has ended."""
    directory = prepare(cloud, work, "alone", 3)
    prepare(cloud, work, "killed", 3, nodes=2, setup=["sleep 600"])
    killed = Command(ftlaunch("killed.yaml"), work, cloud.environ)
    try:
        code, said = run(ftlaunch("alone.yaml", "--detach"), work, cloud.environ)
        assert code == 0, said
        assert "asking for 1 machines of m5.large" in said
        wait_until(
            lambda: sum(bool(host.processes("sleep 600")) for host in list(cloud.hosts.members.values())) == 2,
            lambda: killed.text,
        )
        assert len(cloud.machines()) == 3
    finally:
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.wait()
    wait_until(lambda: cloud.machines() == [], lambda: f"{cloud.machines()}, {cloud.failed}", 120.0)
    assert [line["step"] for line in read_run(directory).steps] == [1, 2, 3]
    code, said = run(ftlaunch("attach", "alone"), work, cloud.environ)
    assert code == 0, said


def test_a_run_is_found_again_and_stopped_with_its_machines(cloud, work):
    directory = prepare(cloud, work, "long", 400)
    code, said = run(ftlaunch("long.yaml", "--detach"), work, cloud.environ)
    assert code == 0, said
    [submission] = (directory / "submissions").glob("*.json")
    record = json.loads(submission.read_text())
    assert record["region"] == HOME
    assert cloud.environ["AWS_SECRET_ACCESS_KEY"] not in submission.read_text()
    states = {tag["Value"] for one in cloud.machines() for tag in one["Tags"] if tag["Key"] == "ftlaunch-state"}
    assert states == {"running"}

    log = directory / "metrics.jsonl"
    wait_until(lambda: log.exists() and '"step":2,' in log.read_text(), lambda: said)

    record["host_keys"] = record["host_keys"].replace("AAAAC3", "AAAAC4").replace("AAAAB3", "AAAAB4")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environ.items():
            patch.setenv(name, value)
        strange = Cloud.find(record)  # whoever answers there now is somebody else
        assert "which do not answer" in strange.standing()
        strange.down()

    code, said = run(ftlaunch("stop", "long"), work, cloud.environ)
    assert code == 0, said
    assert json.loads((directory / "attempts/a1.end.json").read_text())["outcome"] == "interrupted"
    assert cloud.machines() == []
    code, said = run(ftlaunch("stop", "long"), work, cloud.environ)  # there is nothing to stop
    assert code == 0, said


def test_a_setup_that_fails_is_told_and_its_machines_given_back(cloud, work):
    lines = ["echo installing", "cat /no/such/file"]
    cluster = cloud.cluster(nodes=2, shared_paths=[str(work)], setup=lines)
    write_recipe(work / "broken.yaml", {**recipe_for(work, cluster=cluster), "name": "broken"})
    code, said = run(ftlaunch("broken.yaml"), work, cloud.environ)
    assert code == 1, said
    assert said.count("setting it up failed: ") == 2
    assert "/no/such/file" in said
    assert cloud.machines() == []


def test_ctrl_c_while_machines_are_set_up_gives_them_back(cloud, work):
    prepare(cloud, work, "given-up", 3, setup=["sleep 600"])
    command = Command(ftlaunch("given-up.yaml"), work, cloud.environ)
    wait_until(
        lambda: any(host.processes("sleep 600") for host in list(cloud.hosts.members.values())), lambda: command.text
    )
    command.interrupt()
    assert command.wait() == 130, command.text
    assert cloud.machines() == []
