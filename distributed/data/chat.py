"""Chat templates: rendering them as transformers does, and finding in the result what the assistant wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...recipes.errors import UserError

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Characters [start, stop) of a rendered conversation."""

SPAN_START, SPAN_STOP = "\U0010fff0", "\U0010fff1"
"""Private-use characters that bracket what stands in a `{% generation %}` block; taken out again after rendering."""

EXCERPT_CHARACTERS = 60


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes (transformers' convention)."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> Node:
        """Wrap the block's output in markers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{SPAN_START}{caller()}{SPAN_STOP}"


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja's own filter escapes HTML; transformers' does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = now.strftime
    return environment


class ChatTemplate:
    """A compiled chat template. Rendering raises ValueError for a conversation that the template refuses."""

    def __init__(self, source: str, variables: Mapping[str, str], *, where: str, now: datetime) -> None:
        """`variables`: bos_token and its like. `now`: the date that a template may print.

        Raises UserError for a template that does not parse."""
        self.where = where
        self._variables = dict(variables)
        self._says_spans = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template of {where}, line {error.lineno}: {error.message}") from error

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text."""
        return self._render(messages, tools, add_generation_prompt).replace(SPAN_START, "").replace(SPAN_STOP, "")

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"the chat template refuses the conversation ({roles or 'no messages'}): {error}"
            ) from error

    def spans(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, list[Span]]:
        """The rendered conversation and, in order, what the assistant wrote in it, end-of-turn tokens included.

        A template with generation blocks says it itself. Else each turn lies between the generation prompt and the
        beginning of the next message, found by rendering parts of the conversation. Raises UserError when the
        template does not add up that way.
        """
        if self._says_spans:
            return _unmark(self._render(messages, tools, False))
        full = self.render(messages, tools)
        turns = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
        return full, [self._turn(messages, tools, number, full) for number in turns]

    def _turn(self, messages: Sequence[Message], tools: Sequence[Any] | None, number: int, full: str) -> Span:
        """From the end of the generation prompt, or from where it and the real turn part (a prompt may open a
        thinking block that a recorded answer does not have), to the beginning of the next message."""
        before = self._beginning(messages, tools, number, full)
        plain = self.render(messages[:number], tools)
        prompt = self.render(messages[:number], tools, add_generation_prompt=True)
        header = prompt[len(plain) :]
        shared = _shared(full[len(before) :], header)
        if not prompt.startswith(plain) or (header and not shared):
            raise self._not_prefix_preserving(number, full, prompt)
        return len(before) + shared, len(self._beginning(messages, tools, number + 1, full))

    def _beginning(self, messages: Sequence[Message], tools: Sequence[Any] | None, number: int, full: str) -> str:
        """The text before message `number`. It is the rendering of the messages before it, if that is how the whole
        begins. Some templates render turns otherwise once another question follows (Qwen3 drops their thinking):
        then it is the rendering of them and that question, less the question."""
        plain = self.render(messages[:number], tools)
        if full.startswith(plain):
            return plain
        questions = (at for at in range(number, len(messages)) if messages[at].get("role") == "user")
        asked = next(questions, None)
        if asked is None:
            raise self._not_prefix_preserving(number, full, plain)
        once = self.render(messages[: asked + 1], tools)
        question = self.render([*messages[: asked + 1], messages[asked]], tools).removeprefix(once)
        text = self.render([*messages[:number], messages[asked]], tools).removesuffix(question)
        if not full.startswith(text):
            raise self._not_prefix_preserving(number, full, plain)
        return text

    def _not_prefix_preserving(self, number: int, full: str, prefix: str) -> UserError:
        at = _shared(full, prefix)
        begin = max(0, at - EXCERPT_CHARACTERS // 2)
        return UserError(
            f"chat template of {self.where}: which characters the assistant wrote cannot be told, because the "
            f"template renders the conversation's beginning otherwise when message {number + 1} follows. At character "
            f"{at} the whole has {full[begin : at + EXCERPT_CHARACTERS]!r}, its beginning alone has "
            f"{prefix[begin : at + EXCERPT_CHARACTERS]!r}. Mark the assistant's part in the template with "
            "{% generation %} ... {% endgeneration %} and name it in model.chat_template, or train with "
            "method.train_on: all."
        )


def _shared(first: str, second: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _unmark(marked: str) -> tuple[str, list[Span]]:
    """Take the markers out; where they stood are the spans."""
    parts = list(_parts(marked))
    spans: list[Span] = []
    length = 0
    for text, inside in parts:
        if inside and text:
            spans.append((length, length + len(text)))
        length += len(text)
    return "".join(text for text, _ in parts), spans


def _parts(marked: str) -> Iterator[tuple[str, bool]]:
    for number, piece in enumerate(marked.split(SPAN_START)):
        inside, _, outside = piece.partition(SPAN_STOP) if number else ("", "", piece)
        yield inside, True
        yield outside, False
