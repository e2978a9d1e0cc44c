"""The seam between `cluster: {type: cloud}` and a provider's own terms.

Machines are made, listed and ended by Ray's node providers (`ray.autoscaler`), which are the same for all; what differs
is how a machine is described, what is asked of the provider before, and what its refusals mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ...recipes.schema_cloud import CloudCluster

Meaning = Literal["room", "mendable", "down"]
"""Of a refusal: there is no room (or quota) here, and may be elsewhere; the user can mend it; the provider, or the way
to it, has failed."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Boot:
    """How a machine is reached: `public_key` is what logs in. `watched`: it ends by itself; not so where a person takes
    the description elsewhere."""

    public_key: str
    watched: bool


class Cloud(Protocol):
    """One provider. Adding one: a file beside this, a line in `table.py`, its name in the schema and in
    `recipes/checks_cloud.py`, its tests."""

    modules: tuple[str, ...]
    """Packages that Ray's node provider imports; the extra `ftlaunch[NAME]` has them."""

    def provider(self, config: CloudCluster, region: str) -> Values:
        """The `provider` section of Ray's cluster launcher."""
        ...

    def machine(self, config: CloudCluster, region: str, boot: Boot) -> Values:
        """The `node_config` of Ray's cluster launcher."""
        ...

    def problems(self, config: CloudCluster) -> Iterator[str]:
        """What is wrong as far as the provider can tell before anything is made. Raises what its client raises."""
        ...

    def ready(self, values: Values) -> Values:
        """A whole configuration of Ray's cluster launcher with what is only known at the provider: networks, names of
        disks. What is missing there is made. Raises what its client raises."""
        ...

    def complete(self, provider: Any, node: Values) -> None:
        """Tell Ray's node provider what of a machine it does not know itself, before it makes some."""
        ...

    def meaning(self, error: BaseException) -> Meaning:
        """What it means that making machines failed in this way."""
        ...
