"""What a check found out, for whoever shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..recipes.schema import Recipe
from .check_fill import Fill
from .check_findings import Finding
from .check_tally import Tally
from .plan_duration import DurationPlan


@dataclass(frozen=True)
class Result:
    """`findings`: worst first. `fill` None: there is nothing to fill sequences with."""

    recipe: Recipe
    seed: int
    tallies: Sequence[Tally]
    duration: DurationPlan
    fill: Fill | None
    findings: Sequence[Finding]
