"""`ftlaunch doctor`: measure the nodes of a cluster, say what is wrong with which, and which to leave out."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...cluster.ssh_hosts import hosts_of
from ...distributed import storage
from ...recipes.errors import InfrastructureError
from ...recipes.schema_cluster import ClusterConfig, SshCluster
from .examine import Say, Wanted, examine
from .judge import Finding, judge, unfit
from .table import open_prober

STYLES = {"good": "green", "odd": "yellow", "bad": "bold red"}


def wanted_of(config: ClusterConfig, place: str | None, environ: Mapping[str, str]) -> Wanted:
    """What a run with this checkpoint.path (None: not known) needs of the nodes."""
    names = getattr(config, "env", ())
    travelling = {
        name: value for name, value in environ.items() if any(fnmatch.fnmatchcase(name, each) for each in names)
    }
    if place is not None and storage.is_local(place):
        place = str(storage.local_path(place).absolute())
    folders = ("", place) if place is not None and storage.is_local(place) else ("",)
    return Wanted(storage=place, environ=travelling, folders=folders, gpus=config.gpus_per_node != 0)


def findings_of(config: ClusterConfig, wanted: Wanted, say: Say) -> list[Finding]:
    """Measure and judge."""
    with open_prober(config) as prober:
        return judge(examine(prober, wanted, say))


def run_doctor(config: ClusterConfig, place: str | None, environ: Mapping[str, str], *, as_json: bool) -> int:
    """Print findings; 0 if all nodes are fit. Raises InfrastructureError that names those that are not."""
    console = Console(stderr=as_json)

    def say(line: str) -> None:
        console.print(Text(line, style="dim"), soft_wrap=True, highlight=False)

    findings = findings_of(config, wanted_of(config, place, environ), say)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(_table(findings))
    bad = unfit(findings)
    if bad:
        raise InfrastructureError(f"{unfit_text(bad)}\n{_remedy(config, bad)}")
    return 0


def unfit_text(bad: Mapping[str, Sequence[str]]) -> str:
    """A line for each node that is unfit."""
    return "\n".join(f"node {node} is unfit: {'; '.join(why)}" for node, why in bad.items())


def _remedy(config: ClusterConfig, bad: Mapping[str, Sequence[str]]) -> str:
    if not isinstance(config, SshCluster):
        return "Mend or remove it; a run on several nodes leaves it out by itself while there are others."
    good = [host for host in hosts_of(config) if host not in bad]
    if not good:
        return "No host is fit."
    return f"Mend it, or leave it out: 'cluster.hosts=[{', '.join(good)}]'"


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("node", "check", "", ""):
        table.add_column(heading, no_wrap=heading in ("node", "check"), overflow="fold")
    last = ""
    for finding in findings:
        node = finding.node if finding.node != last else ""
        last = finding.node
        verdict = Text(finding.verdict, style=STYLES[finding.verdict])
        table.add_row(Text(node), Text(finding.check), verdict, Text(finding.text))
    return table


def here() -> Path:
    """Where profiles are looked for without a recipe."""
    return Path.cwd()
