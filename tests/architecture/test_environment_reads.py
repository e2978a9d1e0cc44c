"""Environment variables are read in a few named places; everything else gets what it needs passed in."""

from __future__ import annotations

import ast

ALLOWED = {
    "launcher/cli.py": "the laptop's end: hands the environment to what it calls",
    "launcher/cli_recipe.py": "the same, for all commands that take a recipe",
    "launcher/hardware.py": "which of the machine's GPUs this process may use is said in a variable only",
    "launcher/spares.py": "torch takes a rank's threads from a variable only, which Ray sets elsewhere; it is written",
    "launcher/worker.py": "a Ray worker's end: its context and variables become a World",
    "distributed/entry.py": "torchrun's end: hands the environment to World.from_torchrun",
    "distributed/strategies/deepspeed_compat.py": "DeepSpeed takes its device from a variable only; it is written",
    "cluster/ray_settings.py": "Ray takes its settings from variables only; they are written, not read",
    "cluster/host_agent.py": "a host's end of SSH: what it starts has the login's environment; the temporary folder",
    "cluster/host_probe.py": "what it starts has its own environment, and variables of the run",
    "cluster/host_keeper.py": "what it starts has its own environment, and the job's",
    "cluster/pod_agent.py": "a pod's end: KubeRay says in variables how Ray is started; what it starts has the pod's",
    "cluster/slurm_look.py": "a node's end of Slurm, which says in variables only which node it is",
    "cluster/slurm_keep.py": "the same; what it starts has the job's own environment",
    "recipes/load.py": "resolves ${VAR} in a recipe",
}
NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def reads(tree: ast.Module) -> list[int]:
    """Lines that touch the process's environment, through `os.NAME` or `from os import NAME`."""
    return sorted(node.lineno for node in ast.walk(tree) if is_read(node))


def is_read(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="os"), attr=attr):
            return attr in NAMES
        case ast.ImportFrom(module="os", names=names):
            return any(alias.name in NAMES for alias in names)
    return False


def test_only_named_places_read_the_environment(sources):
    found = [f"{s.name}:{line}" for s in sources if s.name not in ALLOWED for line in reads(s.tree)]
    assert found == [], f"pass the value in from one of {sorted(ALLOWED)}"


def test_every_way_of_reading_is_seen():
    text = "import os\nos.environ['A']\nos.getenv('A')\nfrom os import environ\nprint(os.sep)\nos.environ.get('A')\n"
    assert reads(ast.parse(text)) == [2, 3, 4, 6]
