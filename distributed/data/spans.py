"""What the assistant wrote in a rendered conversation: by character, end-of-turn tokens included.

A template with `{% generation %}` blocks says it itself. For any other the definition is what happens when the model is
used: a turn is what follows the prompt that the template makes of the messages before it. So the messages before the
turn are rendered with the generation prompt, and those up to the turn without, which shows how it ends: two renderings
a turn, one for the last.

A conversation stays one sample, and what is supervised is what the whole conversation's rendering holds. Templates that
drop the thinking of earlier turns (Qwen3, DeepSeek) therefore teach those turns without it, as a model sees them in its
history; `train_on: last_assistant` or `completion` supervises only what is rendered as it was written. Cutting such a
conversation into several samples would make rows count more the longer they are, and cost the square of their turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from ...recipes.errors import UserError
from .chat import ChatTemplate, Message, Span, readable

EXCERPT_CHARACTERS = 60

HEAD_CHARACTERS = 4
"""Characters by which the place is found where two renderings of a turn become the same; no turn's end is shorter."""

TAG = re.compile(r"<[^<>]*>")
LAST_TAG = re.compile(r"<[^<>]*>\s*\Z")
ONLY_TAGS = re.compile(r"(\s|<[^<>]*>|\[[^\[\]]*\])*")
OPEN_TAG = re.compile(r"[<\[][^>\]]*\Z")
"""The beginning of a tag: two texts that part inside one have that much in common by chance."""


class Conversation:
    """One conversation under one template; each of its beginnings is rendered once."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> None:
        self._template = template
        self._messages = [readable(message) for message in messages]
        self._given = (tools, documents)
        self._beginnings: dict[tuple[int, bool], str] = {}
        self._turns: dict[int, Span] = {}

    @cached_property
    def _whole(self) -> tuple[str, list[Span]]:
        return self._template.render_marked(self._messages, *self._given)

    @property
    def text(self) -> str:
        """The whole conversation. Raises ValueError where the template refuses it."""
        return self._whole[0]

    @property
    def says_spans(self) -> bool:
        """Whether the spans are the template's own word, to the character."""
        return self._template.marks_answers

    def spans(self, turns: Iterable[int]) -> list[Span]:
        """What the assistant wrote in these turns (numbers of messages), in order.

        Raises UserError, with the difference, for a template that renders a conversation's beginning otherwise than
        the whole, so that this cannot be told."""
        if self.says_spans:
            return [span for number in turns for span in self._marked(number)]
        return [self._turn(number) for number in turns]

    def _marked(self, number: int) -> list[Span]:
        """The blocks of one turn: those before the next turn that are not before this one."""
        following = (at for at in range(number + 1, len(self._messages)) if self._is_answer(at))
        first, last = self._blocks(number), self._blocks(next(following, len(self._messages)))
        return [span for span in self._whole[1][first:last] if span[0] < span[1]]

    def _blocks(self, end: int) -> int:
        """How many `{% generation %}` blocks the messages before `end` have."""
        blocks, answers = len(self._whole[1]), list(map(self._is_answer, range(len(self._messages))))
        if blocks == sum(answers) or not any(answers[:end]):  # one each
            return sum(answers[:end])
        if end == len(answers):
            return blocks
        return len(self._template.render_marked(self._messages[:end], *self._given)[1])

    def _is_answer(self, number: int) -> bool:
        return self._messages[number].get("role") == "assistant"

    def _turn(self, number: int) -> Span:
        if number not in self._turns:
            start = self._start(number)
            last = number + 1 == len(self._messages)
            self._turns[number] = start, len(self.text) if last else self._end(self.text, start, number)
        return self._turns[number]

    def _start(self, number: int) -> int:
        """Where the prompt of a turn ends in the whole."""
        prompt = self._prompt(number)
        start = self._behind(self.text, prompt, number)
        if start is None and (before := self._turn_before(number)) is not None:
            # An earlier turn is rendered otherwise now; what lies between it and this one need not be.
            at = self._turn(before)[1]
            start = self._behind(self.text[at:], self._between(before, number), number)
            start = None if start is None else at + start
        if start is None:
            raise self._not_prefix_preserving(number, prompt)
        return start

    def _turn_before(self, number: int) -> int | None:
        return next((at for at in range(number - 1, -1, -1) if self._is_answer(at)), None)

    def _between(self, before: int, number: int) -> str:
        """What a prompt has behind the turn before it: the messages between, and the generation prompt."""
        prompt = self._prompt(number)
        start = self._behind(prompt, self._prompt(before), before)
        if start is None:
            raise self._not_prefix_preserving(number, prompt)
        return prompt[self._end(prompt, start, before) :]

    def _end(self, text: str, start: int, number: int) -> int:
        """Where the turn that starts at `start` of `text` ends: known from how it is rendered when it is the last.
        There it may have an end of sequence behind it (Phi-3), or thinking before it that is dropped once another
        question follows (Qwen3)."""
        alone = self._beginning(number + 1)
        prompt = self._prompt(number)
        begin = self._behind(alone, prompt, number)
        if begin is None:
            raise self._not_prefix_preserving(number, alone)
        turn = alone[begin:]
        # Line breaks that an answer begins with may be gone where it is the last (Qwen3).
        for at in (start, _behind_space(text, start)):
            for written in (turn, turn.removesuffix(self._template.eos_token)):
                if length := _same(text, at, written):
                    return at + length
        stem = LAST_TAG.sub("", turn)  # gpt-oss ends the last turn with another token than the turns before it
        tag = TAG.match(text, start + _same(text, start, stem))
        if tag is None or not stem or tag.start() == start:
            raise self._not_prefix_preserving(number + 1, alone)
        return tag.end()

    def _behind(self, text: str, prompt: str, number: int) -> int | None:
        """Where a prompt ends in a text that begins with it; None: it does not. Two differences are known. The text may
        part from the prompt within the generation prompt, which may open a thinking block that a recorded answer does
        not have: then that place. Or something in the prompt's midst is gone: the thinking of an earlier turn, or a
        system prompt and tools that move on to the last question (Mistral)."""
        if text.startswith(prompt):
            return len(prompt)
        begin = len(prompt) - len(self._opening(number))
        at = begin + len(OPEN_TAG.sub("", prompt[begin : _shared(text, prompt)]))
        if at > begin and ONLY_TAGS.fullmatch(prompt, at):
            return at
        return _same(text, 0, prompt) or None

    def _opening(self, number: int) -> str:
        """The generation prompt behind the messages before `number`."""
        prompt, plain = self._beginning(number, prompt=True), self._beginning(number)
        for closed in (plain, plain.removesuffix(self._template.eos_token)):
            if prompt.startswith(closed):
                return prompt[len(closed) :]
        return ""

    def _prompt(self, number: int) -> str:
        """The messages before a turn, and the generation prompt. For an answer that no question precedes, which
        templates render in their own ways: the whole up to its first generation prompt."""
        if any(message.get("role") == "user" for message in self._messages[:number]):
            return self._beginning(number, prompt=True)
        with suppress(UserError):
            prompt = self._beginning(number, prompt=True)
            if self._behind(self.text, prompt, number) is not None:
                return prompt
        asked = (at for at in range(number + 1, len(self._messages)) if self._is_answer(at))
        later = next(asked, len(self._messages))
        opening = self._opening(later)
        before, found, _ = self.text.partition(opening or self.text)
        return before + found if opening else self._beginning(number, prompt=True)

    def _beginning(self, end: int, *, prompt: bool = False) -> str:
        """The messages before `end`, rendered by themselves. Raises UserError where the template refuses them."""
        if (end, prompt) not in self._beginnings:
            self._beginnings[end, prompt] = (
                self.text if end == len(self._messages) and not prompt else self._render_beginning(end, prompt)
            )
        return self._beginnings[end, prompt]

    def _render_beginning(self, end: int, prompt: bool) -> str:
        try:
            return self._template.render(self._messages[:end], *self._given, add_generation_prompt=prompt)
        except ValueError as error:
            raise UserError(
                f"chat template of {self._template.where}: which characters the assistant wrote cannot be told: it "
                f"renders the whole conversation, and refuses its first {end} messages: {error}. {REMEDY}"
            ) from error

    def _not_prefix_preserving(self, number: int, beginning: str) -> UserError:
        at = _shared(self.text, beginning)
        begin = max(0, at - EXCERPT_CHARACTERS // 2)
        return UserError(
            f"chat template of {self._template.where}: which characters the assistant wrote cannot be told, because "
            f"the template renders the conversation's beginning otherwise when message {number + 1} follows. At "
            f"character {at} the whole has {self.text[begin : at + EXCERPT_CHARACTERS]!r}, its beginning alone has "
            f"{beginning[begin : at + EXCERPT_CHARACTERS]!r}. {REMEDY}"
        )


REMEDY = (
    "Mark the assistant's part in the template with {% generation %} ... {% endgeneration %} and name it in "
    "model.chat_template, or train with method.train_on: all."
)


def _shared(first: str, second: str) -> int:
    """Length of the beginning that two texts share."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # slices compare at the speed of memory, a loop over characters does not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def _behind_space(text: str, start: int) -> int:
    """Where the white space at `start` of a text ends."""
    return next((at for at in range(start, len(text)) if not text[at].isspace()), len(text))


def _same(text: str, start: int, turn: str) -> int:
    """Length of what stands at `start` of `text` and is `turn`, or `turn` less something in its midst; 0: neither."""
    if text.startswith(turn, start):
        return len(turn)
    shared = _shared(text[start : start + len(turn)], turn)
    head = text[start + shared : start + shared + HEAD_CHARACTERS]
    at = turn.find(head, shared) if head else -1
    while at >= 0 and not text.startswith(turn[at:], start + shared):
        at = turn.find(head, at + 1)
    return shared + len(turn) - at if at >= 0 else 0
