"""Credentials have no place in a recipe: stores' clients find them in the environment by themselves.

A recipe is stored, compared, shown and sent to every rank, and so is the index with its URLs. `${VAR}` does not help
there, because the value still becomes part of all of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .problems import Problem, dotted
from .redact import hide_credentials
from .schema import EvalSplit, Recipe

_SECRET_KEY = re.compile(
    r"(^|[-_])(key|secret|token|passw(or)?d|passphrase|credentials?|auth|authorization|cookie|sas|access_?key_?id)"
    r"($|[-_])|connection_string|customer_?key",
    re.IGNORECASE,
)
_TOKEN_WORDS = {"anon", "cloud", "google_default"}
"""Values of gcsfs's `token` that say where credentials come from."""

BY_PROTOCOL = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: storage_options: {profile: NAME}",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the key's file",
    "az": "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "http": "put them into ~/.netrc, and set storage_options: {client_kwargs: {trust_env: true}}",
    "hf": "set HF_TOKEN",
}
_SAME_AS = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "https": "http"}


def no_credentials_in_options(recipe: Recipe) -> Iterator[Problem]:
    """`storage_options` say where and how, the environment says who."""
    for key, source in _sources(recipe):
        for name in _secret_keys(source.storage_options, ""):
            remedy = _remedy(source.paths[0])
            yield Problem(
                f"{key}.storage_options.{name}", "credentials do not belong in a recipe, not as ${VAR} either", remedy
            )
        if source.storage_options and all("://" not in path or path.startswith("file://") for path in source.paths):
            yield Problem(f"{key}.storage_options", "means nothing for local files", "leave it out")


def no_credentials_in_urls(recipe: Recipe) -> Iterator[Problem]:
    """A URL with a password or a signature is a credential."""
    for key, text in _urls(recipe):
        if hide_credentials(text) != text:
            message = "a URL with a password or a signature; credentials do not belong in a recipe"
            yield Problem(key, message, f"write the plain URL; {_remedy(text)}")


def _sources(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    held_out = () if isinstance(recipe.data.eval, EvalSplit) else recipe.data.eval
    for section, sources in (("data.train", recipe.data.train), ("data.eval", held_out)):
        for index, source in enumerate(sources):
            yield f"{section}.{index}", source


def _urls(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model = recipe.model
    named = [
        ("model.path", model.path),
        ("model.tokenizer", model.tokenizer),
        ("model.chat_template", model.chat_template),
    ]
    yield from ((key, text) for key, text in [*named, ("checkpoint.path", recipe.checkpoint.path)] if text)
    for key, source in _sources(recipe):
        yield from ((f"{key}.path", path) for path in source.paths)
        yield from _texts(source.storage_options, f"{key}.storage_options")


def _texts(options: Mapping[str, Any], key: str) -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _texts(value, dotted(key, name))
        elif isinstance(value, str):
            yield dotted(key, name), value


def _secret_keys(options: Mapping[str, Any], key: str) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _secret_keys(value, dotted(key, name))
        elif _SECRET_KEY.search(name) and value not in _TOKEN_WORDS:
            yield dotted(key, name)


def _remedy(url: str) -> str:
    protocol = url.partition("://")[0]
    return BY_PROTOCOL.get(_SAME_AS.get(protocol, protocol), "give them to the store's client through the environment")
