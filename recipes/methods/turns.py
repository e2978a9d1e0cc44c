"""Which turns of a conversation are learned: what the recipe says, and what the row says about its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FLAGS = ("weight", "train", "training")
"""Keys with which a message says whether it is learned (OpenAI's `weight`, axolotl's `train` and `training`)."""


class Turns(NamedTuple):
    """Numbers of messages of the assistant: learned by the recipe's choice and not left out by a flag; left out."""

    learned: tuple[int, ...]
    left_out: tuple[int, ...]


def choose_turns(messages: Sequence[Mapping[str, Any]], train_on: str) -> Turns:
    """`assistant` and `all`: every turn of the assistant; `last_assistant`: the last; `completion`: those after the
    last question. Flags only take away. Raises ValueError for a flag that asks for something else."""
    flags = [_flag(message, number) for number, message in enumerate(messages)]
    answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    for number, flag in enumerate(flags):
        if number not in answers and flag is not None and flag != (train_on == "all"):
            raise ValueError(_not_an_answer(messages[number], number, flag, train_on))
    questions = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    first = {"last_assistant": answers[-1:], "completion": questions[-1:]}.get(train_on) or [0]
    learned = tuple(number for number in answers if number >= first[0] and flags[number] is not False)
    return Turns(learned, tuple(number for number in answers if flags[number] is False))


def _flag(message: Mapping[str, Any], number: int) -> bool | None:
    """What a message says about itself, where one 0 suffices; None: nothing."""
    given = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise ValueError(f"message {number + 1}: {name} is {value!r}; a message is learned (1) or not (0)")
    return all(given.values()) if given else None


def _not_an_answer(message: Mapping[str, Any], number: int, flag: bool, train_on: str) -> str:
    wanted = "be learned" if flag else "not be learned"
    return (
        f"message {number + 1} ({message.get('role')}) says that it shall {wanted}; method.train_on: {train_on} leaves "
        "that choice to the assistant's messages only"
    )
