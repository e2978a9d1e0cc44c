"""Pods of a Kubernetes cluster with KubeRay, made for one run as a RayJob and gone with it.

The head is the first node, with the driver. This process makes the RayJob suspended, then what belongs to it, and lets
go by releasing it: whenever it dies, nothing is left that runs or holds a secret without an owner.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from ..recipes.errors import InfrastructureError, UserError
from ..recipes.schema_kubernetes import KubernetesCluster
from . import kubernetes_checks
from .base import CodeFolder, Demand, Driver, Need, Record, Stop
from .kubernetes_api import Api, ApiError, Gone, Object, connect
from .kubernetes_follow import Follower
from .kubernetes_job import QUEUE, SECRET_BYTES, Job, as_yaml, secret_content
from .kubernetes_look import Place, selector_of, standing
from .ssh_facts import requirements
from .ssh_job import travelling, unset

POLL_S = 1.0
GONE_S = 120.0
"""For Kubernetes to remove pods, beyond their grace period."""


class Kubernetes:
    """The `kubernetes` cluster."""

    run_is_here = False
    """This machine may not see the run directory: a volume of the pods, a store that only their account opens."""

    def __init__(self, config: KubernetesCluster, need: Need) -> None:
        self._config, self._need = config, need
        self._api: Api | None = None
        self._job: Job | None = None
        self._unreleased = False

    # --- before anything starts ---------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """See `SubmittedCluster`."""
        found = [f"cluster.env: {name} is not set here" for name in unset(self._config.env, self._need.environ)]
        found += kubernetes_checks.paths(self._config, self._need)
        self._api = connect(self._config)
        try:
            self._job = self._new_job(self._api)
            found += kubernetes_checks.cluster(self._api, self._job)
            return found or kubernetes_checks.dry_run(self._api, self._job.rayjob())
        except ApiError as error:
            raise InfrastructureError(f"the Kubernetes API server fails: {error}") from error

    def _new_job(self, api: Api) -> Job:
        names = sorted(travelling(self._config.env, self._need.environ))
        return Job(secrets.token_hex(4), self._need.name, api.namespace, self._config, names)

    def render(self) -> str:
        """With names for what is known at submission only."""
        names = sorted(name for name in self._config.env if "*" not in name)
        job = Job("00000000", self._need.name, self._config.namespace or "default", self._config, names)
        return as_yaml([job.secret_unseen(), *job.manifests()])

    # --- starting -----------------------------------------------------------------------------------------------------

    @property
    def demand(self) -> Demand:
        """Ranks and cores, as the recipe has them."""
        return self._known[1].demand

    @property
    def _known(self) -> tuple[Api, Job]:
        assert self._api is not None, "after `problems` or `find`"
        assert self._job is not None, "after `problems` or `find`"
        return self._api, self._job

    @property
    def _place(self) -> Place:
        job = self._known[1]
        return Place(job.name, job.job, job.config.nodes)

    def up(self, driver: Driver, code: CodeFolder) -> Record:
        """See `SubmittedCluster`; after `problems` has found none."""
        api, job = self._known
        record = self._record(api, job)
        content = secret_content(
            job, driver.entry, self._need.folder, [str(need) for need in requirements().values()],
            {**driver.job(job.demand), "record": record}, code(), secrets.token_hex(32),
            travelling(self._config.env, self._need.environ),
        )  # fmt: skip
        if (size := sum(map(len, content.values()))) > SECRET_BYTES:
            raise UserError(
                f"the recipe, cluster.env and ftlaunch's code come to {size / 1e6:.2f} MB; a Secret holds "
                f"{SECRET_BYTES / 1e6:.2f} MB. Take large values out of cluster.env (cluster.env_from_secrets names "
                "Secrets that are there)."
            )
        try:
            self._make(api, job, content)
        except ApiError as error:
            self.down()
            if error.code in (400, 403, 422):
                raise UserError(kubernetes_checks.explain_refusal(error)) from error
            raise InfrastructureError(f"the job could not be made: {error}") from error
        return record

    def _make(self, api: Api, job: Job, content: Mapping[str, bytes]) -> None:
        """The RayJob first, for what belongs to it goes when it does; it starts nothing before it is released."""
        rayjob = job.rayjob()
        released = rayjob["spec"]["suspend"]
        queued = {name: rayjob["metadata"]["labels"].pop(name) for name in [QUEUE] if released}
        self._unreleased = True
        made = api.post(
            {**rayjob, "spec": {**rayjob["spec"], "suspend": True}}, *kubernetes_checks.rayjobs(api),
            fieldValidation="Strict",
        )  # fmt: skip
        owner = {"apiVersion": made["apiVersion"], "kind": "RayJob", "name": job.name, "uid": made["metadata"]["uid"]}
        api.post(_owned(job.secret(content), owner), "api", "v1", "namespaces", api.namespace, "secrets")
        if self._config.pod_disruption_budget:
            path = ("apis", "policy", "v1", "namespaces", api.namespace, "poddisruptionbudgets")
            api.post(_owned(job.budget(), owner), *path)
        # Kueue takes up a job when its label is there, and is then the one to release it.
        change: Object = {"metadata": {"labels": queued}} if queued else {"spec": {"suspend": False}}
        api.patch(change, *kubernetes_checks.rayjobs(api), job.name)
        self._unreleased = False

    def _record(self, api: Api, job: Job) -> dict[str, Any]:
        config = self._config.model_dump(mode="json") | {"context": api.context, "namespace": api.namespace}
        return {
            "job": job.job,
            "driver": f"{api.namespace}/{job.name}",
            "cluster": config,
            "run": job.run,
            "replaces": True,
            "submitted_at": time.time(),
        }

    # --- afterwards ---------------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, record: Record) -> Self:
        """The cluster of a submission. Raises UserError where the kubeconfig does not know it."""
        config = KubernetesCluster.model_validate_json(json.dumps(record["cluster"]))
        cluster = cls(config, Need(folder="."))
        cluster._api = connect(config)
        cluster._job = Job(record["job"], record["run"], cluster._api.namespace, config, ())
        return cluster

    def follow(self, write: Callable[[bytes], None]) -> int:
        """See `SubmittedCluster`. What cannot start is ended."""
        try:
            return Follower(self._known[0], self._place, write).run()
        except UserError:
            self.stop("now")
            raise

    def standing(self) -> str | None:
        """How the job stands, in words that go behind its name: that it waits, and for what; None: it is over."""
        try:
            return standing(self._known[0], self._place)
        except (ApiError, Gone) as error:
            raise InfrastructureError(f"the job cannot be asked for: {error}") from error

    def stop(self, how: Stop) -> None:
        """See `SubmittedCluster`. The pods are told to end, and the head's lets the driver save; `now` takes their time
        from them."""
        api, job = self._known
        deadline_s = time.monotonic() + GONE_S
        deadline_s += job.config.termination_grace_period_seconds if how == "save" else 0
        try:
            api.delete(*kubernetes_checks.rayjobs(api), job.name, propagationPolicy="Background")
            while names := self._left(api, job):
                if time.monotonic() > deadline_s:
                    raise InfrastructureError(f"these are still there: {', '.join(names)}; `kubectl describe` says why")
                for name in names if how == "now" else []:
                    if not name.startswith("rayjob/"):
                        path = ("api", "v1", "namespaces", api.namespace, "pods", name)
                        api.delete(*path, gracePeriodSeconds=1)
                time.sleep(POLL_S)
        except (ApiError, Gone) as error:
            raise InfrastructureError(f"the job could not be ended: {error}") from error

    def _left(self, api: Api, job: Job) -> list[str]:
        pods = api.get("api", "v1", "namespaces", api.namespace, "pods", labelSelector=selector_of(self._place))
        names = [pod["metadata"]["name"] for pod in pods["items"]]
        try:
            api.get(*kubernetes_checks.rayjobs(api), job.name)
        except ApiError as error:
            if error.code != 404:
                raise
            return names
        return [f"rayjob/{job.name}", *names]

    def down(self) -> None:
        """See `SubmittedCluster`."""
        if self._api is None:
            return
        if self._unreleased and self._job is not None:
            self._unreleased = False
            self._api.delete(*kubernetes_checks.rayjobs(self._api), self._job.name)
        self._api.close()


def _owned(manifest: Object, owner: Object) -> Object:
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [owner]}}
