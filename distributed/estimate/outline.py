"""A model as far as memory is concerned: what is trained and what is not, by block, and how wide its layers are.

`plan` makes one from config.json and the headers of the weights, a rank from the model it has built; both give the same
for the same model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

BLOCK = re.compile(r".*?\.\d+\.")
"""What the names of a block's tensors begin with; experts are numbered within."""

CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Keys of config.json, of Gemma, Granite and Cohere (`probes.choose_head` finds out by computing)."""


class Held(NamedTuple):
    """A tensor of the model. `name` as published; `is_table`: of embeddings or of the head; `packed_bytes`: what it
    takes where it is held in 4 bits, else 0."""

    name: str
    shape: tuple[int, ...]
    is_trained: bool
    is_table: bool = False
    packed_bytes: int = 0

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """What is gathered and reduced as one: a block, or all that lies in no block. Elements, but for `packed`: bytes of
    weights in 4 bits; `unpacked` elements of the largest of them."""

    trained: int = 0
    frozen: int = 0
    packed: int = 0
    unpacked: int = 0

    def with_tensor(self, held: Held) -> Unit:
        """And this one."""
        if held.packed_bytes:
            unpacked = max(self.unpacked, held.elements)
            return Unit(self.trained, self.frozen, self.packed + held.packed_bytes, unpacked)
        is_trained, elements = held.is_trained, held.elements
        return Unit(
            self.trained + elements * is_trained, self.frozen + elements * (not is_trained), self.packed, self.unpacked
        )


@dataclass(frozen=True)
class Widths:
    """Sizes of a layer, per token: `hidden` states, `queries` (of `heads` heads) and `keys` of all heads, `inner` units
    of the MLP (of all experts that a token visits), with a gate beside them if `is_gated`; whether the model
    `changes_logits` after the head, so that its own head is used."""

    hidden: int
    queries: int
    keys: int
    inner: int
    is_gated: bool
    vocabulary: int
    heads: int = 1
    changes_logits: bool = False


@dataclass(frozen=True)
class Outline:
    """See above. `layers` counts those with attention, `adapted` sums the inputs of all adapted layers of the model
    (features), `adapter_ranks` their ranks; both 0 without an adapter. `state`: (shape, is table) of what is trained.
    `head`: elements of the head's weight."""

    widths: Widths
    layers: int
    blocks: tuple[Unit, ...]
    rest: Unit
    state: tuple[tuple[tuple[int, ...], bool], ...] = field(repr=False)
    head: int
    is_head_trained: bool
    adapted: int = 0
    adapter_ranks: int = 0

    @property
    def trained(self) -> int:
        """Elements that are trained."""
        return sum(unit.trained for unit in (*self.blocks, self.rest))

    @property
    def frozen(self) -> int:
        """Elements that are not, but for those in 4 bits."""
        return sum(unit.frozen for unit in (*self.blocks, self.rest))

    @property
    def packed(self) -> int:
        """Bytes of weights in 4 bits."""
        return sum(unit.packed for unit in (*self.blocks, self.rest))

    @property
    def largest(self) -> Unit:
        """The block that takes most."""
        return max(self.blocks, key=lambda unit: unit.trained + unit.frozen + unit.packed, default=Unit())


def make_outline(tensors: Iterable[Held], config: Mapping[str, Any]) -> Outline | None:
    """From a model's tensors, an adapter's among them, and its config.json; None where that does not say how many
    layers there are and how wide. Tied tensors come once."""
    all_ = list(tensors)
    shape = config.get("text_config", config)  # multimodal models keep the language model's figures one level down
    layers = _first(shape, "num_hidden_layers", "n_layer")
    if not layers or not _first(shape, "hidden_size", "n_embd"):
        return None
    units: dict[str, Unit] = {}
    for held in all_:
        key = _block_of(held.name)
        units[key] = units.get(key, Unit()).with_tensor(held)
    down = [held for held in all_ if ".lora_A." in held.name or ".lora_embedding_A" in held.name]
    head = _head(all_)
    return Outline(
        widths=_widths(shape, all_),
        layers=layers,
        blocks=tuple(units[key] for key in sorted(units) if key),
        rest=units.get("", Unit()),
        state=tuple(sorted((held.shape, held.is_table) for held in all_ if held.is_trained)),
        head=head.elements if head else 0,
        is_head_trained=head.is_trained if head else False,
        adapted=sum(held.shape[-1] for held in down),
        adapter_ranks=sum(held.shape[0] for held in down),
    )


def _block_of(name: str) -> str:
    """What the names of a block begin with, with or without peft's wrapper; empty for what is in none."""
    found = BLOCK.match(name.removeprefix("base_model.model."))
    return found[0] if found else ""


def _head(tensors: list[Held]) -> Held | None:
    """The largest table: of embeddings and head the one or the other, which are the same where they are tied. A copy
    that is trained whole beside an adapter comes before what it was copied from."""
    tables = [held for held in tensors if held.is_table and len(held.shape) == 2]
    return max(tables, key=lambda held: (held.elements, held.is_trained), default=None)


def _widths(config: Mapping[str, Any], tensors: list[Held]) -> Widths:
    hidden = _first(config, "hidden_size", "n_embd")
    heads = _first(config, "num_attention_heads", "n_head") or 1
    size = _first(config, "head_dim") or hidden // heads
    inner = _first(config, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    return Widths(
        hidden=hidden,
        queries=heads * size,
        keys=(_first(config, "num_key_value_heads") or heads) * size,
        inner=inner * (_first(config, "num_experts_per_tok") or 1),
        is_gated=_is_gated(tensors, hidden, inner),
        vocabulary=_first(config, "vocab_size"),
        heads=heads,
        changes_logits=any(config.get(name) not in (None, 0, 1) for name in CHANGES_LOGITS),
    )


def _is_gated(tensors: list[Held], hidden: int, inner: int) -> bool:
    """Whether the MLP multiplies two things: with gate, up and down it has three times inner units, otherwise two."""
    matrices = [held for held in tensors if len(held.shape) > 1 and ".lora_" not in held.name]
    first = next((_block_of(held.name) for held in matrices if _block_of(held.name)), "")
    sizes = [size for held in matrices if _block_of(held.name) == first for size in held.shape[-2:]]
    return sum(size // inner for size in sizes if size in (inner, 2 * inner) and size != hidden) >= 3


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def with_adapter(outline: Outline, rank: int) -> Outline:
    """The same model, frozen, with low-rank adapters on the linear layers of its blocks: about what `all-linear` means,
    from the matrices that are trained now."""
    matrices = [shape for shape, is_table in outline.state if len(shape) == 2 and not is_table]
    added = [part for rows, columns in matrices for part in ((rank, columns), (rows, rank))]
    each = sum(math.prod(shape) for shape in added) // max(1, len(outline.blocks))
    blocks = tuple(Unit(each, unit.trained + unit.frozen, unit.packed, unit.unpacked) for unit in outline.blocks)
    rest = Unit(0, outline.rest.trained + outline.rest.frozen, outline.rest.packed, outline.rest.unpacked)
    return replace(
        outline,
        blocks=blocks,
        rest=rest,
        state=tuple((shape, False) for shape in added),
        is_head_trained=False,
        adapted=sum(columns for _, columns in matrices),
        adapter_ranks=rank * len(matrices),
    )
