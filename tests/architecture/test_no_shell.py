"""Nothing is quoted into a shell by hand, and nothing is made that everybody on a machine may write."""

from __future__ import annotations

import ast

SHELLS = {"sh", "bash", "/bin/sh", "/bin/bash", "zsh"}
CALLS = {
    ("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"),
    ("tempfile", "mktemp"),
}  # fmt: skip
ALLOWED = {
    "cluster/pod_agent.py": "how a pod starts Ray is a line for a shell that KubeRay has written",
}
OPEN_MODES = {0o777, 0o1777, 0o757, 0o747, 0o776}
"""By which others may write, whatever the umask is; files that are opened ask that."""


def offences(tree: ast.Module) -> list[int]:
    """Lines that hand words to a shell, make a temporary name that somebody else could take, or open what they make to
    everybody."""
    return sorted(node.lineno for node in ast.walk(tree) if is_offence(node))


def is_offence(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=attr)) if (module, attr) in CALLS:
            return True
        case ast.keyword(arg="shell", value=ast.Constant(value=True)):
            return True
        case ast.List(elts=[ast.Constant(value=shell), ast.Constant(value="-c"), command, *_]) if shell in SHELLS:
            return not isinstance(command, ast.Constant)
        case ast.Call(func=ast.Attribute(attr="chmod" | "mkdir" | "touch" | "open" | "makedirs")):
            modes = [*node.args, *(each.value for each in node.keywords if each.arg == "mode")]
            return any(isinstance(each, ast.Constant) and each.value in OPEN_MODES for each in modes)
    return False


def test_no_shell_and_nothing_open_to_everybody(sources):
    found = {source.name: lines for source in sources if (lines := offences(source.tree))}
    assert {name: lines for name, lines in found.items() if name not in ALLOWED} == {}


def test_every_way_is_seen():
    text = """
import os, subprocess, tempfile
from pathlib import Path
os.system(f"rm {x}")
subprocess.run(command, shell=True)
subprocess.run(["sh", "-c", f"echo {x}"])
subprocess.run(["/bin/sh", "-c", "exec cat"])
tempfile.mktemp()
Path("x").chmod(0o777)
os.makedirs("x", mode=0o777)
Path("x").mkdir(mode=0o700)
subprocess.run(["ls", name])
"""
    assert offences(ast.parse(text)) == [4, 5, 6, 8, 9, 10]
