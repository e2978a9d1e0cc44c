"""What a checkpoint does with held-out task rows: its loss, its loss with the prompts exchanged, and what it writes.

Plain transformers on purpose: nothing of ftlaunch reads the checkpoint here. B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .quickstart_data import Row, parses

if TYPE_CHECKING:
    import torch

BATCH_ROWS = 16
MAX_NEW_TOKENS = 64
IGNORED = -100


@dataclass(frozen=True)
class Probe:
    """Losses are means over answer tokens, in nats. `written` are the answers, in the order of the rows."""

    loss: float
    shuffled_loss: float
    written: tuple[str, ...]

    @property
    def parsing_share(self) -> float:
        """Share of the answers that are one Python function."""
        return sum(map(parses, self.written)) / len(self.written)


def probe(checkpoint: str, rows: Sequence[Row], num_written: int) -> Probe:
    """Load a checkpoint folder and try it on `rows`; it answers the first `num_written` of them greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a model this small gains nothing from more, and suffers where cores are shared
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return Probe(
        loss=answer_loss(model, tokenizer, rows),
        shuffled_loss=answer_loss(model, tokenizer, exchange_prompts(rows)),
        written=tuple(write(model, tokenizer, rows[:num_written])),
    )


def exchange_prompts(rows: Sequence[Row]) -> list[Row]:
    """Every answer with the prompt of the next row: a model that reads its prompt must now do worse."""
    prompts = [row["messages"][0] for row in rows]
    rotated = [*prompts[1:], prompts[0]]
    return [{"messages": [prompt, row["messages"][1]]} for prompt, row in zip(rotated, rows, strict=True)]


def answer_loss(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood of the answers' tokens and their end of turn."""
    import torch

    loss_sum, num_targets = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_ROWS):
            input_ids, attention_mask, targets = answer_batch(tokenizer, rows[start : start + BATCH_ROWS])
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss_sum += loss.item()
            num_targets += int((targets[:, 1:] != IGNORED).sum())
    return loss_sum / num_targets


def answer_batch(tokenizer: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, attention mask and targets, each [B, S], padded on the right."""
    import torch

    encoded = [(prompt_ids(tokenizer, row), answer_ids(tokenizer, row)) for row in rows]
    shape = (len(rows), max(len(prompt) + len(answer) for prompt, answer in encoded))
    input_ids, targets = torch.full(shape, tokenizer.pad_token_id), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for b, (prompt, answer) in enumerate(encoded):
        stop = len(prompt) + len(answer)
        input_ids[b, :stop] = torch.tensor(prompt + answer)
        targets[b, len(prompt) : stop] = torch.tensor(answer)
        attention_mask[b, :stop] = 1
    return input_ids, attention_mask, targets


def prompt_text(tokenizer: Any, row: Row) -> str:
    """The question as the chat template renders it, up to where the answer begins."""
    return str(tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True))


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """The question's tokens."""
    return list(tokenizer(prompt_text(tokenizer, row), add_special_tokens=False)["input_ids"])


def answer_ids(tokenizer: Any, row: Row) -> list[int]:
    """The answer's tokens and the end of its turn."""
    answer = row["messages"][1]["content"] + tokenizer.eos_token
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def write(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    """The most likely answer to each question, token by token."""
    import torch

    prompts = [prompt_text(tokenizer, row) for row in rows]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
        )
    answers = tokens[:, batch["input_ids"].shape[1] :]
    return [str(text).strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
