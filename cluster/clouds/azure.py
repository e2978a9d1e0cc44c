"""Azure. A machine deletes itself by the managed identity that Ray's provider makes for the cluster in the resource
group, and its disk, network interface and address go with it.

Ray's provider deploys machines by a template of its own, which has no place for what they do when they first start, nor
for what goes with them. Both are put into the template on its way.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from ...recipes.schema_cloud import CloudCluster
from ..cloud_boot import cloud_config
from .base import Boot, Meaning, Values
from .table import image_of

NO_ROOM = (
    *("SkuNotAvailable", "AllocationFailed", "ZonalAllocationFailed", "OverconstrainedAllocationRequest"),
    *("OverconstrainedZonalAllocationRequest", "QuotaExceeded", "exceeding approved", "No available zones for VM size"),
)
"""Parts of what the resource manager says where another region may do."""


CUSTOM_DATA = "customData"
"""Key of a machine that Ray's provider does not know: what cloud-init does."""


class Azure:
    """See `base.Cloud`."""

    modules = (
        *("azure.common", "azure.core", "azure.identity"),
        *("azure.mgmt.compute", "azure.mgmt.network", "azure.mgmt.resource"),
        *("msrest", "msrestazure"),  # imported by azure.common.credentials, which Ray's provider imports
    )

    def provider(self, config: CloudCluster, region: str) -> Values:
        return {
            "type": "azure",
            "location": region,
            # A group is in one region, and so are the networks that Ray's provider makes in it.
            "resource_group": f"{config.resource_group}-{region}" if len(config.regions) > 1 else config.resource_group,
            "subscription_id": config.subscription,
            "cache_stopped_nodes": False,
            "use_internal_ips": config.private_addresses,
        }

    def machine(self, config: CloudCluster, region: str, boot: Boot) -> Values:
        image = image_of(config.image, region)
        named = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
        values: Values = {
            "vmSize": config.instance_type,
            "osDiskSize": config.disk_gb,
            "adminUsername": config.user,
            "publicKey": boot.public_key,
            **({"imageId": image} if image.startswith("/") else dict(zip(named, image.split(":"), strict=True))),
        }
        if config.spot:
            values |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
        more = dict(config.machine)
        values |= more.pop("azure_arm_parameters", {})
        start = {CUSTOM_DATA: cloud_config(config, boot.public_key, watched=True)} if boot.watched else {}
        return {"azure_arm_parameters": values, "tags": dict(config.tags), **start} | more

    def problems(self, config: CloudCluster) -> Iterator[str]:
        from azure.core.exceptions import ClientAuthenticationError
        from azure.identity import AzureCliCredential
        from azure.mgmt.compute import ComputeManagementClient

        # What Ray's provider makes the resource group with; for machines it takes others too.
        compute = ComputeManagementClient(AzureCliCredential(), config.subscription)
        for region in config.regions:
            try:
                kinds = {kind.name for kind in compute.virtual_machine_sizes.list(region)}
            except ClientAuthenticationError:
                yield "Azure: its command line is not here, or not logged in; Ray's provider asks it: az login"
                return
            if config.instance_type not in kinds:
                yield f"cluster.instance_type: there is no {config.instance_type} in {region}"

    def ready(self, values: Values) -> Values:
        from ray.autoscaler._private._azure.config import bootstrap_azure

        done: Values = bootstrap_azure(values)
        return done

    def complete(self, provider: Any, node: Values) -> None:
        provider.resource_client = _Client(provider.resource_client, node[CUSTOM_DATA])

    def meaning(self, error: BaseException) -> Meaning:
        from azure.core.exceptions import HttpResponseError, ServiceRequestError

        if any(words in str(error) for words in NO_ROOM):
            return "room"
        status = error.status_code if isinstance(error, HttpResponseError) else None
        return "down" if isinstance(error, ServiceRequestError) or (status or 0) >= 500 else "mendable"


class _Client:
    """The resource manager's client, with templates of machines completed."""

    def __init__(self, client: Any, custom_data: str) -> None:
        self._client = client
        self.deployments = _Deployments(client.deployments, custom_data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class _Deployments:
    def __init__(self, deployments: Any, custom_data: str) -> None:
        self._deployments, self._custom_data = deployments, custom_data

    def create_or_update(self, *, parameters: Values, **more: Any) -> Any:
        """As Ray's provider calls it."""
        complete_template(parameters["properties"]["template"], self._custom_data)
        return self._deployments.begin_create_or_update(parameters=parameters, **more)


def complete_template(template: Values, custom_data: str) -> None:
    """What the machines of Ray's template do when they first start, and that all they have goes with them. After the
    reference of Microsoft.Compute/virtualMachines and Microsoft.Network/networkInterfaces, 2024-07-01."""
    goes_too = {"deleteOption": "Delete"}
    for resource in template["resources"]:
        has = resource["properties"]
        if resource["type"] == "Microsoft.Compute/virtualMachines":
            has["osProfile"]["customData"] = base64.b64encode(custom_data.encode()).decode()
            has["storageProfile"]["osDisk"] |= goes_too
            for interface in has["networkProfile"]["networkInterfaces"]:
                interface["properties"] = goes_too
        if resource["type"] == "Microsoft.Network/networkInterfaces":
            for address in has["ipConfigurations"]:
                if public := address["properties"].get("publicIpAddress"):
                    public["properties"] = goes_too
