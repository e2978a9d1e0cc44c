"""What an hour of a run's machines costs, on a cluster that is paid by the hour: an estimate from prices. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipes.schema_cloud import CloudCluster
from ..recipes.schema_cluster import ClusterConfig
from ..recipes.schema_nodes import most_nodes
from .unknown import Unknown

AS_OF = "January 2025"
PLACES = {"aws": "us-east-1", "gcp": "us-central1", "azure": "eastus"}
PRICES = {
    "aws": {
        "g4dn.xlarge": 0.526,
        "g4dn.12xlarge": 3.912,
        "g5.xlarge": 1.006,
        "g5.2xlarge": 1.212,
        "g5.12xlarge": 5.672,
        "g5.48xlarge": 16.288,
        "p3.2xlarge": 3.06,
        "p3.8xlarge": 12.24,
        "p3.16xlarge": 24.48,
    },
    "gcp": {"a2-highgpu-1g": 3.673, "a2-highgpu-8g": 29.387},
    "azure": {
        "Standard_NC24ads_A100_v4": 3.673,
        "Standard_NC48ads_A100_v4": 7.346,
        "Standard_NC96ads_A100_v4": 14.692,
    },
}
"""US dollars for an hour of a machine with Linux on demand, in PLACES, as the providers' public price lists had them at
AS_OF. Kinds whose price is not certain are left out; `cluster.prices` has the user's own."""


@dataclass(frozen=True)
class CostPlan:
    """In US dollars. `most_usd`: in the hours after which the machines end themselves; None: they may take any."""

    machines: int
    instance_type: str
    usd_per_machine_hour: float
    usd_per_hour: float
    most_usd: float | None
    source: str


def plan_cost(cluster: ClusterConfig) -> CostPlan | Unknown | None:
    """None: nobody asks money for the cluster, as far as is known here."""
    if not isinstance(cluster, CloudCluster):
        return None
    kind, own = cluster.instance_type, cluster.prices.get(cluster.instance_type)
    price = PRICES[cluster.provider].get(kind) if own is None else own
    if price is None:
        return Unknown(f"what an hour of {kind} costs; say it: cluster.prices: {{{kind}: DOLLARS}}")
    listed = f"the list price on demand in {PLACES[cluster.provider]}, {AS_OF}; spot machines cost less"
    machines = most_nodes(cluster.nodes)
    return CostPlan(
        machines=machines,
        instance_type=kind,
        usd_per_machine_hour=price,
        usd_per_hour=price * machines,
        most_usd=None if cluster.max_hours is None else price * machines * cluster.max_hours,
        source="cluster.prices" if own is not None else listed,
    )


def cost_text(cost: CostPlan) -> str:
    """For people."""
    most = "" if cost.most_usd is None else f", at most about ${cost.most_usd:,.2f} in cluster.max_hours"
    each = f"{cost.machines} x {cost.instance_type} at ${cost.usd_per_machine_hour:,.3f}"
    hourly = f"about ${cost.usd_per_hour:,.2f} an hour{most}"
    return f"{hourly} (an estimate: {each}, {cost.source}; disks and traffic are not in it)"
