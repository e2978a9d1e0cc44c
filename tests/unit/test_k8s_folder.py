"""What administrators get: samples are what is rendered, rights are those that are asked for, everything is accepted by
the schemas of Kubernetes and KubeRay."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from kube_api import complaints, crd_folder
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from ftlaunch.cluster.kubernetes_checks import PERMISSIONS
from ftlaunch.recipes.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k8s"
SAMPLES = sorted(path for path in (FOLDER / "samples").glob("*.yaml") if ".recipe" not in path.name)


def documents(text: str) -> list[dict[str, Any]]:
    """As kubectl reads them: YAML 1.1."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return list(yaml.load_all(text))


def test_samples_are_what_is_rendered():
    made = runpy.run_path(str(FOLDER / "make_samples.py"))["samples"]()
    assert sorted(made) == SAMPLES
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, "python k8s/make_samples.py"


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_samples_are_accepted(path: Path):
    crd_folder()
    found = documents(path.read_text(encoding="utf-8"))
    assert [each["kind"] for each in found][:2] == ["Secret", "RayJob"]
    for each in found:
        assert complaints(each) == []


def test_what_is_not_accepted_is_seen():
    crd_folder()
    [_, rayjob, *_] = documents(SAMPLES[0].read_text(encoding="utf-8"))
    rayjob["spec"]["backoffLimits"] = 1
    rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["tolerationz"] = []
    rayjob["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] = {}
    said = " ".join(complaints(rayjob))
    for word in ("backoffLimits", "tolerationz", "cpu"):
        assert word in said


def kustomize(folder: str) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl renders kustomizations; it is not here")
    said = subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True, check=True)
    minor = int(re.sub(r"\D", "", json.loads(said.stdout)["clientVersion"]["minor"]))
    if minor < 21:
        pytest.skip(f"kubectl 1.{minor} renders kustomizations as they were in 2019; 1.21 is needed")
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def test_the_base(tmp_path):
    pytest.importorskip("kubernetes_validate")
    found = {each["kind"]: each for each in kustomize("base")}
    assert set(found) == {"Namespace", "Role", "RoleBinding", "ServiceAccount", "NetworkPolicy"}
    for each in found.values():
        assert complaints(each) == []
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == found["Namespace"]["metadata"]["name"]
    granted = {
        (group, resource, verb)
        for rule in found["Role"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {
        (group, f"{resource}/{sub}" if sub else resource, verb)
        for group, resource, sub, verbs in PERMISSIONS
        for verb in verbs
    }
    optional = {
        ("", "persistentvolumeclaims", "get"), ("", "serviceaccounts", "get"), ("", "resourcequotas", "list"),
        ("kueue.x-k8s.io", "localqueues", "get"), ("kueue.x-k8s.io", "workloads", "list"),
    }  # fmt: skip
    assert granted == asked | optional  # neither less nor more


def test_the_overlay_of_the_page(tmp_path):
    """What the page says to write for another namespace."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    overlay = re.search(r"<<END\n(.*?)END\n", text, re.DOTALL).group(1)
    (tmp_path / "k8s").symlink_to(FOLDER)
    (tmp_path / "team-a").mkdir()
    shutil.copytree(FOLDER / "base", tmp_path / "base")
    (tmp_path / "team-a/kustomization.yaml").write_text(overlay.replace("../k8s/base", "../base"))
    found = {each["kind"]: each for each in kustomize(str(tmp_path / "team-a"))}
    assert found["Namespace"]["metadata"]["name"] == "team-a"
    assert {each["metadata"].get("namespace", "team-a") for each in found.values()} == {"team-a"}
    assert found["RoleBinding"]["subjects"][0]["name"] == "team-a-researchers"


def test_the_queues():
    """Kueue's schemas are not at hand: checked is that its objects refer to each other, and the samples to them."""
    found = {each["kind"]: each for each in kustomize("queues")}
    assert set(found) == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    assert found["LocalQueue"]["spec"]["clusterQueue"] == found["ClusterQueue"]["metadata"]["name"]
    [group] = found["ClusterQueue"]["spec"]["resourceGroups"]
    assert [flavor["name"] for flavor in group["flavors"]] == [found["ResourceFlavor"]["metadata"]["name"]]
    assert {each["name"] for each in group["flavors"][0]["resources"]} == set(group["coveredResources"])
    queued = load_recipe(FOLDER / "samples/queued.recipe.yaml", environ={}).recipe.cluster
    assert (queued.queue, queued.namespace) == (
        found["LocalQueue"]["metadata"]["name"], found["LocalQueue"]["metadata"]["namespace"],
    )  # fmt: skip


def test_versions_of_the_image_are_what_ftlaunch_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(
        line.split("==") for line in (FOLDER / "constraints.txt").read_text().splitlines() if "==" in line
    )  # fmt: skip
    needed = [Requirement(each) for each in project["dependencies"]]
    assert {each.name for each in needed} - set(pinned) == set()
    extras = [
        Requirement(each) for name in ("hub", "wandb", "quantized") for each in project["optional-dependencies"][name]
    ]
    for need in [*needed, *extras]:
        assert need.specifier.contains(pinned[need.name]), need


def test_the_image_is_no_root():
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) == 2
    assert re.search(r"^USER 1000:1000$", text.split("FROM ")[-1], re.MULTILINE)
    assert not re.search(r":latest\b", text)
    for named in re.findall(r"^COPY (?:--from=\S+ )?(k8s/\S+)", text, re.MULTILINE):
        assert (ROOT / named).is_file()
