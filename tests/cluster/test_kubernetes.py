"""What a Kubernetes cluster answers, and what we make of it: mistakes and lacks with a remedy, queues, watches and logs
that break off, jobs that are started again. The server is on loopback; no pod runs."""

from __future__ import annotations

import base64
import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kube_api
import pytest
from kube_api import Kube, Object, Refused, Served, complaints, kubeconfig_for
from kube_api import kube_api as kube_server
from tiny import recipe_for, write_recipe

from ftlaunch.cluster import kubernetes_follow
from ftlaunch.cluster.base import Driver, Need
from ftlaunch.cluster.kubernetes import Kubernetes
from ftlaunch.cluster.pod_agent import exit_mark, unfit_mark
from ftlaunch.launcher import cli
from ftlaunch.recipes.errors import FtlaunchError, InfrastructureError, UserError
from ftlaunch.recipes.schema_kubernetes import KubernetesCluster

REMOTE = Need(folder="/", name="Tickets 2026", environ={"HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "1"})
DRIVER = Driver("json:loads", lambda demand: {"ranks": demand.ranks})


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with kube_server(tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in minutes on a real cluster."""
    for name, value in (("HOPELESS_S", 0.5), ("EVENTS_S", 0.1), ("TICK_S", 0.05), ("AGAIN_S", 0.1)):
        monkeypatch.setattr(kubernetes_follow, name, value)
    monkeypatch.setattr("ftlaunch.cluster.kubernetes.POLL_S", 0.05)


def made(served: Served, need: Need = REMOTE, **changes: object) -> Kubernetes:
    return Kubernetes(KubernetesCluster.model_validate(served.cluster(**changes)), need)


def problems(served: Served, need: Need = REMOTE, **changes: object) -> str:
    cluster = made(served, need, **changes)
    try:
        return "\n".join(cluster.problems())
    finally:
        cluster.down()


def code_in(folder: Path) -> Callable[[], Path]:
    package = folder / "ftlaunch"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    return lambda: package


# --- before anything starts -------------------------------------------------------------------------------------------


def test_nothing_is_wrong(served):
    assert problems(served, nodes=3, gpus_per_node=8, start_deadline_seconds=600) == ""
    assert {method for method, _ in served.kube.requests} == {"GET", "POST"}
    assert served.kube.all("rayjobs") == []  # the dry run has left nothing


def test_paths_of_this_machine(served):
    need = Need(
        folder="/", shared="/work/runs", paths={"model.path": "/data/model", "data.train.0.path": "/database/a.jsonl"},
        patterns={"data.train.1.path": "/data/*.parquet"},
    )  # fmt: skip
    said = problems(served, need, env=[])
    assert said.count("the pods do not see it") == 4
    assert "checkpoint.path: /work/runs is a folder of this machine" in said
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}}
    served.kube.create("persistentvolumeclaims", claim, validate=False)
    said = problems(served, need, env=[], volumes=[{"claim": "data", "path": "/data"}])
    assert "/work/runs" in said
    assert "data.train.0.path: /database/a.jsonl is a file of this machine" in said  # no part of /data
    assert "model.path" not in said
    assert "data.train.1" not in said
    said = problems(
        served, Need("/", shared="/data/runs"), env=[], volumes=[{"claim": "data", "path": "/data", "read_only": True}]
    )
    assert said == "checkpoint.path: /data/runs is on a volume that is mounted read-only"


def test_what_is_named_and_not_there(served):
    said = problems(
        served, env=["NOT_SET_ANYWHERE", "NOTHING_LIKE_THIS_*"], service_account="trainer", priority_class="urgent",
        volumes=[{"claim": "data", "path": "/data"}],
    )  # fmt: skip
    assert "cluster.env: NOT_SET_ANYWHERE is not set here" in said
    assert "cluster.service_account: trainer is not there; `kubectl get serviceaccounts` lists" in said
    assert "cluster.priority_class: urgent is not there; `kubectl get priorityclasses` lists" in said
    assert "cluster.volumes.0.claim: data is not there; `kubectl get persistentvolumeclaims` lists" in said
    assert "NOTHING_LIKE_THIS" not in said
    assert "cluster.namespace: nowhere is not there" in problems(served, namespace="nowhere")


def test_kubeconfigs(served, tmp_path):
    with pytest.raises(UserError, match=r"^cluster.context: other is not in the kubeconfig, which has test$"):
        problems(served, context="other")
    with pytest.raises(UserError, match=r"^cluster.kubeconfig: .*kubectl config get-contexts"):
        problems(served, kubeconfig=str(tmp_path / "none"))
    stranger = tmp_path / "stranger"
    stranger.write_text(json.dumps(kubeconfig_for(served.port, "train", token="wrong")))
    with pytest.raises(UserError, match=r"context test does not accept our login \(Unauthorized\). Log in again"):
        problems(served, kubeconfig=str(stranger))


def test_a_server_that_is_down_is_no_mistake_of_the_users(tmp_path, capsys):
    (tmp_path / "model").mkdir()  # only its name is looked at
    config = tmp_path / "kubeconfig"
    config.write_text(json.dumps(kubeconfig_for(9, "train")))  # discard: nobody listens
    section = {"type": "kubernetes", "image": "a", "gpus_per_node": 0, "kubeconfig": str(config),
               "volumes": [{"claim": "a", "path": str(tmp_path)}]}  # fmt: skip
    assert cli.main([str(write_recipe(tmp_path / "tiny.yaml", recipe_for(tmp_path, cluster=section)))]) == 2
    assert "the Kubernetes API server at http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_without_kuberay(served, tmp_path, capsys):
    served.kube.groups.remove("ray.io")
    (tmp_path / "model").mkdir()
    section = served.cluster(env=[], volumes=[{"claim": "a", "path": str(tmp_path)}])
    assert cli.main([str(write_recipe(tmp_path / "tiny.yaml", recipe_for(tmp_path, cluster=section)))]) == 1
    said = capsys.readouterr().err
    assert "the cluster of context test has no KubeRay, which runs the job: helm install kuberay-operator" in said


def test_rights_that_we_lack_are_named_together(served):
    served.kube.denied |= {("create", "rayjobs"), ("delete", "rayjobs"), ("get", "pods/log"), ("create", "secrets")}
    said = problems(served)
    assert said == (
        "cluster.namespace: we may not do this in train: create, delete rayjobs; create secrets; get pods/log. "
        "An administrator grants it: k8s/README.md, `ftlaunch-submitter`."
    )


def test_queues(served):
    assert "cluster.queue: the cluster of context test has no Kueue" in problems(served, queue="gpus")
    served.kube.groups.add("kueue.x-k8s.io")
    assert "cluster.queue: gpus is not there; `kubectl get localqueues -n train`" in problems(served, queue="gpus")
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "gpus"}}
    served.kube.create("localqueues", queue, validate=False)
    assert problems(served, queue="gpus") == ""


def test_more_than_the_quota_ever_allows(served):
    hard = {"requests.nvidia.com/gpu": "16", "requests.cpu": "10500m", "memory": "100Gi", "pods": "50"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": {"hard": hard}}
    served.kube.create("resourcequotas", quota)
    assert problems(served, nodes=2, gpus_per_node=8, cpus_per_node=5, memory="50Gi") == ""
    said = problems(served, nodes=3, gpus_per_node=8, cpus_per_node=5, memory="50Gi")
    assert "train may have 16 requests.nvidia.com/gpu in all (quota team), the job needs 24. Ask for fewer" in said
    assert "train may have 10500m requests.cpu in all (quota team), the job needs 15.5" in said
    assert "100Gi memory" in said
    assert "pods" not in said


def test_a_kuberay_that_is_too_old_drops_nothing_in_silence(served, monkeypatch):
    older = copy.deepcopy(kube_api.crd_schema("rayjobs"))
    del older["properties"]["spec"]["properties"]["preRunningDeadlineSeconds"]
    monkeypatch.setattr(kube_api, "validator", lambda _plural: kube_api.validator_of(older))
    assert problems(served) == ""
    said = problems(served, start_deadline_seconds=600)
    assert "strict decoding error" in said
    assert "unknown field preRunningDeadlineSeconds" in said
    assert "KubeRay is too old for it: 1.6 or newer is needed" in said


def test_a_rule_of_the_cluster_forbids_it(served):
    def forbid(resource: str, body: Object) -> None:
        if resource == "rayjobs":
            raise Refused(403, "Forbidden", 'admission webhook "policy" denied the request: label team is missing')

    served.kube.hook = forbid
    assert "label team is missing. An administrator grants it" in problems(served)


# --- starting ---------------------------------------------------------------------------------------------------------


def submitted(served: Served, tmp_path: Path, need: Need = REMOTE, **changes: object) -> tuple[Kubernetes, Object]:
    cluster = made(served, need, **changes)
    assert cluster.problems() == []
    record = cluster.up(DRIVER, code_in(tmp_path))
    return cluster, dict(record)


def test_what_is_made(served, tmp_path):
    """Everything is the RayJob's, nothing starts before it is whole, and secrets are in the Secret only."""
    cluster, record = submitted(served, tmp_path, env=["HF_TOKEN"], nodes=2)
    [rayjob] = served.kube.all("rayjobs")
    assert record["driver"] == f"train/{rayjob['metadata']['name']}"
    assert rayjob["metadata"]["name"] == f"ft-tickets-2026-{record['job']}"
    assert rayjob["spec"]["suspend"] is False
    made_by_us = [
        change for change in served.kube.changes if change[2] in ("rayjobs", "secrets", "poddisruptionbudgets")
    ]
    assert [(kind, resource) for _, kind, resource, _ in made_by_us] == [
        ("ADDED", "rayjobs"), ("ADDED", "secrets"), ("ADDED", "poddisruptionbudgets"), ("MODIFIED", "rayjobs"),
    ]  # fmt: skip
    assert made_by_us[0][3]["spec"]["suspend"] is True
    for resource in ("secrets", "poddisruptionbudgets"):
        [owned] = served.kube.all(resource)
        assert owned["metadata"]["ownerReferences"][0]["uid"] == rayjob["metadata"]["uid"]
    [secret] = served.kube.all("secrets")
    content = {key: base64.b64decode(value) for key, value in secret["data"].items()}
    assert content["env.HF_TOKEN"] == b"hf_secret"
    assert json.loads(content["driver.json"]) == {"ranks": 2, "record": record}
    assert content["auth_token"] not in json.dumps(rayjob).encode()
    assert "hf_secret" not in json.dumps([rayjob, record])
    cluster.stop("save")
    assert [key for key in served.kube.objects if key[0] != "namespaces"] == []
    cluster.down()


def test_a_job_that_is_refused_half_way_leaves_nothing(served, tmp_path):
    """A right that was there when we asked, a rule that looks at real requests only."""
    cluster = made(served, env=["HF_TOKEN"])
    assert cluster.problems() == []
    served.kube.denied.add(("create", "secrets"))
    with pytest.raises(UserError, match=r'secrets is forbidden: User "ann" cannot create resource "secrets"'):
        cluster.up(DRIVER, code_in(tmp_path))
    assert served.kube.all("rayjobs") == []


def test_quota_for_objects(served, tmp_path):
    cluster = made(served)
    assert cluster.problems() == []

    def full(resource: str, _body: Object) -> None:
        if resource == "rayjobs":
            raise Refused(
                403,
                "Forbidden",
                'rayjobs.ray.io "a" is forbidden: exceeded quota: team, requested: count/rayjobs.ray.io=1',
            )

    served.kube.hook = full
    with pytest.raises(UserError, match=r"exceeded quota: team.*Ask for fewer"):
        cluster.up(DRIVER, code_in(tmp_path))


def test_a_name_that_is_taken(served, tmp_path, monkeypatch):
    monkeypatch.setattr("ftlaunch.cluster.kubernetes.secrets.token_hex", lambda _count: "0badcafe")
    first, _record = submitted(served, tmp_path)
    second = made(served)
    assert any("already exists" in each for each in second.problems())
    second.down()
    assert len(served.kube.all("rayjobs")) == 1  # the first one's
    first.stop("now")


def test_too_much_for_a_secret(served, tmp_path):
    need = Need(folder="/", environ={"BIG": "x" * 1_100_000})
    cluster = made(served, need, env=["BIG"])
    assert cluster.problems() == []
    with pytest.raises(
        UserError, match=r"come to 1\.1\d MB; a Secret holds 1\.05 MB\. Take large values out of cluster.env"
    ):
        cluster.up(DRIVER, code_in(tmp_path))
    assert served.kube.all("rayjobs") == []


def test_a_launcher_that_stops_while_it_starts(served, tmp_path, monkeypatch):
    cluster = made(served)
    assert cluster.problems() == []

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ftlaunch.cluster.kubernetes_job.Job.secret", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cluster.up(DRIVER, code_in(tmp_path))
    [rayjob] = served.kube.all("rayjobs")
    assert rayjob["spec"]["suspend"] is True  # all that a SIGKILL here would leave
    cluster.down()
    assert served.kube.all("rayjobs") == []


# --- following --------------------------------------------------------------------------------------------------------


class Following:
    """A job that is followed in a thread, while a test plays the cluster."""

    def __init__(self, served: Served, folder: Path, **changes: object) -> None:
        self.kube: Kube = served.kube
        self.folder = folder
        self.cluster, self.record = submitted(served, folder, **changes)
        self.job, self.name = self.record["job"], self.record["driver"].split("/")[1]
        self.text, self.code, self.error = "", None, None
        self.kube.update(
            "rayjobs", self.name, {"status": {"jobDeploymentStatus": "Initializing", "rayClusterName": "c"}}
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            self.code = self.cluster.follow(self._write)
        except FtlaunchError as error:
            self.error = error

    def _write(self, data: bytes) -> None:
        self.text += data.decode()

    def says(self, words: str) -> None:
        deadline = time.monotonic() + 20
        while words not in self.text:
            assert self._thread.is_alive() or words in self.text, (self.error, self.text)
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def ends(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), self.text
        self.cluster.down()

    def pod(self, name: str = "head", role: str = "ray-head", **status: object) -> None:
        body = {
            "metadata": {"name": name, "labels": {"ftlaunch/job": self.job, "ray.io/node-type": role.split("-")[1]}},
            "spec": {"containers": [{"name": role}]}, "status": status,
        }  # fmt: skip
        self.kube.create("pods", body, validate=False)

    def state(self, name: str = "head", **state: Object) -> None:
        status = {"conditions": None, "containerStatuses": [{"name": "ray", "image": "i:1", "state": state}]}
        self.kube.update("pods", name, {"status": status})

    def log(self, name: str = "head") -> Path:
        file = self.folder / f"{name}.log"
        file.touch()
        self.kube.logs[name] = file
        return file

    def print(self, text: str, name: str = "head") -> None:
        with self.log(name).open("a") as log:
            log.write(text)

    def end(self, code: int, name: str = "head") -> None:
        self.print(f"\n{exit_mark(self.job)}{code}\n", name)

    def status(self, deployment: str, **more: object) -> None:
        self.kube.update("rayjobs", self.name, {"status": {"jobDeploymentStatus": deployment, **more}})


NO_ROOM = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
           "message": "0/5 nodes are available: 5 Insufficient nvidia.com/gpu."}  # fmt: skip


def test_a_job_from_its_queue_to_its_end(served, tmp_path):
    """Room is waited for, quota too; the log goes on where it broke off, whatever the server forgets."""
    job = Following(served, tmp_path, nodes=2)
    job.says("waiting: 0 of 2 pods run")
    job.pod(conditions=[NO_ROOM])
    job.says("waiting: a pod finds no node: 0/5 nodes are available: 5 Insufficient nvidia.com/gpu. Ask for fewer")
    quota = "exceeded quota: team, requested: requests.nvidia.com/gpu=8, used: 8, limited: 8"
    message = f'Failed to create worker Pod for the cluster train/c, pods "c-workers" is forbidden: {quota}'
    job.kube.event("c", "FailedToCreateWorkerPod", message)
    job.says(f"waiting: a pod is refused: {quota}. The namespace's quota is used up")
    assert job.cluster.standing().startswith("waits: a pod is refused: exceeded quota: team")
    job.kube.compact()  # watches are answered 410
    job.log()
    job.state(running={})
    job.pod("worker", "ray-worker", containerStatuses=[{"name": "ray", "image": "i:1", "state": {"running": {}}}])
    job.print("step 1\nstep 2 loss 3")
    job.says("step 2 loss 3")
    assert job.cluster.standing() == "has its pods: 2 of 2 pods run"
    job.state(terminated={"exitCode": 0})  # the server ends the stream, as it may at any time
    time.sleep(0.2)
    job.state(running={})
    job.print("\nstep 3\n")
    job.says("step 3\n")
    job.end(0)
    job.ends()
    assert (job.code, job.error) == (0, None)
    assert re.sub(r"waiting: .*\n", "", job.text) == "step 1\nstep 2 loss 3\nstep 3\n\n"
    listed = [path for _, path in served.kube.requests if "/pods?" in path and "watch=1" not in path]
    assert len(listed) >= 2  # after a 410


def test_an_image_that_cannot_be_pulled(served, tmp_path):
    job = Following(served, tmp_path)
    job.pod()
    pull = "rpc error: code = NotFound desc = failed to pull and unpack image: manifest unknown: not found"
    job.state(waiting={"reason": "ErrImagePull", "message": pull})
    job.says("image i:1 cannot be pulled")
    job.state(
        waiting={"reason": "ImagePullBackOff", "message": 'Back-off pulling image "i:1"'}
    )  # as older kubelets say
    job.ends()
    assert isinstance(job.error, UserError)
    assert f"job {job.job} cannot start: image i:1 cannot be pulled. Mend cluster.image: there is no such" in str(
        job.error
    )
    assert [key for key in served.kube.objects if key[0] in ("rayjobs", "pods", "secrets")] == []


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"reason": "ErrImagePull", "message": "401 Unauthorized"}, "name its Secret in cluster.image_pull_secrets"),
        ({"reason": "InvalidImageName", "message": "couldn't parse image"}, "Mend cluster.image"),
        (
            {"reason": "CreateContainerConfigError", "message": 'secret "wandb" not found'},
            'secret "wandb" not found. Make what is missing in the namespace',
        ),
    ],
)
def test_containers_that_cannot_start(served, tmp_path, state, says):
    job = Following(served, tmp_path)
    job.pod()
    job.state(waiting=state)
    job.ends()
    assert isinstance(job.error, UserError)
    assert says in str(job.error)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ('pods "c-head" is forbidden: no PriorityClass with name urgent was found', "Mend cluster.priority_class"),
        ('pods "c-head" is forbidden: error looking up service account train/x: serviceaccount "x" not found',
         "Mend cluster.service_account"),
        ('pods "c-head" is forbidden: violates PodSecurity "restricted:latest": hostPath', "k8s/README.md"),
        ('pods "c-head" is forbidden: failed quota: team: must specify memory for: ray-head', "set cluster.memory"),
    ],
)  # fmt: skip
def test_pods_that_are_refused(served, tmp_path, message, says):
    job = Following(served, tmp_path)
    job.kube.event("c", "FailedToCreateHeadPod", f"Failed to create head Pod train/c-head, {message}")
    job.ends()
    assert isinstance(job.error, UserError)
    assert says in str(job.error)


def test_a_namespace_that_no_operator_looks_at(served, tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes_follow, "OPERATOR_S", 0.3)
    job = Following(served, tmp_path)
    job.kube.update("rayjobs", job.name, {"status": None})
    job.ends()
    assert isinstance(job.error, UserError)
    assert "no KubeRay operator takes the job up in train" in str(job.error)
    assert served.kube.all("rayjobs") == []


def test_kueue(served, tmp_path):
    """The job gets its label when it is whole, and is Kueue's to release."""
    served.kube.groups.add("kueue.x-k8s.io")
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "gpus"}}
    served.kube.create("localqueues", queue, validate=False)
    job = Following(served, tmp_path, queue="gpus")
    rayjob = served.kube.get("rayjobs", job.name)
    assert rayjob["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert rayjob["spec"]["suspend"] is True
    first = next(change[3] for change in served.kube.changes if change[2] == "rayjobs")
    assert "kueue.x-k8s.io/queue-name" not in first["metadata"]["labels"]
    no_quota = "couldn't assign flavors to pod set head: insufficient unused quota for nvidia.com/gpu, 8 more needed"
    workload = {
        "metadata": {"name": "w", "labels": {"kueue.x-k8s.io/job-uid": rayjob["metadata"]["uid"]}},
        "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": no_quota}]},
    }  # fmt: skip
    served.kube.create("workloads", workload, validate=False)
    job.says(f"waiting: it waits in queue gpus: {no_quota}")
    job.kube.update("rayjobs", job.name, {"spec": {"suspend": False}})
    job.pod()
    job.log()
    job.state(running={})
    job.print("step 1\n")
    job.says("step 1")
    job.end(130)  # preempted: saved, and back into the queue
    job.kube.update("rayjobs", job.name, {"spec": {"suspend": True}})
    job.says("the driver has ended with exit code 130; the job is started again")
    job.kube.delete("pods", "head")
    job.kube.update("rayjobs", job.name, {"spec": {"suspend": False}})
    job.pod("second")
    job.log("second")
    job.state("second", running={})
    job.print("step 2\n", "second")
    job.end(0, "second")
    job.ends()
    assert (job.code, job.error) == (0, None)
    assert job.text.endswith("step 2\n\n")


def test_kuberay_starts_the_job_again(served, tmp_path):
    job = Following(served, tmp_path, backoff_limit=1)
    job.pod()
    job.log()
    job.state(running={})
    job.print("step 1\n")
    job.end(2)
    job.says("the driver has ended with exit code 2; the job is started again")
    job.status("Retrying")
    job.kube.delete("pods", "head")
    time.sleep(1.1)  # the next one is younger, in the server's seconds
    job.pod("second")
    job.log("second")
    job.state("second", running={})
    job.end(2, "second")
    job.status("Failed", reason="AppFailed")
    job.ends()
    assert (job.code, job.error) == (2, None)


def test_what_a_former_heads_log_says_late_is_not_about_the_new_one(served, tmp_path, monkeypatch):
    """Servers hand logs on when they have time: the end of the first driver may come after the second's beginning."""
    late, read = threading.Event(), kubernetes_follow.PodLog.read

    def read_late(log, api, put, **more):
        def passed_on(data):
            if log.pod == "head" and data is not None and exit_mark(job.job).encode() in data:
                late.wait(20)
            put(data)

        read(log, api, passed_on, **more)

    monkeypatch.setattr(kubernetes_follow.PodLog, "read", read_late)
    job = Following(served, tmp_path, backoff_limit=1)
    job.pod()
    job.log()
    job.state(running={})
    job.print("step 1\n")
    job.says("step 1\n")
    job.end(2)
    job.kube.delete("pods", "head")
    job.pod("second")
    job.log("second")
    job.state("second", running={})
    job.print("step 2\n", "second")
    job.says("step 2\n")
    late.set()
    job.end(0, "second")
    job.ends()
    assert (job.code, job.error) == (0, None)
    assert "step 1\nstep 2\n" in job.text


@pytest.mark.parametrize("queue", [None, "gpus"])
def test_a_job_with_unfit_nodes_is_started_again_without_them(served, tmp_path, queue):
    """It is suspended, told what to keep off, and released once its pods are gone: by us, or by Kueue."""
    served.kube.groups.add("kueue.x-k8s.io")
    body = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "gpus"}}
    served.kube.create("localqueues", body, validate=False)
    job = Following(served, tmp_path, nodes=2, queue=queue)
    job.kube.update("rayjobs", job.name, {"spec": {"suspend": False}})  # so has Kueue
    before = job.kube.get("rayjobs", job.name)["spec"]["rayClusterSpec"]
    for number, (name, role) in enumerate((("head", "ray-head"), ("worker", "ray-worker"))):
        job.pod(name, role, podIP=f"10.0.0.{number}")
        job.kube.update("pods", name, {"spec": {"nodeName": f"node{number}"}})
        job.state(name, running={})
    job.print(f"step\n{unfit_mark(job.job)}10.0.0.1\n")
    job.says("the job is started again, and keeps off node1\n")
    rayjob = job.kube.get("rayjobs", job.name)
    assert rayjob["spec"]["suspend"] is True
    assert complaints(rayjob) == []
    changed = rayjob["spec"]["rayClusterSpec"]
    for group, was in ((changed["headGroupSpec"], before["headGroupSpec"]),
                       (changed["workerGroupSpecs"][0], before["workerGroupSpecs"][0])):  # fmt: skip
        spec = group["template"]["spec"]
        [term] = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term == {
            "matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["node1"]}]
        }
        del spec["affinity"]
        assert group == was
    job.end(76)
    for name in ("head", "worker"):
        job.kube.delete("pods", name)
    job.status("Suspended")
    if queue is None:
        deadline = time.monotonic() + 20
        while job.kube.get("rayjobs", job.name)["spec"]["suspend"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    else:
        time.sleep(0.2)
        assert job.kube.get("rayjobs", job.name)["spec"]["suspend"] is True
    job.pod("second", podIP="10.0.0.0")
    job.log("second")
    job.state("second", running={})
    job.end(0, "second")
    job.ends()
    assert (job.code, job.error) == (0, None)
    assert job.text.count("keeps off") == 1


def test_a_job_that_is_lost(served, tmp_path):
    job = Following(served, tmp_path, start_deadline_seconds=60)
    job.pod(conditions=[NO_ROOM])
    job.says("finds no node")
    message = "The RayJob has passed the preRunningDeadlineSeconds"
    job.status("Failed", reason="PreRunningDeadlineExceeded", message=message)
    job.ends()
    assert isinstance(job.error, InfrastructureError)
    assert "Its pods were not up within cluster.start_deadline_seconds: " + message in str(job.error)
    assert "Insufficient nvidia.com/gpu" in str(job.error)


def test_memory_that_was_used_up(served, tmp_path):
    job = Following(served, tmp_path)
    job.pod()
    job.log()
    job.print("step 1\n")
    job.state(terminated={"exitCode": 137, "reason": "OOMKilled"})
    job.says("step 1")
    job.status("Failed", reason="JobStatusCheckTimeoutExceeded", message="no answer")
    job.ends()
    assert isinstance(job.error, InfrastructureError)
    assert "head has ended with exit code 137 (its memory was used up: raise cluster.memory)" in str(job.error)


def test_a_job_that_somebody_deletes(served, tmp_path):
    job = Following(served, tmp_path)
    job.says("waiting")
    job.kube.delete("rayjobs", job.name)
    job.ends()
    assert isinstance(job.error, InfrastructureError)
    assert "somebody has deleted it" in str(job.error)


def test_rights_that_are_taken_away(served, tmp_path):
    job = Following(served, tmp_path)
    job.says("waiting")
    served.kube.denied |= {("list", "pods"), ("watch", "pods")}
    job.kube.compact()
    job.ends()
    assert isinstance(job.error, InfrastructureError)
    assert "cannot be watched any more" in str(job.error)
    assert 'cannot list resource "pods"' in str(job.error)


def test_found_again_from_its_record(served, tmp_path):
    first, record = submitted(served, tmp_path, nodes=2)
    first.down()
    again = Kubernetes.find(json.loads(json.dumps(record)))
    served.kube.update("rayjobs", record["driver"].split("/")[1], {"metadata": {"finalizers": ["a"]}})
    stopping = threading.Thread(target=again.stop, args=("save",))
    stopping.start()
    time.sleep(0.3)
    assert stopping.is_alive()  # it waits until nothing is left
    served.kube.update("rayjobs", record["driver"].split("/")[1], {"metadata": {"finalizers": None}})
    stopping.join(10)
    assert not stopping.is_alive()
    again.stop("now")  # over already
    assert again.standing() is None
    again.down()
