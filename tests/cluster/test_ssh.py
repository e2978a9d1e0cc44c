"""Runs on real hosts over real SSH: what is wrong with hosts, what is left when somebody dies, who may see what."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import Command, ftlaunch, run
from ssh_hosts import Hosts
from tiny import recipe_for, write_recipe
from training import read_run

from ftlaunch.cluster.base import Need
from ftlaunch.cluster.ssh import Ssh
from ftlaunch.launcher import cli
from ftlaunch.recipes.errors import InfrastructureError
from ftlaunch.recipes.schema_cluster import SshCluster

WAIT_S = 120.0
ENV = ["OMP_NUM_THREADS", "HF_HUB_*"]


ANYWHERE = Need(folder="/")


def problems(made: Hosts, need: Need = ANYWHERE, **changes: object) -> str:
    """What the cluster says of itself."""
    cluster = Ssh(SshCluster.model_validate(made.cluster(**changes)), need)
    try:
        return "\n".join(cluster.problems())
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def strangers(hosts: Hosts) -> Hosts:
    """Aliases under which the same hosts are seen wrongly."""
    addresses = {name: host.address for name, host in hosts.members.items()}
    alias = "Host {name}\n  HostName {address}\n  User root\n  {lines}\n"
    usual = f"UserKnownHostsFile {hosts.folder}/known_hosts"
    key = f"IdentityFile {hosts.folder}/client\n  IdentitiesOnly yes"
    hosts.make_key("stranger")
    other = (hosts.folder / "host_alpha.pub").read_text()
    (hosts.folder / "known_of_another").write_text(f"{addresses['gamma']} {other}")
    entries = {
        "unknown-key": (addresses["gamma"], f"UserKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  {key}"),
        "other-key": (addresses["gamma"], f"UserKnownHostsFile {hosts.folder}/known_of_another\n  {key}"),
        "locked": (addresses["beta"], f"{usual}\n  IdentityFile {hosts.folder}/stranger\n  IdentitiesOnly yes"),
        "closed": (addresses["alpha"], f"{usual}\n  Port 2222\n  {key}"),
        "twin": (addresses["alpha"], f"{usual}\n  {key}"),
    }
    with hosts.ssh_config.open("a") as config:
        for name, (address, lines) in entries.items():
            config.write(alias.format(name=name, address=address, lines=lines))
    return hosts


def test_hosts_that_cannot_be_asked_are_named_together(strangers):
    names = ["alpha", "nowhere.invalid", "unknown-key", "other-key", "locked", "closed"]
    said = problems(strangers, hosts=names)
    assert "host nowhere.invalid: no such host" in said
    assert "host unknown-key: its host key is not known here; connect once by hand" in said
    assert "host other-key: its host key is not the one that known_hosts has" in said
    assert "host locked: it does not let us in: set cluster.user and cluster.identity_file" in said
    assert "host closed: nothing listens on its SSH port" in said
    assert "host alpha" not in said


def test_a_machine_that_is_down_is_no_mistake_of_the_users(strangers):
    with pytest.raises(InfrastructureError, match="host closed: nothing listens on its SSH port"):
        problems(strangers, hosts=["closed", "alpha"])


def test_what_hosts_lack(strangers):
    said = problems(
        strangers, hosts=["alpha", "twin"], nodes=4, gpus_per_node=2, env=["NOT_SET_ANYWHERE", "NOTHING_LIKE_THIS_*"]
    )
    assert (
        "cluster.nodes: 4 nodes are asked for, cluster.hosts names 2. Add hosts, or ask for fewer (--nodes 2)" in said
    )
    assert "cluster.env: NOT_SET_ANYWHERE is not set here" in said
    assert "host alpha: cluster.gpus_per_node is 2, it has 0" in said
    assert "alpha and twin are the same machine" in said


def test_python_that_is_not_there(hosts):
    said = problems(hosts, python="/no/such/python")
    for name in hosts.names:
        assert f"host {name}: cluster.python is not there (" in said


def test_folders_and_files_that_are_not_shared(hosts):
    (hosts.scratch / "everywhere").mkdir(exist_ok=True)
    here = str(hosts.folder / "ssh_config")
    need = Need("/", str(hosts.scratch / "runs"), {"model.path": "/no/such/model", "data.train.0.path": here})
    said = problems(hosts, need)
    assert f"host beta, gamma: checkpoint.path {hosts.scratch}/runs is not the folder that alpha sees" in said
    for name in hosts.names:
        assert f"host {name}: model.path: /no/such/model is not there" in said
    assert "data.train.0.path" not in said
    assert problems(hosts, Need("/", str(hosts.folder / "runs"), {"data.train.0.path": here})) == ""
    assert not list((hosts.folder / "runs").iterdir())


def test_nodes_that_do_not_reach_each_other(hosts):
    address = hosts.members["alpha"].address
    hosts.shell("gamma", f"ip route add blackhole {address}/32")
    try:
        said = problems(hosts)
    finally:
        hosts.shell("gamma", f"ip route del blackhole {address}/32")
    assert "host gamma: does not reach alpha at" in said
    assert "beta" not in said


def test_a_host_with_other_versions(hosts):
    """Another METADATA over the real one, in the mount namespace of gamma's sshd: what `pip` would have installed."""
    import importlib.metadata

    import ray

    metadata = Path(ray.__file__).parents[1] / f"ray-{importlib.metadata.version('ray')}.dist-info" / "METADATA"
    other = hosts.folder / "METADATA"
    other.write_text(metadata.read_text().replace(f"\nVersion: {ray.__version__}\n", "\nVersion: 2.59.1\n", 1))
    hosts.shell("gamma", f"mount --bind {other} {metadata}")
    try:
        said = problems(hosts)
    finally:
        hosts.shell("gamma", f"umount {metadata}")
    assert "host gamma: ftlaunch needs ray" in said
    assert "(2.59.1); there: " + sys.executable in said
    assert f"hosts differ: ray is {ray.__version__} on alpha, beta, 2.59.1 on gamma; install the same on all" in said


def test_exit_codes(strangers, tmp_path, capsys):
    for host, code, words in (
        ("nowhere.invalid", 1, "no such host"),
        ("closed", 2, "nothing listens"),
    ):
        recipe = recipe_for(tmp_path, cluster=strangers.cluster(hosts=[host]))
        assert cli.main([str(write_recipe(tmp_path / "tiny.yaml", recipe))]) == code
        assert words in capsys.readouterr().err
    recipe = recipe_for(tmp_path, cluster={"type": "local"})
    assert cli.main([str(write_recipe(tmp_path / "tiny.yaml", recipe)), "--detach"]) == 1
    assert "--detach" in capsys.readouterr().err


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(hosts: Hosts, request) -> Path:
    """A folder that all hosts share."""
    path = hosts.folder / request.node.name[:40]
    path.mkdir()
    return path


def prepare(work: Path, name: str, hosts: Hosts, steps: int, **changes: object) -> Path:
    """A recipe; the directory of its run."""
    recipe = recipe_for(work, train={"max_steps": steps}, cluster=hosts.cluster(env=ENV, **changes))
    write_recipe(work / f"{name}.yaml", {**recipe, "name": name})
    return work / "runs" / name


def left(hosts: Hosts) -> dict[str, list[str]]:
    """Commands of ours that still run, by host."""
    found = {name: [*host.processes("ray"), *host.processes("ftlaunch")] for name, host in hosts.members.items()}
    return {name: commands for name, commands in found.items() if commands}


def wait_until(happened, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def reached(directory: Path, step: int) -> bool:
    log = directory / "metrics.jsonl"
    return log.exists() and f'"step":{step},' in log.read_text()


def test_a_launcher_killed_while_it_starts_leaves_nothing(hosts, work):
    prepare(work, "killed", hosts, 5)
    command = Command(ftlaunch("killed.yaml"), work)
    assert command.wait_until(lambda: all(host.processes("host_keeper") for host in hosts.members.values()))
    os.kill(command.process.pid, signal.SIGKILL)  # alone: its connections notice
    command.process.wait()
    assert "submitted" not in command.text
    wait_until(lambda: not left(hosts), f"still there: {left(hosts)}")


def test_a_detached_run_goes_on_is_stopped_saves_and_goes_on(hosts, work):
    directory = prepare(work, "long", hosts, 400)
    code, said = run(ftlaunch("long.yaml", "--detach"), work)
    assert code == 0, said
    assert "it goes on without this command" in said
    wait_until(lambda: reached(directory, 2), said)

    [submission] = (directory / "submissions").glob("*.json")
    folder = hosts.scratch / f"ft-{os.getuid()}" / json.loads(submission.read_text())["job"]
    token = hosts.shell("beta", f"cat {folder}/token")
    assert len(token) == 64
    modes = hosts.shell("alpha", f"stat -c %a {folder} {folder}/token {folder}/keeper.json {folder}/driver.json")
    assert modes.split() == ["700", "600", "600", "600"]
    for name, host in hosts.members.items():
        assert token not in "\n".join(host.processes(""))
        assert token not in hosts.shell(name, f"cat {folder}/*.log; grep -rsF {token} {folder}/r || true")
    rank0 = json.loads((directory / "attempts/a1.json").read_text())["process"]
    assert rank0["host"] == "alpha"  # with the driver
    assert token not in submission.read_text()

    code, said = run(ftlaunch("--nodes", "1", "long.yaml"), work)
    assert code == 1, said
    assert "run long is running" in said

    attached = Command(ftlaunch("attach", "long"), work)
    assert attached.wait_until(lambda: "step " in attached.text), attached.text
    attached.interrupt()
    assert attached.wait() == 0, attached.text
    assert "let go: the run goes on" in attached.text

    code, said = run(ftlaunch("status", "long"), work)
    assert f"submitted as job {folder.name}, driven on alpha" in said

    code, said = run(ftlaunch("stop", "long"), work)
    assert code == 0, said
    assert left(hosts) == {}
    assert json.loads((directory / "attempts/a1.end.json").read_text())["outcome"] == "interrupted"
    code, said = run(ftlaunch("logs", "-f", "long"), work)
    assert code == 0
    assert "stopped after step" in said
    code, said = run(ftlaunch("logs", "--rank", "2", "long"), work)
    assert code == 0, said
    assert "rank 2 of attempt 1, on gamma" in said
    code, said = run(ftlaunch("status", "long", "--json"), work)
    values = json.loads(said)
    assert values["state"] == "interrupted"
    assert values["goodput"]["seconds"]["waiting"] > 0
    code, said = run(ftlaunch("attach", "long"), work)
    assert code == 130, said

    step = read_run(directory).steps[-1]["step"]
    code, said = run(ftlaunch("--nodes", "1", "long.yaml", f"train.max_steps={step + 2}", "--accept-changes"), work)
    assert code == 0, said
    assert f"continuing run long from step {step}" in said
    assert [line["step"] for line in read_run(directory).steps] == list(range(1, step + 3))
    assert left(hosts) == {}


def test_two_jobs_share_hosts_and_what_died_is_cleaned(hosts, work):
    first = prepare(work, "first", hosts, 400, nodes=2)
    second = prepare(work, "second", hosts, 3, nodes=1)
    code, said = run(ftlaunch("first.yaml", "--detach"), work)
    assert code == 0, said
    code, said = run(ftlaunch("second.yaml"), work)  # beside it
    assert code == 0, said
    assert len(read_run(second).steps) == 3
    wait_until(lambda: reached(first, 1), "the first job does not train")
    assert hosts.members["beta"].end("host_keeper") >= 1
    assert hosts.members["alpha"].end("bin/drive") >= 1
    code, said = run(ftlaunch("stop", "--now", "first"), work)
    assert code == 0, said
    assert left(hosts) == {}


def test_a_first_host_that_is_down_is_done_without(strangers, work):
    """Where fewer nodes will do; whoever follows asks the first one that is there."""
    cluster = strangers.cluster(hosts=["closed", "alpha"], nodes={"min": 1, "max": 2}, env=ENV)
    write_recipe(work / "rows.yaml", {**recipe_for(work), "name": "rows", "cluster": cluster})
    code, said = run(ftlaunch("prepare", "rows.yaml", "--to", "shards"), work)
    assert code == 0, said
    assert "runs on alpha" in said
    assert "train on it: ftlaunch" in said
    assert left(strangers) == {}
