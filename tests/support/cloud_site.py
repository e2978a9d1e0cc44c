"""A cloud on this machine: moto's EC2, and for each of its machines a host of its own with a real sshd, which does
what the machine's user data say, as cloud-init and systemd would.

A host that powers itself off is stopped or terminated as its machine was made to be; one whose machine is terminated
loses its power.
"""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servers import ec2_process
from ssh_hosts import Hosts, ssh_hosts

HOME, AWAY = "us-east-1", "us-west-2"
POLL_S = 0.1

SYSTEMCTL = """#!/bin/sh
# What cloud-init and a watchdog ask of systemd.
case "$1" in
  daemon-reload) ;;
  enable) $(sed -n 's/^ExecStart=//p' "/etc/systemd/system/$3") </dev/null >"{folder}/log-$(hostname)" 2>&1 & ;;
  poweroff) : >"{folder}/off-$(hostname)" ;;
  *) exit 1 ;;
esac
"""

# What is private to a machine's disk, and on its way to sshd what its user data say.
MACHINE = """
mount -t tmpfs none /opt
mount -t tmpfs none /run
mkdir -p /run/sshd /etc/systemd
mount -t tmpfs none /etc/systemd
mkdir -p /etc/systemd/system
export PATH={folder}/bin:$PATH
{cloud_init}
"""


@dataclass
class CloudSite:
    """`environ`: what a client of this EC2 has to have set. `subnets`: by region."""

    folder: Path
    port: int
    hosts: Hosts
    subnets: dict[str, str] = field(default_factory=dict)
    _clients: dict[str, Any] = field(default_factory=dict)
    image: str = ""
    boots: bool = True
    """Whether machines have power; without, they are only listed."""
    _over: threading.Event = field(default_factory=threading.Event)
    failed: list[BaseException] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_DEFAULT_REGION": HOME,
        }

    def client(self, region: str = HOME) -> Any:
        """One for all threads: making one takes long, and boto3 must not be asked for two at the same time."""
        return self._clients[region]

    def _make_client(self, region: str) -> Any:
        import boto3

        return boto3.client(
            "ec2", region, endpoint_url=self.environ["AWS_ENDPOINT_URL"], aws_access_key_id="testing",
            aws_secret_access_key="testing-secret",
        )  # fmt: skip

    def cluster(self, **changes: object) -> dict[str, object]:
        """The `cluster` section of a recipe that runs here."""
        return {
            "type": "cloud", "provider": "aws", "instance_type": "m5.large", "regions": [HOME], "image": self.image,
            "user": "root", "identity_file": str(self.hosts.folder / "client"), "private_addresses": True,
            "gpus_per_node": 0, "machine": {"SubnetIds": [self.subnets[HOME]]}, **changes,
        }  # fmt: skip

    def machines(self, *states: str) -> list[dict[str, Any]]:
        """All in these states (pending or running), in any region."""
        found = []
        for region in (HOME, AWAY):
            filters = [{"Name": "instance-state-name", "Values": list(states or ("pending", "running", "stopped"))}]
            for page in self.client(region).describe_instances(Filters=filters)["Reservations"]:
                found += [{**each, "Region": region} for each in page["Instances"]]
        return found

    def full(self, *refusals: str, room: int = 1 << 30) -> None:
        """Regions refuse machines from now on: REGION CODE MESSAGE; or give at most so many at once."""
        (self.folder / "full").write_text("\n".join(refusals))
        (self.folder / "room").write_text(str(room))

    def asked(self) -> list[str]:
        """REGION ACTION of all that was asked to be done."""
        return (self.folder / "asked").read_text().splitlines()

    def prepare(self) -> None:
        """A network whose addresses are those of the hosts."""
        (self.folder / "bin").mkdir()
        systemctl = self.folder / "bin" / "systemctl"
        systemctl.write_text(SYSTEMCTL.format(folder=self.folder))
        systemctl.chmod(0o755)
        for region in (HOME, AWAY):
            client = self._clients[region] = self._make_client(region)
            cidr = f"{self.hosts.subnet}.0/24"
            vpc = client.create_vpc(CidrBlock=cidr)["Vpc"]["VpcId"]
            subnet = client.create_subnet(VpcId=vpc, CidrBlock=cidr, AvailabilityZone=f"{region}a")
            self.subnets[region] = subnet["Subnet"]["SubnetId"]
        self.image = self.client().describe_images(Owners=["amazon"])["Images"][0]["ImageId"]

    def run(self) -> None:
        """Give machines power, and take it from those that are over, until `stop`."""
        try:
            while not self._over.wait(POLL_S):
                running = {each["InstanceId"]: each for each in self.machines("pending", "running")}
                for key, machine in running.items() if self.boots else ():
                    if key not in self.hosts.members:
                        self._start(key, machine)
                self._powered_off(running)
                for key, host in self.hosts.members.items():
                    if key not in running and host.process.poll() is None:
                        host.kill()
        except BaseException as error:
            self.failed.append(error)
            raise

    def _start(self, key: str, machine: dict[str, Any]) -> None:
        said = self.client(machine["Region"]).describe_instance_attribute(InstanceId=key, Attribute="userData")
        values = cloud_config(said["UserData"]["Value"])
        authorized = self.folder / f"authorized-{key}"
        authorized.write_text("\n".join(values["ssh_authorized_keys"]) + "\n")
        authorized.chmod(0o600)
        extra = MACHINE.format(folder=self.folder, cloud_init="\n".join(self._cloud_init(key, values)))
        self.hosts.add(key, extra, machine["PrivateIpAddress"], authorized)

    def _cloud_init(self, key: str, values: dict[str, Any]) -> Iterator[str]:
        for number, file in enumerate(values["write_files"]):
            made = self.folder / f"{key}-{number}"
            made.write_text(file["content"])
            yield shlex.join(["install", "-D", "-m", file["permissions"], str(made), file["path"]])
        yield from map(shlex.join, values["runcmd"])

    def _powered_off(self, running: dict[str, dict[str, Any]]) -> None:
        for off in self.folder.glob("off-*"):
            key = off.name.removeprefix("off-")
            off.unlink()
            if key not in running:
                continue
            client = self.client(running[key]["Region"])
            name = "instanceInitiatedShutdownBehavior"
            said = client.describe_instance_attribute(InstanceId=key, Attribute=name)
            self.hosts.members[key].kill()
            ends = said["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
            (client.terminate_instances if ends else client.stop_instances)(InstanceIds=[key])

    def stop(self) -> None:
        """No more power."""
        self._over.set()


def cloud_config(user_data: str) -> dict[str, Any]:
    """User data as EC2 gives them back."""
    import base64

    first, _, rest = base64.b64decode(user_data).decode().partition("\n")
    assert first == "#cloud-config"
    return dict(json.loads(rest))


@contextmanager
def cloud_site(folder: Path) -> Iterator[CloudSite]:
    """With an EC2 that is its own. Skips where hosts cannot be made."""
    with ssh_hosts() as hosts, ec2_process(folder) as port:
        site = CloudSite(folder, port, hosts)
        site.prepare()
        power = threading.Thread(target=site.run, name="power", daemon=True)
        power.start()
        try:
            yield site
        finally:
            site.stop()
            power.join(60)
        for failure in site.failed:
            raise AssertionError("machines have lost their power") from failure


def wait_until(happened: Any, what: Any, wait_s: float = 60.0) -> None:
    """Raises with `what()` where it does not."""
    deadline = time.monotonic() + wait_s
    while not happened():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
