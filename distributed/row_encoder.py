"""A row as the method learns from it. No torch: readers, which are processes of their own, use it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..recipes.errors import UserError
from ..recipes.methods.base import Method, Rejected, Row, Sample
from ..recipes.methods.table import build_method
from ..recipes.schema import MethodConfig, Recipe, RowFormat
from .data.template import TextEncoder, load_tokenizer
from .model_files import ModelFolder, template_text


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is made of. `tokenizer`: where it lies; `chat_template`: the text of one that replaces its own,
    `chat_template_kwargs`: its variables; `now`: the date for templates that print one; `vocabulary`: tokens that the
    model knows, None where its configuration does not say."""

    method: MethodConfig
    tokenizer: str
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any]
    now: datetime
    vocabulary: int | None


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows. Pickled, it is its spec: tokenizers are loaded again where they are needed."""

    spec: EncoderSpec
    method: Method
    tokenizer: TextEncoder

    def __reduce__(self) -> tuple[Any, tuple[EncoderSpec]]:
        return open_encoder, (self.spec,)

    def __call__(self, row: Row, row_format: RowFormat) -> Sample | Rejected:
        """Encode one row. Raises UserError for a token that the model has no embedding of: some tokenizers hold a few
        more, so only those in use matter; ValueError for a row that is malformed."""
        encoded = self.method.encode(row, row_format, self.tokenizer)
        if isinstance(encoded, Sample) and self.spec.vocabulary is not None:
            largest = int(encoded.input_ids.max(initial=0))
            if largest >= self.spec.vocabulary:
                raise UserError(
                    f"model.tokenizer: token {largest} ({self.tokenizer.decode([largest])!r}) is in the data, and the "
                    f"model knows {self.spec.vocabulary} tokens (vocab_size in config.json). Take its own tokenizer."
                )
        return encoded


def spec_of(recipe: Recipe, folder: ModelFolder, *, now: datetime) -> EncoderSpec:
    """The recipe's, for a model that lies in `folder`."""
    template = recipe.model.chat_template
    return EncoderSpec(
        method=recipe.method,
        tokenizer=recipe.model.tokenizer or folder.url,
        chat_template=None if template is None else template_text(template),
        chat_template_kwargs=recipe.model.chat_template_kwargs,
        now=now,
        vocabulary=folder.config.get("text_config", folder.config).get("vocab_size"),
    )


def open_encoder(spec: EncoderSpec) -> RowEncoder:
    """Load the tokenizer. Raises UserError."""
    tokenizer = load_tokenizer(
        spec.tokenizer, None, spec.chat_template, now=spec.now, variables=spec.chat_template_kwargs
    )
    found = replace(spec, tokenizer=tokenizer.where)  # readers need not ask a hub again
    return RowEncoder(found, build_method(spec.method), tokenizer)
