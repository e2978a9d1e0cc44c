"""`LossModel`: the module that strategies wrap. Its forward turns a batch into per-token losses.

The logits of a whole batch are never held: they are made in chunks of positions that predict something. It has to be
inside the wrapped module because a head that is used outside a wrapped forward sees only its own shard under FSDP2 and
ZeRO-3.

Shapes: B sequences, S tokens, H hidden size, V vocabulary, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..recipes.methods.base import IGNORED
from .linear_loss import linear_losses

LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Device -> bound on the fp32 logits of a chunk. On a CPU, at a vocabulary of 128k, that is 256 positions: from there
on, larger chunks were no faster (2 cores), while 64 of them take half as long again. A GPU, which moves a byte in the
time of some 200 operations, waits for memory at 256: each chunk reads the head, and adds to its gradient in fp32."""


class LossModel(nn.Module):
    """A causal language model with its loss.

    `model` is what carries the parameters: a transformers causal LM, or peft's wrapper around one. `forward(batch)`
    gives losses [B, S] in fp32, 0 where `targets` is `IGNORED`. Other tasks are probes that must run inside a
    wrapped forward too; see `TASKS`.
    """

    def __init__(self, model: nn.Module, causal_lm: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Held in a tuple so that it is not registered a second time beside peft's wrapper.
        self._causal_lm = (causal_lm,)
        self.use_own_head = False
        self.knows_samples = False
        """Whether attention is told where samples start (`varlen.py`)."""
        self._gathering_hooks: frozenset[int] | None = None

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself, without peft's wrapper."""
        return self._causal_lm[0]

    def gathers_head(self, hooks: Iterable[int]) -> None:
        """The strategy gathers the head's parameters for whole forward passes, whatever `hooks` (ids) it has put there.
        A head with hooks that gather is called once a forward pass: how many chunks there are differs from rank to
        rank, and ranks that gather another number of times would wait for each other for ever."""
        self._gathering_hooks = frozenset(hooks)

    def forward(self, batch: Mapping[str, Tensor], task: str = "losses") -> Tensor:
        return TASKS[task](self, batch)


def token_losses(self: LossModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Losses [B, S]."""
    if self.use_own_head:
        return losses_of_logits(own_logits(self, batch), batch["targets"])
    head, vocabulary = self.causal_lm.get_output_embeddings(), self.causal_lm.config.get_text_config().vocab_size
    return chunked_losses(
        hidden_states(self, batch), head, batch["targets"], vocabulary, gathering_hooks=self._gathering_hooks
    )


def hidden_states(self: LossModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The body's output [B, S, H]. Attention per packed sample follows from `position_ids` that restart; left out,
    they count through."""
    output = self.causal_lm.base_model(**_inputs(self, batch))
    hidden: Tensor = output.last_hidden_state
    return hidden


def own_logits(self: LossModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own logits [B, S, V], with whatever it scales or caps after the head."""
    logits: Tensor = self.causal_lm(**_inputs(self, batch)).logits
    return logits


def _inputs(self: LossModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What transformers' models are called with."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}
    if self.knows_samples and "sample_starts" in batch:
        inputs["cu_seq_lens_q"] = batch["sample_starts"]
    return inputs


def own_losses(self: LossModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Losses [B, S] from the model's own logits, to compare with."""
    return losses_of_logits(own_logits(self, batch), batch["targets"])


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [B, S] in fp32."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    # FSDP2 hooks the output, and a view may lose its hook.
    return losses.view_as(targets).clone()


def chunked_losses(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    vocabulary: int,
    logits_bytes: int | None = None,
    gathering_hooks: Set[int] | None = None,
) -> Tensor:
    """Cross-entropy [B, S] of `head(hidden)`, holding logits of `logits_bytes` at once (None: of the device's
    `LOGITS_BYTES`); all of them where a head that is more than a matrix has hooks that gather it."""
    rows = max(1, (logits_bytes or LOGITS_BYTES[hidden.device.type]) // (4 * vocabulary))
    if _is_only_a_matrix(head, gathering_hooks or frozenset()):
        return linear_losses(hidden, head.weight, targets, rows)
    if gathering_hooks is not None:
        rows = targets.numel()
    return _losses_through_head(hidden, head, targets, rows)


def _is_only_a_matrix(head: nn.Module, gathering_hooks: Set[int]) -> TypeGuard[nn.Linear]:
    """Whether its weight says all about a head: no bias, no adapter, and no hook but those that gather it."""
    parameters = [name for name, _ in head.named_parameters()]
    hooks = {*head._forward_pre_hooks, *head._forward_hooks} - gathering_hooks
    return type(head) is nn.Linear and parameters == ["weight"] and not hooks


def _losses_through_head(hidden: Tensor, head: nn.Module, targets: Tensor, rows: int) -> Tensor:
    """The same for any head; with more than one chunk, logits are made a second time in the backward pass."""
    positions = (targets != IGNORED).nonzero(as_tuple=True)
    supervised, labels = hidden[positions], targets[positions]
    if len(labels) <= rows:
        losses = _chunk_losses(supervised, head, labels)
    else:
        chunks = zip(torch.split(supervised, rows), torch.split(labels, rows), strict=True)
        losses = torch.cat(
            [checkpoint(_chunk_losses, part, head, label, use_reentrant=False) for part, label in chunks]
        )
    return losses.new_zeros(targets.shape).index_put(positions, losses)


def _chunk_losses(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="none")


TASKS = {
    "losses": token_losses,
    "hidden_states": hidden_states,
    "own_losses": own_losses,
    "own_logits": own_logits,
}
