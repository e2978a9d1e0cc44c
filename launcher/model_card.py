"""README.md of an exported model: what it was made from, how, and how well it does. Pure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML

from ..distributed.model_files import is_hub_id
from ..recipes.naming import source_names
from ..recipes.redact import hide_credentials
from ..recipes.schema import Recipe, Source
from . import units
from .record import Counts, Record, before_and_after

PACKAGES = ("ftlaunch", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "tokenizers", "safetensors")
"""Whose versions are worth knowing."""

HUB = "hub:"


@dataclass(frozen=True)
class CardFacts:
    """What a card says. `base`: the model that was trained from; `license`: its licence, as its own card or config.json
    names it; `recipe_text`: as the run keeps it, without secrets; `record`: the run's, up to `step`; `data_digest`:
    tells which files were read, in which order."""

    title: str
    step: int | None
    base: str | None
    license: str | None
    kind: str
    """"full", "adapter" or "merged"."""
    dtype: str
    recipe: Recipe | None = None
    recipe_text: str = ""
    record: Record = field(default_factory=lambda: Record({}))
    data_digest: str = ""


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block at the beginning of a card; empty where there is none."""
    begin, _, rest = text.partition("---\n")
    block, end, _ = rest.partition("\n---")
    if begin.strip() or not end:
        return {}
    try:
        found = YAML(typ="safe", pure=True).load(block)
    except Exception:  # somebody else's card: no licence is read from what is no YAML
        return {}
    return found if isinstance(found, dict) else {}


def license_of(card: str, config: Mapping[str, Any]) -> str | None:
    """The licence that a base model's card or config.json names."""
    given = front_matter(card).get("license") or config.get("license")
    return given if isinstance(given, str) else None


def model_card(facts: CardFacts) -> str:
    """The whole file."""
    sections = [_what_it_is(facts), _use(facts), _losses(facts.record), _data(facts), _recipe(facts), _versions(facts)]
    body = "\n\n".join(section for section in sections if section)
    return hide_credentials(f"---\n{_front(facts)}---\n\n# {facts.title}\n\n{body}\n")


def _front(facts: CardFacts) -> str:
    method = [] if facts.recipe is None else [facts.recipe.method.type]
    adapter = [] if facts.recipe is None or facts.recipe.adapter is None else [facts.recipe.adapter.type]
    entries = {
        # A hub refuses a card that names as base what is no model of its own.
        "base_model": facts.base if facts.base and is_hub_id(facts.base) else None,
        "license": facts.license,
        "library_name": "peft" if facts.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ftlaunch", *method, *adapter],
        "datasets": sorted({name for source in _sources(facts) for name in _hub_names(source)}),
    }
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None, meant as a flag
    yaml.dump({key: value for key, value in entries.items() if value}, stream)
    return stream.getvalue()


def _hub_names(source: Source) -> list[str]:
    return [path.removeprefix(HUB).partition("@")[0] for path in source.paths if path.startswith(HUB)]


def _sources(facts: CardFacts) -> Sequence[Source]:
    return () if facts.recipe is None else facts.recipe.data.train


KINDS = {
    "full": "A fine-tuned version of",
    "adapter": "An adapter for",
    "merged": "Fine-tuned with an adapter, which is merged into the weights, from",
}


def _what_it_is(facts: CardFacts) -> str:
    after = "" if facts.step is None else f", after {facts.step} optimizer steps"
    tokens = f" on {units.count(facts.record.tokens)} tokens" if facts.record.tokens else ""
    lines = [f"{KINDS[facts.kind]} `{facts.base or 'an unknown base'}`{after}{tokens}. Weights in {facts.dtype}."]
    if facts.license is None:
        lines.append("The licence of the base model was not found beside it: see its own page before you share this.")
    if facts.kind == "merged" and facts.recipe and facts.recipe.adapter and facts.recipe.adapter.type == "qlora":
        lines.append(
            "The adapter was trained on a base held in 4 bits and merged into the base as published, so that answers "
            "differ a little from those in training."
        )
    return "\n".join(lines)


def _use(facts: CardFacts) -> str:
    imports, opener = WHOLE_IMPORTS, "AutoModelForCausalLM"
    if facts.kind == "adapter":
        imports, opener = ADAPTER_IMPORTS, "AutoPeftModelForCausalLM"
    lines = [
        "```python",
        *imports,
        "",
        f'model = {opener}.from_pretrained(FOLDER, dtype="auto")',
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "```",
    ]
    return "\n".join(lines)


WHOLE_IMPORTS: tuple[str, ...] = ("from transformers import AutoModelForCausalLM, AutoTokenizer",)
ADAPTER_IMPORTS: tuple[str, ...] = (
    "from peft import AutoPeftModelForCausalLM",
    "from transformers import AutoTokenizer",
)


def _losses(record: Record) -> str:
    losses = before_and_after(record)
    if not losses:
        return ""
    first, last = record.evaluations[0].step, record.evaluations[-1].step
    if first == last:
        rows = [f"| {_cell(name)} | {after:.4f} |" for name, (_, after) in losses.items()]
        return "\n".join(["## Evaluation", "", f"| held-out loss | at step {last} |", "|---|---|", *rows])
    rows = [f"| {_cell(name)} | {before:.4f} | {after:.4f} |" for name, (before, after) in losses.items()]
    head = f"| held-out loss | at step {first} | at step {last} |"
    return "\n".join(["## Evaluation", "", head, "|---|---|---|", *rows])


def _data(facts: CardFacts) -> str:
    sources = _sources(facts)
    if not sources:
        return ""
    named = zip(source_names(sources), sources, strict=True)
    counted = [(name, source, facts.record.data.get(name, Counts())) for name, source in named]
    rows = [
        f"| {_cell(name)} | `{_cell(', '.join(source.paths))}` | {counts.rows:,} | {counts.tokens:,} |"
        for name, source, counts in counted
    ]
    head = ["## Data", "", "| source | where | rows read | tokens |", "|---|---|---|---|"]
    digest = ["", f"Files and their order: `{facts.data_digest}`."] if facts.data_digest else []
    return "\n".join([*head, *rows, *digest])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _recipe(facts: CardFacts) -> str:
    if not facts.recipe_text:
        return ""
    text = facts.recipe_text.rstrip()
    return f"## Recipe\n\nFor ftlaunch; secrets are left out.\n\n```yaml\n{text}\n```"


def _versions(facts: CardFacts) -> str:
    installed = facts.record.environment.get("packages", {})
    found = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    if not found:
        return ""
    return f"## Versions\n\nPython {facts.record.environment.get('python', '')}, {', '.join(found)}."
