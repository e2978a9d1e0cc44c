"""Chat templates, rendered as transformers renders them. `spans.py` finds what the assistant wrote in the result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.nodes import CallBlock, ContextReference, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...recipes.errors import UserError

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Characters [start, stop) of a rendered conversation."""

SPAN_START, SPAN_STOP = "\U0010fff0", "\U0010fff1"
"""Private-use characters that bracket what stands in a `{% generation %}` block; taken out again after rendering."""

BLOCKS = "ftlaunch_blocks"
"""The template's variable in which its `{% generation %}` blocks are counted."""

GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", BLOCKS})
"""Variables that a conversation itself gives a template."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which rows have a message's thinking; templates read the first, some the second."""


DICT_ATTRIBUTES = frozenset(dir(dict))


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes (transformers' convention)."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> Node:
        """Wrap the block's output in markers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_marked", [ContextReference()]), [], [], body).set_lineno(line)

    def _marked(self, context: Any, caller: Any) -> str:
        context[BLOCKS].append(1)
        return f"{SPAN_START}{caller()}{SPAN_STOP}"


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja's own filter escapes HTML; transformers' does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox, with a short way to a message's keys: most of rendering is `message.role` and its like,
    which jinja looks for among the attributes of dict first."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute` in a template."""
        if type(obj) is dict and attribute in obj and attribute not in DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


def _environment(now: datetime) -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = now.strftime
    return environment


class ChatTemplate:
    """A compiled chat template. Rendering raises ValueError for a conversation that the template refuses."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        where: str,
        now: datetime,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`special_tokens`: bos_token and its like. `now`: the date that a template may print. `variables`: more of
        them, by name (`enable_thinking`).

        Raises UserError for a template that does not parse, and for a variable that it does not use."""
        self.where = where
        self.source = source
        self.eos_token = special_tokens.get("eos_token", "")
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        """Whether the template says itself what the assistant writes."""
        self._variables = {**special_tokens, **(variables or {})}
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template of {where}, line {error.lineno}: {error.message}") from error
        named = jinja2.meta.find_undeclared_variables(environment.parse(source))
        self.takes_documents = "documents" in named
        """Whether the template has a place of its own for retrieved documents."""
        used = named - GIVEN
        for name in variables or {}:
            if name not in used:
                raise UserError(
                    f"model.chat_template_kwargs: the chat template of {where} does not use {name}. "
                    f"It uses: {', '.join(sorted(used)) or 'none'}."
                )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text."""
        return self.render_marked(messages, tools, documents, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and what its `{% generation %}` blocks wrote, in order, empty ones included."""
        blocks: list[int] = []
        try:
            marked = self._template.render(
                messages=messages,
                tools=tools or None,
                documents=documents or None,
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, BLOCKS: blocks},
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"the chat template refuses the conversation ({roles or 'no messages'}): {error}"
            ) from error
        return _unmark(marked, len(blocks)) if self.marks_answers else (marked, [])


def with_defaults(source: str, variables: Mapping[str, Any]) -> str:
    """A template whose variables have these values unless the caller says otherwise."""
    sets = (
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value)} %}}{{% endif %}}"
        for name, value in variables.items()
    )
    return "".join(sets) + "{{ '' }}" + source  # so that a line break at the source's beginning stays


def readable(message: Message) -> dict[str, Any]:
    """A message as templates expect it: keys that columnar files fill with null are left out, and thinking is there
    under the names that templates read (transformers does the same)."""
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _unmark(marked: str, blocks: int) -> tuple[str, list[Span]]:
    """Take the markers out; where they stood are the spans."""
    if not marked.count(SPAN_START) == marked.count(SPAN_STOP) == blocks:
        raise ValueError(
            "the conversation holds U+10FFF0 or U+10FFF1, private characters that mark the assistant's part here, or "
            "its template has one {% generation %} block inside another"
        )
    parts, spans, length = [], [], 0
    for number, piece in enumerate(marked.split(SPAN_START)):
        inside, _, outside = piece.partition(SPAN_STOP) if number else ("", "", piece)
        if number:
            spans.append((length, length + len(inside)))
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(parts), spans
