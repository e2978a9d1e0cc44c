"""Google Compute Engine. A machine deletes itself if its service account may (`compute.instances.delete`); otherwise it
stops itself, and its disk stays.

Of Ray's provider only the part that makes and ends machines is used. The rest would give the project a service account
that may do anything with machines and buckets, and a key of its own; networks are named in the machine instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...recipes.schema_cloud import CloudCluster
from ..cloud_boot import metadata
from .base import Boot, Meaning, Values
from .table import image_of

NO_ROOM = (
    *("ZONE_RESOURCE_POOL_EXHAUSTED", "RESOURCE_POOL_EXHAUSTED", "QUOTA_EXCEEDED", "STOCKOUT", "quotaExceeded"),
    *("does not have enough resources", "currently unavailable in the"),
)
"""Parts of what Compute Engine says where another zone may do."""

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
"""What a service account may do is said in its roles."""


class Gcp:
    """See `base.Cloud`."""

    modules = ("googleapiclient", "google.auth", "google_auth_httplib2")

    def provider(self, config: CloudCluster, region: str) -> Values:
        values = {"type": "gcp", "region": region.rpartition("-")[0], "availability_zone": region}
        return {**values, "project_id": config.project, "use_internal_ips": config.private_addresses}

    def machine(self, config: CloudCluster, region: str, boot: Boot) -> Values:
        network: Values = {"network": "global/networks/default"}
        if not config.private_addresses:
            network["accessConfigs"] = [{"name": "External NAT", "type": "ONE_TO_ONE_NAT"}]
        disk = {"diskSizeGb": config.disk_gb, "sourceImage": image_of(config.image, region)}
        values: Values = {
            "machineType": config.instance_type,
            "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
            "networkInterfaces": [network],
            "metadata": {"items": metadata(config, boot.public_key, watched=boot.watched)},
            # A machine with GPUs cannot be moved while it runs, and has to say so.
            "scheduling": {"onHostMaintenance": "TERMINATE", "automaticRestart": False},
            "labels": dict(config.tags),
        }
        if config.spot:
            values["scheduling"] |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        if config.identity is not None:
            values["serviceAccounts"] = [{"email": config.identity, "scopes": [SCOPE]}]
        return values | config.machine

    def problems(self, config: CloudCluster) -> Iterator[str]:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
        from googleapiclient import discovery

        try:
            credentials, _ = google.auth.default(scopes=[SCOPE])
        except DefaultCredentialsError:
            yield (
                "GCP: there are no credentials: set GOOGLE_APPLICATION_CREDENTIALS to a key's file, or log in "
                "(gcloud auth application-default login)"
            )
            return
        compute = discovery.build("compute", "v1", credentials=credentials, cache_discovery=False)
        for zone in config.regions:
            yield from _in_zone(compute, config, zone)

    def ready(self, values: Values) -> Values:
        return values  # all is said

    def complete(self, provider: Any, node: Values) -> None:
        pass  # it knows all

    def meaning(self, error: BaseException) -> Meaning:
        if any(words in str(error) for words in NO_ROOM):
            return "room"
        status = getattr(getattr(error, "resp", None), "status", None)
        return "down" if isinstance(error, OSError) or (status is not None and status >= 500) else "mendable"


def _in_zone(compute: Any, config: CloudCluster, zone: str) -> Iterator[str]:
    from googleapiclient.errors import HttpError

    project, image = config.project, image_of(config.image, zone).split("/")
    kind = compute.machineTypes().get(project=project, zone=zone, machineType=config.instance_type)
    place = compute.images()
    found = (
        place.getFromFamily(project=image[1], family=image[-1])
        if "family" in image
        else place.get(project=image[1], image=image[-1])
    )
    for key, said, request in (
        ("instance_type", f"there is no {config.instance_type} in {zone}", kind),
        ("image", f"there is no {'/'.join(image)}", found),
    ):
        try:
            request.execute()
        except HttpError as error:
            if error.resp.status >= 500:
                raise
            not_there = error.resp.status == 404
            yield f"cluster.{key}: {said} ({error.reason})" if not_there else f"GCP, {zone}: {error.reason}"
