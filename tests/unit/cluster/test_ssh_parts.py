"""The parts of the `ssh` cluster that need no host: names, OpenSSH's words, files of a job, the keeper's watch."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys

import pytest

from ftlaunch.cluster.base import Demand, Need
from ftlaunch.cluster.host_agent import MARK, end_processes, processes_of
from ftlaunch.cluster.host_keeper import LOST_S, REFUSED_S, Watch
from ftlaunch.cluster.ssh import Ssh
from ftlaunch.cluster.ssh_connection import Connection, HostError, explain, ssh_command
from ftlaunch.cluster.ssh_hosts import hosts_of, node_count
from ftlaunch.cluster.ssh_job import JobPlan, Node, travelling, unset
from ftlaunch.cluster.table import CLUSTERS, SUBMITTED_CLUSTERS
from ftlaunch.recipes.errors import KeyedError
from ftlaunch.recipes.schema import Recipe
from ftlaunch.recipes.schema_cluster import SshCluster


def cluster(**changes: object) -> SshCluster:
    return SshCluster.model_validate({"type": "ssh", "hosts": ["a", "b"], **changes})


def test_every_type_of_the_schema_is_in_one_table():
    types = {"local", "ray", "ssh", "slurm", "kubernetes", "cloud"}
    assert set(CLUSTERS) | set(SUBMITTED_CLUSTERS) == types
    assert not set(CLUSTERS) & set(SUBMITTED_CLUSTERS)
    assert set(Recipe.model_json_schema()["properties"]["cluster"]["discriminator"]["mapping"]) == types


def test_a_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nalpha\n\n  10.0.0.2 # the second\n")
    config = cluster(hosts=[], hostfile=str(path))
    assert hosts_of(config) == ("alpha", "10.0.0.2")
    assert (node_count(config), node_count(cluster(nodes=1)), node_count(cluster())) == (2, 1, 2)
    for text, says in (
        ("alpha slots=8\n-v\n", "line 1: 'alpha slots=8' is no host's name; line 2: '-v' is no host's name"),
        ("# nobody\n", "names no host"),
        ("a\nb\na\n", "a more than once"),
    ):
        path.write_text(text)
        with pytest.raises(KeyedError, match=r"^cluster.hostfile: ") as caught:
            hosts_of(config)
        assert says in str(caught.value)
    path.unlink()
    with pytest.raises(KeyedError, match="cannot be read"):
        hosts_of(config)


@pytest.mark.parametrize(
    ("code", "said", "means", "mendable"),
    [
        (255, "ssh: connect to host a port 22: Connection timed out", "it does not answer", False),
        (255, "ssh: connect to host a port 22: No route to host", "no way to it", False),
        (255, "a@b: Permission denied (publickey).", "cluster.identity_file", True),
        (255, "Too many authentication failures", "cluster.identity_file", True),
        (255, "@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "ssh-keygen -R", True),
        (127, "bash: /opt/python: No such file or directory", "cluster.python is not there", True),
        (126, "bash: /opt/python: Permission denied", "cluster.python cannot be run", True),
        (1, "Segmentation fault", "Segmentation fault", False),
        (255, "something new", "something new", False),
        (None, "", "ssh ended with None", False),
    ],
)  # fmt: skip
def test_what_openssh_says_is_explained(code, said, means, mendable):
    error = explain(code, said)
    assert means in str(error)
    assert error.mendable is mendable


def test_the_command_holds_no_value_a_shell_could_run():
    config = cluster(user="ann", port=2222, identity_file="~/.ssh/k y", ssh_config="/c f")
    command = ssh_command(config, "a", "/opt/my python'; touch /pwned #")
    place = command.index("--")
    assert command[place + 1] == "a"
    assert len(command) == place + 3
    assert shlex.split(command[-1])[0] == "/opt/my python'; touch /pwned #"
    assert command[command.index("-i") + 1] == "~/.ssh/k y"
    assert {"BatchMode=yes", "IdentitiesOnly=yes"} <= set(command)
    assert not [word for word in command if "StrictHostKeyChecking" in word]  # the user's own setting


def test_a_conversation_with_an_agent_on_this_machine(tmp_path):
    """The bootstrap, the marks and the errors, without ssh in between."""
    command = ssh_command(cluster(), "a", sys.executable)
    host = Connection("here", ["sh", "-c", f"echo welcome; {command[-1]}"])
    try:
        facts = host.ask("facts", packages=["torch", "no-such-package"])
        assert facts["packages"]["no-such-package"] is None
        assert facts["packages"]["torch"]
        path = tmp_path / "a 'b' $(id)" / "token"
        host.ask("put_token", path=str(path), token="t")
        assert host.ask("get_token", path=str(path)) == {"token": "t"}
        assert host.ask("missing", paths=[str(path), str(tmp_path / "none")]) == {"missing": [str(tmp_path / "none")]}
        with pytest.raises(HostError, match="KeyError"):
            host.ask("get_token")
        assert host.ask("reach", targets=[["127.0.0.1", host.ask("listen")["port"]]])["own"] == ["127.0.0.1"]
    finally:
        host.close()
    with pytest.raises(HostError):
        host.ask("ping")
    assert MARK.strip()


def plan(**changes: object) -> JobPlan:
    nodes = tuple(Node(name, f"/py/{name}", f"/t/ft-0/{name}j", f"10.0.0.{n}") for n, name in enumerate("ab", 1))
    settings = {"job": "j", "nodes": nodes, "port": 7, "demand": Demand(2, 4, uses_gpus=True, cpus_per_rank=3)}
    return JobPlan(**{**settings, "entry": "m.n:go", "folder": "/w", "environ": {"HF_TOKEN": "hf"}, **changes})


def test_the_files_of_a_job():
    first, second = (plan().files(index, "5ec2e7", {"secret": 1}, {"ftlaunch/a.py": b"x"}) for index in (0, 1))
    assert set(first) == {"package/ftlaunch/a.py", "token", "keeper.json", "bin/drive", "driver.json"}
    assert set(second) == {"package/ftlaunch/a.py", "token", "keeper.json"}
    assert b"from m.n import go" in first["bin/drive"]
    keeper = json.loads(second["keeper.json"])
    assert keeper["driver"] is None
    assert keeper["env"]["RAY_AUTH_TOKEN_PATH"] == "/t/ft-0/bj/token"
    assert keeper["env"]["HF_TOKEN"] == "hf"
    assert "5ec2e7" not in first["keeper.json"].decode() + plan().text()
    arguments = keeper["ray"]
    assert first["token"] == second["token"] == b"5ec2e7"
    assert {"--address=10.0.0.1:7", "--num-cpus=6", "--num-gpus=2", "--temp-dir=/t/ft-0/bj/r"} <= set(arguments)
    assert "--head" not in arguments
    head = json.loads(first["keeper.json"])
    assert head["driver"][-2:] == ["/t/ft-0/aj/driver.json", "10.0.0.1:7"]
    assert {"--head", "--port=7"} <= set(head["ray"])


def test_variables_that_travel():
    environ = {"HF_TOKEN": "1", "AWS_KEY": "2", "AWS_ID": "3", "HOME": "4"}
    assert travelling(["HF_TOKEN", "AWS_*"], environ) == {"HF_TOKEN": "1", "AWS_KEY": "2", "AWS_ID": "3"}
    assert unset(["HF_TOKEN", "GONE_*", "GONE"], environ) == ["GONE"]


def test_what_would_be_started_is_shown():
    shown = Ssh(cluster(nodes=1, gpus_per_node=8), Need("/w")).render()
    assert shown.splitlines()[0].startswith("a: ray start --head --port=PORT")
    assert "--num-gpus=8" in shown
    assert "b:" not in shown


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_first_host_that_refuses_is_given_up_before_one_that_is_silent(monkeypatch):
    clock = Clock()
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = Watch(server.getsockname(), clock)
        clock.now_s = 100.0
        assert watch.why_over() is None
    assert watch.why_over() is None
    assert not watch.has_ended  # a firewall may say so for a moment
    clock.now_s += REFUSED_S / 2
    assert watch.why_over() is None
    assert watch.has_ended
    clock.now_s += REFUSED_S
    assert watch.why_over() == "the job on the first host has ended"

    def silence(*_arguments: object, **_settings: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silence)
    assert watch.why_over() is None
    assert not watch.has_ended  # a network may be gone for a while, and Ray still be there
    clock.now_s += LOST_S
    assert watch.why_over() == "the first host does not answer any more"


def test_processes_of_a_job_are_ended_and_no_others():
    job = f"test{os.getpid()}"
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    ours = subprocess.Popen(sleep, env={**os.environ, "FTLAUNCH_JOB": job}, stdout=subprocess.PIPE)
    other = subprocess.Popen(sleep, env={**os.environ, "FTLAUNCH_JOB": f"{job}0"}, stdout=subprocess.PIPE)
    try:
        for process in (ours, other):
            process.stdout.readline()
        assert processes_of(job) == [ours.pid]
        assert end_processes(job) == 1
        assert ours.wait() == -9
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()
