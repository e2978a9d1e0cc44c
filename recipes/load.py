"""From a YAML file to a `Recipe`: overrides, variables, cluster profiles, and every mistake at once.

Relative paths inside a recipe (model, data, tokenizer, chat template, checkpoint) stay as written and are relative
to the current directory of the command, as in a shell, not to the recipe's file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .checks import Rule, advice, run_checks
from .document import Document, read_document
from .errors import UserError
from .explain import explain
from .overrides import apply_override, parse_overrides, set_value
from .problems import Origin, Problem, RecipeError, dotted
from .profiles import read_profile
from .redact import REDACTED, dump_recipe
from .schema import Recipe
from .schema_cluster import ClusterConfig

_EXACT_WHOLE_FLOATS = 2.0**53


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe. `path` is the file as given; `warnings` is advice to print; `secrets` are the values of
    variables that must not be shown (`redact.py`)."""

    recipe: Recipe
    path: str
    warnings: tuple[str, ...]
    secrets: tuple[str, ...]
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """Where each dotted key was written."""


@dataclass(frozen=True)
class _Command:
    """What the command line says besides overrides."""

    path: Path
    environ: Mapping[str, str]
    nodes: int | None
    gpus_per_node: int | None
    cluster: str | None
    without: Collection[Rule] = ()


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str],
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    cluster: str | None = None,
    without: Collection[Rule] = (),
) -> LoadedRecipe:
    """Read and check a recipe file.

    `overrides` are `key.sub=value` texts, laid over the file (and over its cluster profile) in their order;
    `cluster` names a profile; `nodes` and `gpus_per_node` come last. `environ` fills `${VAR}`. `without`: rules of
    `checks` whose findings the command has another answer to.
    Raises RecipeError, a UserError, with every problem; UserError for a file that cannot be read.
    """
    document = read_document(_read(Path(path)), Origin(str(path), 1), environ=environ)
    command = _Command(Path(path), environ, nodes, gpus_per_node, cluster, without)
    return _laid_over(document, str(path), overrides, command)


def load_stored_recipe(
    text: str,
    file: str,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str],
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    cluster: str | None = None,
) -> LoadedRecipe:
    """`load_recipe` of what a run keeps (`file` names it in errors), which is plain but for its overrides. Raises
    RecipeError as there, and for secrets that a run does not keep."""
    document = read_document(text, Origin(file, 1), environ=None)
    command = _Command(Path(file), environ, nodes, gpus_per_node, cluster)
    loaded = _laid_over(document, file, overrides, command)
    hidden = [key for key, value in _texts(loaded.recipe.model_dump(mode="json")) if REDACTED in value]
    if hidden:
        again = "say it again as in the recipe's own file, KEY='${VARIABLE}', or run that file"
        raise RecipeError(file, [Problem(key, "holds a secret, which a run does not keep", again) for key in hidden])
    return loaded


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all texts."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, dotted(key, str(name)))


def _laid_over(document: Document, path: str, overrides: Sequence[str], command: _Command) -> LoadedRecipe:
    if document.data is None and document.problems:
        raise RecipeError(path, document.problems)
    if not isinstance(document.data, dict):
        message = "not a recipe: expected keys and values at the top level (model: …, data: …)"
        raise RecipeError(path, [Problem("", message, origin=Origin(path, 1))])
    _lay_over(document, overrides, command)
    document.data.setdefault("name", _name_of(command.path))
    return _validate(document, path, command.without)


def parse_recipe_text(text: str, file: str = "stored recipe") -> Recipe:
    """Read back what `redact.dump_recipe` wrote; `${…}` is plain text here. Raises RecipeError."""
    document = read_document(text, Origin(file, 1), environ=None)
    recipe, invalid = _recipe_of(document.data)
    if document.problems or recipe is None:
        raise _error(document, file, document.problems or invalid)
    return recipe


def load_cluster(name: str, folder: Path, environ: Mapping[str, str]) -> ClusterConfig:
    """The cluster of a profile, by itself; `folder` is where a recipe would be. Raises RecipeError."""
    document = read_profile(name, folder / "recipe.yaml", environ)
    if document.problems or document.data is None:
        raise _error(document, name, document.problems)
    try:
        config: ClusterConfig = TypeAdapter(ClusterConfig).validate_json(_json(document.data), strict=True)
    except ValidationError as error:
        said = [problem for problem in explain({"cluster": document.data}) if problem.key.startswith("cluster")]
        raise _error(document, name, said or list(_pydantic_says(error))) from error
    return config


def as_stored(loaded: LoadedRecipe) -> Recipe:
    """The recipe as it comes back from a run directory, secrets redacted: what `compare` wants."""
    return parse_recipe_text(dump_recipe(loaded.recipe, loaded.secrets))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start}): recipes are YAML text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _name_of(path: Path) -> str:
    """The file's name, with what a run's name may not contain made into dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:80] or "run"


def _lay_over(document: Document, overrides: Sequence[str], command: _Command) -> None:
    """Overrides of the whole cluster go first, so that those of its keys reach into the profile it names."""
    parsed = parse_overrides(overrides, document)
    for override in parsed:
        if override.key == "cluster":
            apply_override(document, override, command.environ)
    if command.cluster is not None:
        set_value(document, "cluster", command.cluster)
    _expand_cluster(document, command)
    for override in parsed:
        if override.key != "cluster":
            apply_override(document, override, command.environ)
    for key, value in (("nodes", command.nodes), ("gpus_per_node", command.gpus_per_node)):
        if value is not None:
            set_value(document, f"cluster.{key}", value)


def _expand_cluster(document: Document, command: _Command) -> None:
    """Put a profile's section in place of its name; one that cannot be read is taken out, its problem stays."""
    name = document.data.get("cluster")
    if not isinstance(name, str):
        return
    profile = read_profile(name, command.path, command.environ)
    named_at = document.origin("cluster")
    profile.problems = [replace(problem, origin=problem.origin or named_at) for problem in profile.problems]
    document.adopt(profile)
    document.data["cluster"] = profile.data
    if profile.data is None and profile.problems:
        del document.data["cluster"]


def _validate(document: Document, path: str, without: Collection[Rule]) -> LoadedRecipe:
    recipe, invalid = _recipe_of(document.data)
    told = {problem.key for problem in document.problems}
    problems = [*document.problems, *(problem for problem in invalid if problem.key not in told)]
    broken = {problem.key.partition(".")[0] for problem in problems}
    problems += run_checks(recipe or _valid_part(document.data, broken), broken, without)
    if problems or recipe is None:
        raise _error(document, path, problems)
    warnings = tuple(str(_placed(document, problem).redacted(document.secrets)) for problem in advice(recipe))
    return LoadedRecipe(recipe, path, warnings, tuple(dict.fromkeys(document.secrets)), document.origins)


def _recipe_of(data: Any) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or what is wrong with it."""
    try:
        return Recipe.model_validate_json(_json(data), strict=True), []
    except ValidationError as error:
        return None, list(explain(data)) or list(_pydantic_says(error))


def _valid_part(data: dict[str, Any], broken: Set[str]) -> Recipe:
    """The sections without problems; others are not there or have their defaults, and must not be read."""
    types = get_type_hints(Recipe, include_extras=True)
    sections = {
        name: TypeAdapter(types[name]).validate_json(_json(data[name]), strict=True)
        for name in types
        if name in data and name not in broken
    }
    return Recipe.model_construct(**sections)


def _error(document: Document, path: str, problems: Sequence[Problem]) -> RecipeError:
    return RecipeError(path, [_placed(document, problem).redacted(document.secrets) for problem in problems])


def _placed(document: Document, problem: Problem) -> Problem:
    return replace(problem, origin=problem.origin or document.origin(problem.key))


def _pydantic_says(error: ValidationError) -> Iterator[Problem]:
    """What pydantic alone knows (a rule that JSON Schema cannot say)."""
    for detail in error.errors(include_url=False):
        yield Problem(".".join(str(part) for part in detail["loc"]), detail["msg"])


def _json(data: Any) -> str:
    """Strict validation reads JSON, where a list may be a tuple; whole floats (1e9) become the integers they are."""
    return json.dumps(_whole(data))


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_WHOLE_FLOATS:
        return int(value)
    return value
