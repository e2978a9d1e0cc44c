"""Rules of `cluster: {type: cloud}` that span its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .problems import Problem
from .schema import Recipe
from .schema_cloud import TAG_NAME, CloudCluster

NEEDED = {"gcp": ("project",), "azure": ("subscription", "resource_group")}
OF = {"project": ("gcp",), "subscription": ("azure",), "resource_group": ("azure",), "identity": ("aws", "gcp")}
"""Key -> the providers that it means something for."""

REGION = {
    "aws": (re.compile(r"[a-z]{2}(-[a-z]+)+-\d"), "a region: us-east-1"),
    "gcp": (re.compile(r"[a-z]+-[a-z]+\d+-[a-z]"), "a zone: us-central1-a"),
    "azure": (re.compile(r"[a-z]+\d*"), "a region: eastus"),
}
IMAGE = {
    "aws": (re.compile(r"ami-[0-9a-f]{8,17}"), "the id of an AMI: ami-0123456789abcdef0"),
    "gcp": (
        re.compile(r"projects/[^/]+/global/images/(family/)?[^/]+"),
        "projects/PROJECT/global/images/family/FAMILY, or …/images/IMAGE",
    ),
    "azure": (re.compile(r"[^:/]+:[^:/]+:[^:/]+:[^:/]+|/subscriptions/.+"), "publisher:offer:sku:version"),
}

OUR_TAGS = ("ftlaunch-", "ray-")

OURS = {
    "aws": ("UserData", "InstanceInitiatedShutdownBehavior", "MinCount", "MaxCount"),
    "gcp": ("metadata", "labels", "name"),
    "azure": (),
}
"""What only ftlaunch can choose of a machine: by it the machines are found again, reached, and end."""


def cloud_provider_keys(recipe: Recipe) -> Iterator[Problem]:
    """What a provider needs, and what means nothing to it."""
    cluster = recipe.cluster
    if not isinstance(cluster, CloudCluster):
        return
    provider = cluster.provider
    for key in NEEDED.get(provider, ()):
        if getattr(cluster, key) is None:
            yield Problem(f"cluster.{key}", f"missing: provider {provider} needs it", f"set cluster.{key}")
    for key, providers in OF.items():
        if getattr(cluster, key) is not None and provider not in providers:
            yield Problem(f"cluster.{key}", f"means nothing for provider {provider}", "leave it out")
    for name in cluster.tags:
        if not re.fullmatch(TAG_NAME, name) or name.startswith(OUR_TAGS):
            remedy = f"small letters, digits, - and _, and none that begins with {' or '.join(OUR_TAGS)}"
            yield Problem("cluster.tags", f"{name!r} is no name for a tag of yours", remedy)
    for key in OURS[provider]:
        if key in cluster.machine:
            yield Problem(f"cluster.machine.{key}", "is ftlaunch's own to choose", "leave it out")


def cloud_regions(recipe: Recipe) -> Iterator[Problem]:
    """Regions as the provider names them, each once, with an image in each."""
    cluster = recipe.cluster
    if not isinstance(cluster, CloudCluster):
        return
    pattern, example = REGION[cluster.provider]
    for number, region in enumerate(cluster.regions):
        key = f"cluster.regions.{number}"
        if not pattern.fullmatch(region):
            yield Problem(key, f"{region} is none of provider {cluster.provider}", f"name {example}")
        elif region in cluster.regions[:number]:
            yield Problem(key, f"{region} is named more than once", "name each once")
        elif isinstance(cluster.image, dict) and region not in cluster.image:
            yield Problem("cluster.image", f"no image for {region}", "name one for each of cluster.regions")


def cloud_images(recipe: Recipe) -> Iterator[Problem]:
    """Images as the provider names them."""
    cluster = recipe.cluster
    if not isinstance(cluster, CloudCluster):
        return
    pattern, example = IMAGE[cluster.provider]
    images = cluster.image.values() if isinstance(cluster.image, dict) else [cluster.image]
    for image in images:
        if not pattern.fullmatch(image):
            yield Problem("cluster.image", f"{image} is no image of provider {cluster.provider}", f"name {example}")
    if cluster.provider == "aws" and isinstance(cluster.image, str) and len(cluster.regions) > 1:
        message = "an AMI is in one region, and several are named"
        yield Problem("cluster.image", message, "name one for each: {us-east-1: ami-…, us-west-2: ami-…}")
