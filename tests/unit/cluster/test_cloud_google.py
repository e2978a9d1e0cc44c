"""What is asked of Google Compute Engine, through its own client and Ray's node provider, whose requests end here."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from ftlaunch.cluster.base import Need
from ftlaunch.cluster.cloud import Cloud
from ftlaunch.cluster.cloud_config import launcher_config
from ftlaunch.cluster.cloud_machines import Machines, NoRoom
from ftlaunch.cluster.clouds.base import Boot
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema_cloud import CloudCluster

pytest.importorskip("googleapiclient", reason="Google's client is not installed: ftlaunch[gcp]")

FAMILY = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
LABEL = re.compile(r"\(labels\.([\w-]+) = ([\w-]+)\)")


class Compute:
    """Instances of a project, as the REST reference has them. `room`: machines that a zone gives."""

    def __init__(self, room: int) -> None:
        self.room, self.instances, self.asked = room, {}, []
        self.refused: set[str] = set()

    def request(self, uri: str, method: str = "GET", body: Any = None, **_options: Any) -> tuple[Any, bytes]:
        import httplib2

        parts = urlsplit(uri)
        if "token" in parts.path:
            return httplib2.Response({"status": 200}), b'{"access_token": "t", "expires_in": 3600}'
        self.asked.append((method, parts.path))
        status, answer = self._answer(method, parts, json.loads(body) if body else {})
        return httplib2.Response({"status": status}), json.dumps(answer).encode()

    def _answer(self, method: str, parts: Any, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        *_, kind, name = parts.path.split("/")
        if kind == "operations":
            return 200, {"name": name, "status": "DONE", **self._outcome(name)}
        if name == "instances" and method == "POST":
            self.instances[body["name"]] = {**body, "status": "RUNNING", "labelFingerprint": "f"}
            self.instances[body["name"]]["networkInterfaces"][0]["networkIP"] = f"10.0.0.{len(self.instances)}"
            if len(self.instances) > self.room:
                self.refused.add(body["name"])
                del self.instances[body["name"]]
            return 200, {"name": f"op-{body['name']}"}
        if name == "instances":
            wanted = dict(LABEL.findall(parse_qs(parts.query)["filter"][0]))
            return 200, {
                "items": [each for each in self.instances.values() if wanted.items() <= each["labels"].items()]
            }
        if method == "DELETE":
            del self.instances[name]
            return 200, {"name": "op"}
        if name == "setLabels":
            self.instances[kind]["labels"] = body["labels"]
            return 200, {"name": "op"}
        if kind == "machineTypes" and name == "x9-huge":
            return 404, {"error": {"message": "The resource 'x9-huge' was not found", "code": 404}}
        return 200, {"name": name}

    def _outcome(self, name: str) -> dict[str, Any]:
        if name.removeprefix("op-") not in self.refused:
            return {}
        return {"error": {"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED", "message": "try a different zone"}]}}


@pytest.fixture
def compute(monkeypatch, tmp_path) -> Compute:
    import httplib2
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {
        "type": "service_account", "project_id": "acme", "private_key": pem, "client_email": "a@acme",
        "token_uri": "https://oauth2.invalid/token",
    }  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    made = Compute(room=3)
    monkeypatch.setattr(
        httplib2.Http, "request", lambda _self, uri, method="GET", body=None, **more: made.request(uri, method, body)
    )
    monkeypatch.setattr("google.auth.transport.requests.Request.__call__", _token)
    return made


def _token(_self: Any, *_arguments: Any, **_more: Any) -> Any:
    class Answer:
        status, headers, data = 200, {}, b'{"access_token": "t", "expires_in": 3600}'

    return Answer


def section(**changes: object) -> CloudCluster:
    values = {
        "type": "cloud", "provider": "gcp", "regions": ["us-central1-a"], "instance_type": "a2-highgpu-1g",
        "project": "acme", "image": FAMILY, "private_addresses": True, **changes,
    }  # fmt: skip
    return CloudCluster.model_validate_json(json.dumps(values))


def machines(config: CloudCluster) -> tuple[Machines, dict[str, Any]]:
    values = launcher_config(config, "us-central1-a", Boot("ssh-rsa AAAA", watched=True), "k", "k.pub")
    return Machines(config, "us-central1-a", "12345678"), values


def test_machines_are_made_found_marked_and_deleted(compute):
    made, values = machines(section(nodes=2, tags={"team": "nlp"}, identity="sa@acme.iam.gserviceaccount.com"))
    made.make("Some Run", 2, 2, values)
    assert sorted(each.address for each in made.running(2)) == ["10.0.0.1", "10.0.0.2"]
    for instance in compute.instances.values():
        labels = instance["labels"]
        assert labels["ray-cluster-name"] == "ftlaunch"
        assert (labels["ftlaunch-run"], labels["team"], labels["ftlaunch-state"]) == ("some-run", "nlp", "starting")
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", instance["name"])
        assert len(instance["name"]) <= 63
        assert instance["machineType"] == "zones/us-central1-a/machineTypes/a2-highgpu-1g"
        keys = {item["key"]: item["value"] for item in instance["metadata"]["items"]}
        assert keys["ssh-keys"] == "ubuntu:ssh-rsa AAAA"
        assert keys["startup-script"].startswith("#!/usr/bin/env python3\n")
        assert instance["serviceAccounts"][0]["email"] == "sa@acme.iam.gserviceaccount.com"
    made.under_way()
    assert {each["labels"]["ftlaunch-state"] for each in compute.instances.values()} == {"running"}
    assert not [path for _, path in compute.asked if "serviceAccounts" in path or "setCommonInstanceMetadata" in path]
    made.end()
    assert compute.instances == {}


def test_a_zone_without_room(compute):
    made, values = machines(section(nodes=5))
    with pytest.raises(NoRoom, match="ZONE_RESOURCE_POOL_EXHAUSTED"):
        made.make("run", 5, 5, values)
    assert len(compute.instances) == 3
    made.end()
    assert compute.instances == {}
    made, values = machines(section(nodes={"min": 2, "max": 5}))
    made.make("run", 5, 2, values)  # enough
    assert len(made.running(2)) == 3


def test_what_compute_engine_does_not_have(compute):
    assert Cloud(section(), Need("/")).problems() == []
    [said] = Cloud(section(instance_type="x9-huge"), Need("/")).problems()
    assert said.startswith("cluster.instance_type: there is no x9-huge in us-central1-a")


def test_no_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("PATH", "/usr/bin")
    [said] = Cloud(section(), Need("/")).problems()
    assert "GCP: there are no credentials" in said


def test_a_mistake_is_no_lack_of_room(compute, monkeypatch):
    monkeypatch.setattr(
        compute, "_answer", lambda *_: (403, {"error": {"message": "Required permission", "code": 403}})
    )
    made, values = machines(section())
    with pytest.raises(UserError, match="Required permission"):
        made.make("run", 1, 1, values)
