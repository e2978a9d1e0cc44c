"""Amazon EC2. A machine that shuts itself down is terminated, and its disk is deleted with it: nothing but EC2 itself
has to be there for that, and no rights of the machine's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...recipes.schema_cloud import CloudCluster
from ..cloud_boot import cloud_config
from .base import Boot, Meaning, Values
from .table import image_of

ROOT_DISK = "/dev/sda1"
NO_PROFILE = {"Name": "none"}
"""Ray gives the head's machine a role that may do anything with EC2 unless it has one. Ours makes no machines."""

NO_ROOM = frozenset(
    {
        *("InsufficientInstanceCapacity", "InsufficientHostCapacity", "InsufficientCapacity"),
        *("InsufficientReservedInstanceCapacity", "InsufficientFreeAddressesInSubnet", "Unsupported"),
        *("SpotMaxPriceTooLow", "MaxSpotInstanceCountExceeded", "VcpuLimitExceeded", "InstanceLimitExceeded"),
    }
)
"""Error codes of EC2's API by which another region may do: no capacity, quotas (which are a region's), and a kind of
machine that the zones of this one do not have."""

DOWN = frozenset({"InternalError", "InternalFailure", "Unavailable", "ServiceUnavailable", "RequestLimitExceeded"})


class Aws:
    """See `base.Cloud`."""

    modules = ("boto3",)

    def provider(self, config: CloudCluster, region: str) -> Values:
        values = {"type": "aws", "region": region, "cache_stopped_nodes": False}
        return {**values, "use_internal_ips": config.private_addresses}

    def machine(self, config: CloudCluster, region: str, boot: Boot) -> Values:
        tags = [{"Key": key, "Value": value} for key, value in config.tags.items()]
        values: Values = {
            "InstanceType": config.instance_type,
            "ImageId": image_of(config.image, region),
            "InstanceInitiatedShutdownBehavior": "terminate",
            "BlockDeviceMappings": [
                {
                    "DeviceName": ROOT_DISK,
                    "Ebs": {"VolumeSize": config.disk_gb, "VolumeType": "gp3", "DeleteOnTermination": True},
                }
            ],
            "MetadataOptions": {"HttpTokens": "required"},
            "UserData": cloud_config(config, boot.public_key, watched=boot.watched),
        }
        if config.spot:
            options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
            values["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
        if config.identity is not None:
            values["IamInstanceProfile"] = {"Arn" if ":" in config.identity else "Name": config.identity}
        if tags:
            values["TagSpecifications"] = [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")]
        return values | config.machine

    def problems(self, config: CloudCluster) -> Iterator[str]:
        import boto3

        session = boto3.Session()
        if session.get_credentials() is None:
            yield (
                "AWS: there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or "
                "log in (aws sso login)"
            )
            return
        for region in config.regions:
            yield from _in_region(session.client("ec2", region), config, region)

    def ready(self, values: Values) -> Values:
        from ray.autoscaler._private.aws.config import bootstrap_aws

        head = values["available_node_types"][values["head_node_type"]]["node_config"]
        head.setdefault("IamInstanceProfile", NO_PROFILE)
        done: Values = bootstrap_aws(values)
        for kind in done["available_node_types"].values():
            node = kind["node_config"]
            if node.get("IamInstanceProfile") == NO_PROFILE:
                del node["IamInstanceProfile"]
            _name_root_disk(node, done["provider"]["region"])
        return done

    def complete(self, provider: Any, node: Values) -> None:
        pass  # it knows all

    def meaning(self, error: BaseException) -> Meaning:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        code = getattr(error, "category", None)
        if isinstance(error, ClientError):
            code = error.response["Error"]["Code"]
        if code in NO_ROOM:
            return "room"
        is_down = isinstance(error, BotoCoreError) and not isinstance(error, NoCredentialsError)
        return "down" if code in DOWN or is_down else "mendable"


def _in_region(ec2: Any, config: CloudCluster, region: str) -> Iterator[str]:
    from botocore.exceptions import ClientError

    kind = config.instance_type
    image = image_of(config.image, region)
    try:
        filters = [{"Name": "instance-type", "Values": [kind]}]
        if not ec2.describe_instance_type_offerings(Filters=filters)["InstanceTypeOfferings"]:
            yield f"cluster.instance_type: there is no {kind} in {region}"
        else:
            yield from _too_few_gpus(ec2, config)
        if not ec2.describe_images(ImageIds=[image])["Images"]:
            yield f"cluster.image: there is no image {image} in {region}"
    except ClientError as error:
        said = error.response["Error"]
        if said["Code"].startswith("InvalidAMIID"):
            yield f"cluster.image: there is no image {image} in {region} ({said['Message']})"
        elif said["Code"] in DOWN:
            raise
        else:
            yield f"AWS, {region}: {said['Code']}: {said['Message']}"


def _too_few_gpus(ec2: Any, config: CloudCluster) -> Iterator[str]:
    [kind] = ec2.describe_instance_types(InstanceTypes=[config.instance_type])["InstanceTypes"]
    has = sum(gpu["Count"] for gpu in kind.get("GpuInfo", {}).get("Gpus", ()))
    if config.gpus_per_node is not None and config.gpus_per_node > has:
        yield f"cluster.gpus_per_node is {config.gpus_per_node}, {config.instance_type} has {has}"


def _name_root_disk(node: Values, region: str) -> None:
    """A disk of another name than the image's own would be a second, empty one."""
    import boto3

    [image] = boto3.client("ec2", region).describe_images(ImageIds=[node["ImageId"]])["Images"]
    for disk in node["BlockDeviceMappings"]:
        if disk["DeviceName"] == ROOT_DISK:
            disk["DeviceName"] = image.get("RootDeviceName") or ROOT_DISK
