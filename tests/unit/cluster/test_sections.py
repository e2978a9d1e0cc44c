"""Mistakes in the `cluster` section, as a user would write them into a recipe."""

from __future__ import annotations

import pytest

from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import load_recipe, parse_recipe_text

AWS = "type: cloud, provider: aws, instance_type: g5.xlarge"
NEEDED = "name: a\nmodel: {path: m}\ndata: {train: [{path: rows.jsonl}]}\n"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("{type: ssh}", "cluster.hosts: missing: which hosts to run on; list the hosts, or name a file"),
        ("{type: ssh, hosts: [a], hostfile: b}", "cluster.hosts: given along with hostfile"),
        ("{type: ssh, hosts: [a, b, a]}", "cluster.hosts: a is named more than once"),
        ("{type: ssh, hosts: [-oProxyCommand=id]}", "cluster.hosts.0"),
        ("{type: ssh, hosts: ['a;id']}", "cluster.hosts.0"),
        ("{type: ssh, hosts: [a], user: '-l'}", "cluster.user"),
        ("{type: ssh, hosts: [a], python: -c}", "cluster.python"),
        ("{type: ssh, hosts: [a], slots: 8}", "cluster.slots: unknown key"),
        ('{type: slurm, partition: "a\\nb"}', "cluster.partition"),
        ("{type: slurm, time: soon}", "cluster.time"),
        ("{type: slurm, memory: lots}", "cluster.memory"),
        ("{type: slurm, options: [nice]}", "cluster.options.0"),
        (
            "{type: slurm, options: ['--nice=1', '--partition=x']}",
            "cluster.options.1: --partition has a key of its own",
        ),
        ("{type: slurm, options: ['--output=x']}", "cluster.options.0: --output is ftlaunch's own to choose"),
        ("{type: slurm, leave_before_s: 0}", "cluster.leave_before_s"),
        ("{type: slurm, container: {runtime: docker, image: x}}", "cluster.container.runtime"),
        ("{type: slurm, partitions: x}", "cluster.partitions: unknown key"),
        (f"{{{AWS}, regions: [us-east-1a], image: ami-12345678}}", "us-east-1a is none of provider aws"),
        (f"{{{AWS}, regions: [us-east-1], image: ubuntu}}", "ubuntu is no image of provider aws"),
        (f"{{{AWS}, regions: [us-east-1, us-west-2], image: ami-12345678}}", "an AMI is in one region"),
        (
            f"{{{AWS}, regions: [us-east-1, us-west-2], image: {{us-east-1: ami-12345678}}}}",
            "no image for us-west-2",
        ),
        (f"{{{AWS}, regions: [us-east-1], image: ami-12345678, project: p}}", "means nothing for provider aws"),
        (
            f"{{{AWS}, regions: [us-east-1], image: ami-12345678, machine: {{UserData: x}}}}",
            "cluster.machine.UserData: is ftlaunch's own to choose",
        ),
        (
            "{type: cloud, provider: gcp, instance_type: n, regions: [us-central1], image: i}",
            "cluster.project: missing: provider gcp needs it",
        ),
        ("{type: cloud, provider: oracle, instance_type: n, regions: [a], image: i}", "cluster.provider"),
        (f"{{{AWS}, regions: [us-east-1], image: ami-12345678, tags: {{Team: a}}}}", "'Team' is no name for a tag"),
        (f"{{{AWS}, regions: [us-east-1], image: ami-12345678, tags: {{ray-x: a}}}}", "'ray-x' is no name for a tag"),
        (f"{{{AWS}, regions: [], image: ami-12345678}}", "cluster.regions"),
        (f"{{{AWS}, regions: [us-east-1], image: ami-12345678, user: '-l'}}", "cluster.user"),
        (f"{{{AWS}, regions: [us-east-1], image: ami-12345678, python: -c}}", "cluster.python"),
    ],
)
def test_mistakes_in_the_section(section, says, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"{NEEDED}cluster: {section}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path, environ={})
    assert says in str(caught.value)


def test_a_recipe_without_one_runs_here():
    assert parse_recipe_text(NEEDED).cluster.type == "local"
