"""Names that end up in paths, options and commands of other machines are names, and nothing else."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ftlaunch.cluster.ssh_connection import ssh_command
from ftlaunch.recipes.schema import Recipe
from ftlaunch.recipes.schema_cluster import SshCluster

HOSTILE = (
    "-oProxyCommand=id", "$(id)", "`id`", "a;id", "a|id", "a&id", "a\nid", "a b", "../x", "a/../b", "'a", '"a', "",
    "a\x00",    "~root", "{a,b}", "a>b",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_runs(name):
    with pytest.raises(ValidationError):
        Recipe.model_validate({"name": name, "model": {"path": "m"}, "data": {"train": [{"path": "r.jsonl"}]}})


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["hosts", "user", "env"])
def test_hosts_users_and_variables(key, name):
    value = name if key == "user" else (name,)
    with pytest.raises(ValidationError):
        SshCluster.model_validate({"type": "ssh", "hosts": ("good",), key: value})


@pytest.mark.parametrize("path", ["-c", "-", "py\nthon", "\x00", ""])
def test_programs_that_are_options_or_lines(path):
    with pytest.raises(ValidationError):
        SshCluster(hosts=("a",), python=path)


def test_what_ssh_is_told_is_words_and_one_quoted_line():
    hostile = "/opt/it's $(touch pwned)/python"
    words = ssh_command(SshCluster(hosts=("a",), user="me", identity_file="-x; id"), "a", hostile)
    assert words[0] == "ssh"
    assert "-x; id" in words  # a word by itself, behind its own option
    assert words[-3:-1] == ["--", "a"]
    assert words[-1].startswith("'/opt/it'\"'\"'s $(touch pwned)/python'")
