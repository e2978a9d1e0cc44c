"""Recipes as text, and text without secrets."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from .scalars import core_value
from .schema import Recipe

REDACTED = "REDACTED"
"""What a secret is replaced by; letters only, so that even a run's name stays a name."""


_PASSWORD_IN_URL = re.compile(
    r"(?<=://)[^/@\s:'\"]*:[^/@\s'\"]+(?=@)|(?<=http://)[^/@\s'\"]+(?=@)|(?<=https://)[^/@\s'\"]+(?=@)"
)
_SIGNED_URL = re.compile(
    r"(?<=[?&])(X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|AWSAccessKeyId|Signature"
    r"|sig|access_token|token|api_?key)=[^&\s'\"]+",
    re.IGNORECASE,
)


def hide_credentials(text: str) -> str:
    """`text` without the passwords and signatures of the URLs in it."""
    return _SIGNED_URL.sub(lambda found: f"{found[1]}={REDACTED}", _PASSWORD_IN_URL.sub(REDACTED, text))


def redact(text: str, secrets: Sequence[str]) -> str:
    """`text` without any of the secret values, and without passwords and signatures in URLs. Longer ones go first: one
    secret may contain another."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return hide_credentials(text)


def dump_recipe(recipe: Recipe, secrets: Sequence[str] = ()) -> str:
    """The whole recipe, defaults included, as YAML that `load.parse_recipe_text` reads back."""
    stream = io.StringIO()
    _dumper().dump(redact_values(recipe.model_dump(mode="json"), secrets), stream)
    return stream.getvalue()


def dump_as_written(values: Mapping[str, Any], secrets: Sequence[str] = ()) -> str:
    """Keys and values of a recipe, as YAML that `load.load_recipe` reads back: what looks like a variable of the
    environment is none."""
    stream = io.StringIO()
    _dumper().dump(_with_texts(values, lambda text: redact(text, secrets).replace("${", "$${")), stream)
    return stream.getvalue()


def written_values(recipe: Recipe) -> dict[str, Any]:
    """What somebody has written of it, defaults among it: the type of a section is one."""
    return recipe.model_dump(mode="json", exclude_unset=True)


def redact_values(value: Any, secrets: Sequence[str]) -> Any:
    """`redact` for every string within dicts and lists."""
    return _with_texts(value, lambda text: redact(text, secrets))


def _with_texts(value: Any, changed: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _with_texts(item, changed) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_texts(item, changed) for item in value]
    return changed(value) if isinstance(value, str) else value


class _Representer(SafeRepresenter):
    """Plain where that cannot be misread, else double quotes."""


def _text(representer: _Representer, text: str) -> ScalarNode:
    plain = text.isascii() and text.isprintable() and core_value(text) == text
    node: ScalarNode = representer.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')
    return node


_Representer.add_representer(str, _text)


def _dumper() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None, meant as a flag
    yaml.width = 1_000_000  # one line a value, so that diffs of stored recipes are diffs of values
    return yaml
