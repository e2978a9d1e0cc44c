"""YAML 1.2 text to plain data that remembers where every key was written.

Nodes are read here rather than by ruamel.yaml's constructor, because that stops at the first duplicate key, forgets
lines of scalars, and reads more than YAML's core schema (dates, `1_000`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode, SequenceNode

from .problems import Origin, Problem, dotted
from .scalars import core_value
from .variables import substitute

_YAML_TAGS = "tag:yaml.org,2002:"
# Besides the core schema's types, three that ruamel.yaml sees in plain words (dates, <<, =); they are text here.
_SURROGATE = re.compile("[\ud800-\udfff]")
_CORE_TYPES = ("str", "int", "float", "bool", "null", "map", "seq")
_PLAIN_WORDS = ("timestamp", "merge", "value")
_KNOWN_TAGS = {_YAML_TAGS + name for name in _CORE_TYPES + _PLAIN_WORDS}


@dataclass
class Document:
    """Plain data, the origin of every dotted key, what was wrong already, and the values of secret variables."""

    data: Any = None
    origins: dict[str, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)

    def origin(self, key: str) -> Origin | None:
        """Where `key` was written; for a key that was not, where the section was that lacks it."""
        while key not in self.origins and key:
            key = key.rpartition(".")[0]
        return self.origins.get(key)

    def forget(self, key: str) -> None:
        """Drop the origins of a key and all below it, before its value is replaced."""
        for known in [name for name in self.origins if name == key or name.startswith(f"{key}.")]:
            del self.origins[known]

    def adopt(self, other: Document) -> None:
        """Take over origins, problems and secrets of a document whose data became part of this one's."""
        self.origins.update(other.origins)
        self.problems += other.problems
        self.secrets += other.secrets


def read_document(text: str, origin: Origin, *, environ: Mapping[str, str] | None, root: str = "") -> Document:
    """Read one YAML document whose keys lie under `root`. `environ` None leaves `${VAR}` as it is. Mistakes are
    collected in `problems`, a text that is no YAML as well. An origin without a line gives no lines."""
    reader = _Reader(origin, environ)
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except (YAMLError, RecursionError) as error:
        reader.document.problems.append(_not_yaml(error, text, origin, root))
        return reader.document
    if node is not None:
        reader.place(root, node)
        reader.document.data = reader.value(node, root)
    return reader.document


def _not_yaml(error: Exception, text: str, origin: Origin, key: str) -> Problem:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return Problem(key, f"not YAML: {str(error).splitlines()[0]}", origin=origin)
    line, column = error.problem_mark.line, error.problem_mark.column
    about = " ".join(str(part) for part in (error.context, error.problem) if part)
    lines = text.splitlines()
    in_braces = line < len(lines) and "${" in lines[line]
    remedy = 'inside { } and [ ] write "${VAR}" with quotes' if in_braces else ""
    where = f"line {line + 1}, column {column + 1}"
    place = Origin(origin.file, line + 1) if origin.line else origin
    return Problem(key, f"not YAML ({where}): {about}", remedy, place)


class _Reader:
    """Builds the data of one document node by node."""

    def __init__(self, origin: Origin, environ: Mapping[str, str] | None) -> None:
        self.start = origin
        self.environ = environ
        self.document = Document()
        self.open_nodes: set[int] = set()

    def where(self, node: Node) -> Origin:
        return Origin(self.start.file, node.start_mark.line + 1) if self.start.line else self.start

    def place(self, key: str, node: Node) -> None:
        self.document.origins[key] = self.where(node)

    def problem(self, key: str, message: str, remedy: str, node: Node) -> None:
        self.document.problems.append(Problem(key, message, remedy, self.where(node)))

    def value(self, node: Node, key: str) -> Any:
        if id(node) in self.open_nodes:
            self.problem(key, "an alias (*) that contains itself", "write the value out", node)
            return None
        if node.tag not in _KNOWN_TAGS:
            self.problem(key, f"unknown YAML tag {str(node.tag).replace(_YAML_TAGS, '!!')}", "leave the tag out", node)
            return None
        if isinstance(node, ScalarNode):
            return self.scalar(node, key)
        self.open_nodes.add(id(node))
        value = self.sequence(node, key) if isinstance(node, SequenceNode) else self.mapping(node, key)
        self.open_nodes.remove(id(node))
        return value

    def scalar(self, node: ScalarNode, key: str) -> Any:
        text = self.filled(node, key)
        is_text = node.style or (node.tag == f"{_YAML_TAGS}str" and text == node.value)
        if _SURROGATE.search(text):
            self.problem(key, "half a character (a lone surrogate), which no text may contain", "write it whole", node)
            return ""
        return text if is_text else core_value(text)

    def filled(self, node: ScalarNode, key: str) -> str:
        """The text with its variables; as it was when one of them is not set."""
        text: str = node.value
        if self.environ is None or "${" not in text:
            return text
        result = substitute(text, self.environ)
        self.document.secrets += result.secrets
        for name in result.unset:
            remedy = f"set it, or give a default: ${{{name}:-…}}"
            self.problem(key, f"the environment variable {name} is not set", remedy, node)
        return text if result.unset else result.text

    def sequence(self, node: SequenceNode, key: str) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            self.place(dotted(key, index), item)
            items.append(self.value(item, dotted(key, index)))
        return items

    def mapping(self, node: Node, key: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, ScalarNode):
                self.problem(key, "a list or mapping used as a key", "keys are plain words", name_node)
                continue
            name, line = str(name_node.value), name_node.start_mark.line + 1
            child = dotted(key, name)
            if _SURROGATE.search(name):
                self.problem(key, "a key with half a character (a lone surrogate)", "write it whole", name_node)
            elif name == "<<":
                self.problem(child, "merge keys (<<) are not part of YAML 1.2", "write the keys out", name_node)
            elif name in data:
                both = f"on line {lines[name]} and again on line {line}"
                self.problem(child, f"duplicate key: {both}", "keep one of them", name_node)
            else:
                lines[name] = line
                self.place(child, name_node)
                data[name] = self.value(value_node, child)
        return data
