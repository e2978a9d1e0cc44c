"""Checks on the real model before the first step: is our loss the model's loss, and do packed samples stay apart?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from ..recipes.methods.base import IGNORED, Batch
from .batch import on_device
from .group import Group
from .initialise import keyed_seed
from .loss_model import LossModel

LENGTH = 32
HEAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative. Two orders above the rounding of each dtype (2^-24, 2^-8 with cancellation over a hidden dimension), two
below what a cap or a scale changes: that is of the order of the losses themselves."""

AMPLIFICATION = 64.0
"""The head's input is scaled by this while losses are compared: a cap on the logits does nothing yet in a model that
starts from small random weights, and would set in later. A power of two, so that it costs no precision."""

ATTENTION_TOLERANCE = 5e-2
"""Relative, of norms: kernels round otherwise in each layer, to 2^-8 in bfloat16; a wrong scale or a missing cap moves
hidden states by their own size."""

LEAK_TOLERANCE = 1e-5
"""Relative, in any dtype: masked positions contribute exact zeros, so the very same numbers are expected."""


def choose_head(module: nn.Module, loss_model: LossModel, group: Group, vocabulary: int, dtype: str) -> str | None:
    """Compare the chunked loss with the loss of the model's own logits; on a mismatch (some families scale or cap
    logits after the head) the model's own head is used. Returns what to tell the user."""
    input_ids = torch.randint(vocabulary, (2, LENGTH), generator=_generator())
    batch = _batch(input_ids, torch.arange(LENGTH).expand(2, -1), input_ids.roll(-1, 1), group)
    module.eval()
    head = loss_model.causal_lm.get_output_embeddings()
    with torch.no_grad(), head.register_forward_pre_hook(lambda _head, inputs: (inputs[0] * AMPLIFICATION,)):
        difference = _relative_difference(module(batch), module(batch, "own_losses"))
    worst = max(group.peers.gather(difference))
    if worst <= HEAD_TOLERANCE[dtype]:
        return None
    loss_model.use_own_head = True
    return (
        f"This model changes its logits after the head (relative difference {worst:.1e}); its own head is used, which "
        "holds the logits of a whole micro-batch in memory."
    )


def check_positions(causal_lm: Any, most: int | None, sequence_length: int) -> str | None:
    """Compare `data.sequence_length` with the positions that the model was made for (`most`); what to tell the user.

    Rotary positions go on beyond that, badly. Raises UserError for positions in a table, which end.
    """
    if most is None or sequence_length <= most:
        return None
    text = f"data.sequence_length {sequence_length} is above the {most} positions of this model"
    tables = [module for module in causal_lm.modules() if isinstance(module, nn.Embedding)]
    tables = [table for table in tables if table is not causal_lm.get_input_embeddings()]
    if any(most <= table.num_embeddings <= most + 2 for table in tables):  # some families keep two rows for padding
        raise UserError(f"{text} (max_position_embeddings in config.json): it has no embeddings of more. Lower it.")
    return f"{text} (max_position_embeddings in config.json): quality suffers beyond, unless rope scaling covers it."


def choose_attention(module: nn.Module, loss_model: LossModel, group: Group, sequence_length: int) -> str | None:
    """Let packed samples be attended to by torch's variable-length attention where that serves: samples do not see each
    other, and hidden states are those of sdpa. Returns what to tell the user. Collective."""
    from . import varlen  # brings transformers' models along, which come with the model otherwise

    causal_lm, device = loss_model.causal_lm, group.world.device
    if not varlen.may_serve(causal_lm, device, sequence_length):
        return None
    expected = _hidden_of_samples(module, loss_model, group)
    varlen.register()
    causal_lm.set_attn_implementation(varlen.NAME)
    loss_model.knows_samples = True
    refusals = group.peers.gather(_refusal(module, loss_model, group, expected))
    refusal = next(filter(None, refusals), None)
    if refusal is None:
        vocabulary = causal_lm.config.get_text_config().vocab_size
        refusal = (
            "packed samples see each other" if _leak(module, group, vocabulary, sequences=2) > LEAK_TOLERANCE else None
        )
    if refusal is None:
        return None
    causal_lm.set_attn_implementation("sdpa")
    loss_model.knows_samples = False
    return f"torch's variable-length attention does not serve this model ({refusal}); sdpa with masks is used."


def _refusal(module: nn.Module, loss_model: LossModel, group: Group, expected: Tensor) -> str | None:
    """Why this rank cannot use the attention that is set, for training too; None: it can."""
    try:
        difference = float((_hidden_of_samples(module, loss_model, group) - expected).norm() / expected.norm())
        _hidden_of_samples(module, loss_model, group, training=True)  # models may drop out attention only there
    except (TypeError, ValueError, RuntimeError) as error:  # a model that passes on less, or asks for more
        return str(error)
    return f"hidden states differ by {difference:.1e}" if difference > ATTENTION_TOLERANCE else None


def _hidden_of_samples(module: nn.Module, loss_model: LossModel, group: Group, *, training: bool = False) -> Tensor:
    """Hidden states of two sequences, of three samples and of one."""
    vocabulary = loss_model.causal_lm.config.get_text_config().vocab_size
    input_ids = torch.randint(vocabulary, (2, LENGTH), generator=_generator())
    several = torch.cat([torch.arange(length) for length in (5, LENGTH - 12, 7)])
    batch = _batch(input_ids, torch.stack([several, torch.arange(LENGTH)]), torch.full_like(input_ids, IGNORED), group)
    module.train(training)
    with torch.no_grad():
        hidden: Tensor = module(batch, "hidden_states").float()
    return hidden


def check_packing(
    module: nn.Module, group: Group, vocabulary: int, model_type: str, *, micro_batch_size: int = 1
) -> None:
    """Refuse packing for models whose samples see each other.

    What sample B becomes must not change when the sample packed before it does. No influence forward means no
    gradient backward, and a forward pass is all that this takes under every strategy. Raises UserError.
    """
    worst = _leak(module, group, vocabulary, sequences=min(2, micro_batch_size))
    if worst <= LEAK_TOLERANCE:
        return
    # transformers' flash_attention_2 reads packing from position ids in batches of one sequence only (5.23).
    alone = micro_batch_size > 1 and _leak(module, group, vocabulary, sequences=1) <= LEAK_TOLERANCE
    raise UserError(
        f"data.packing: in models of type {model_type!r} packed samples see each other (relative difference "
        f"{worst:.1e}), so that they would be trained on something else than you wrote. Set data.packing: false"
        + (", or train.micro_batch_size: 1, or model.attention: sdpa." if alone else ".")
    )


def _leak(module: nn.Module, group: Group, vocabulary: int, *, sequences: int) -> float:
    """What the first of two packed samples changes in the second, in batches of this many sequences; collective."""
    generator = _generator()
    first, other, second = (torch.randint(vocabulary, (LENGTH,), generator=generator) for _ in range(3))
    module.eval()
    with torch.no_grad():
        one, two = (_second_half(module, torch.cat([before, second]), group, sequences) for before in (first, other))
    worst: float = max(group.peers.gather(_relative_difference(one, two)))
    return worst


def _second_half(module: nn.Module, input_ids: Tensor, group: Group, sequences: int) -> Tensor:
    rows = input_ids.repeat(sequences, 1)
    batch = _batch(rows, torch.arange(LENGTH).repeat(sequences, 2), torch.full_like(rows, IGNORED), group)
    hidden: Tensor = module(batch, "hidden_states")
    return hidden[:, LENGTH:]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(keyed_seed("probe"))


def _batch(input_ids: Tensor, position_ids: Tensor, targets: Tensor, group: Group) -> dict[str, Tensor]:
    batch = Batch(input_ids.numpy(), position_ids.numpy(), targets.numpy(), rows=(), num_tokens=input_ids.numel())
    return on_device(batch, group.world.device)


def _relative_difference(a: Tensor, b: Tensor) -> float:
    scale = float(b.float().abs().max())
    return float((a.float() - b.float()).abs().max()) / scale if scale else 0.0
