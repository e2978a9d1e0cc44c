"""What a forward pass keeps for the backward pass, and what the loss takes: bytes on one rank.

Counted from what autograd saves in transformers' decoder layers (5.x: RMSNorm in fp32, rotary embeddings, sdpa or
variable-length attention, an MLP with or without a gate), of which the well-known 34 bytes per token and hidden unit
(Korthikanti et al. 2022, arXiv:2205.05198, equation 1) are the special case of GPT-2's sizes. Families that keep more
(state-space layers, routers) are estimated too low.

Shapes: B sequences of S tokens, H hidden units, Q and K units of queries and of keys, I inner units of the MLP, V
vocabulary; w bytes of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...recipes.schema import Recipe
from .outline import Outline, Widths
from .setting import BYTES, Setting

FP32 = 4
LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""As `loss_model.LOGITS_BYTES`: fp32 logits of a chunk."""


@dataclass(frozen=True)
class Activations:
    """`saved` by all layers when the forward pass ends; `work`: besides, of the layer in whose backward pass the rank
    is; `loss`: besides, while the loss is made."""

    saved: int
    work: int
    loss: int


def activations(recipe: Recipe, outline: Outline, setting: Setting) -> Activations:
    """Of one micro-batch."""
    width = BYTES[recipe.model.dtype]
    tokens = recipe.train.micro_batch_size * recipe.data.sequence_length
    layer = tokens * _layer(recipe, outline, setting, width)
    between = tokens * width * outline.widths.hidden
    outside = tokens * _norm(width, outline.widths.hidden, is_trained=recipe.adapter is None) + between
    outside += _masks(recipe, setting)
    again = layer if recipe.train.activation_checkpointing else 0
    kept = between if recipe.train.activation_checkpointing else layer
    return Activations(
        saved=ceil(outline.layers * kept + outside),
        work=ceil(again + tokens * _work(outline.widths, width)),
        loss=_loss(outline, setting, tokens, width),
    )


def _layer(recipe: Recipe, outline: Outline, setting: Setting, width: int) -> float:
    """Saved per token by one layer."""
    widths, adapter = outline.widths, recipe.adapter
    norms = 2 * _norm(width, widths.hidden, is_trained=adapter is None)
    attention = width * (2 * widths.queries + _keys_and_values(recipe, widths, setting))
    mlp = 2 * width * widths.inner * (2 if widths.is_gated else 1)
    adapted = width * outline.adapter_ranks / outline.layers
    if adapter is not None and adapter.dropout:
        adapted += (width + 1) * outline.adapted / outline.layers  # what was dropped, and where
    return norms + attention + mlp + adapted + _pairs(recipe, widths, setting, width)


def _norm(width: int, hidden: int, *, is_trained: bool) -> int:
    """RMSNorm's input in fp32, what its weight is multiplied with, and its output."""
    return (FP32 + width * is_trained + width) * hidden


def _keys_and_values(recipe: Recipe, widths: Widths, setting: Setting) -> int:
    """Under sdpa with masks transformers repeats them, one for each head of the queries."""
    return 2 * (widths.queries if uses_masks(recipe, setting) else widths.keys)


def uses_masks(recipe: Recipe, setting: Setting) -> bool:
    """Whether packed samples are kept apart by masks over all pairs of positions."""
    attention, is_half = recipe.model.attention, recipe.model.dtype == "bfloat16"
    is_variable = setting.device == "cuda" and is_half and attention == "auto"
    return recipe.data.packing and not is_variable and attention != "flash_attention_2"


def _pairs(recipe: Recipe, widths: Widths, setting: Setting, width: int) -> int:
    """Per token, of what attention saves of all pairs: under sdpa the mask in the queries' dtype; eagerly scores of all
    heads, in fp32 and in that dtype."""
    if recipe.model.attention == "eager":
        return (FP32 + width) * widths.heads * recipe.data.sequence_length
    return width * recipe.data.sequence_length if uses_masks(recipe, setting) else 0


def _masks(recipe: Recipe, setting: Setting) -> int:
    """The mask that all layers share, a byte a pair."""
    pairs = recipe.train.micro_batch_size * recipe.data.sequence_length**2
    return pairs if uses_masks(recipe, setting) else 0


def _work(widths: Widths, width: int) -> int:
    """Per token: gradients of the MLP's inner units and of the residual stream."""
    return width * (2 * widths.inner + 2 * widths.hidden)


def _loss(outline: Outline, setting: Setting, tokens: int, width: int) -> int:
    """Fused linear cross-entropy: gradients of hidden states and head, and a chunk of logits in both dtypes. The head's
    is summed up in fp32 of products in the compute dtype, which a CPU casts first. A model that changes its logits
    has them all: as they were and as they become, in fp32 too, and their logarithms."""
    if outline.widths.changes_logits:
        return tokens * outline.widths.vocabulary * (2 * FP32 + 3 * width)
    rows = min(tokens, max(1, LOGITS_BYTES[setting.device] // (FP32 * outline.widths.vocabulary)))
    is_half = width < FP32
    chunk = rows * outline.widths.vocabulary * (FP32 + 2 * width * is_half)
    hidden = 3 * tokens * width * outline.widths.hidden
    of_head = FP32 + is_half * (width + FP32 * (setting.device == "cpu"))
    return chunk + hidden + of_head * outline.head * outline.is_head_trained
