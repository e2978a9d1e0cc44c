"""Rows of data, read: from the standard columns of a row format to one of a few typed rows.

Every format has one small function here, and `READERS` names them. They raise ValueError for a row that is malformed:
the column, what is there and what is expected; the caller adds the file and the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .messages import (
    Message,
    common_beginning,
    json_value,
    read_from_value,
    read_messages,
    short,
)
from .schema import RowFormat

Row = Mapping[str, Any]
Documents = list[dict[str, Any]]
Turns = str | list[Message]
"""A prompt or an answer: as text, or as messages for the chat template."""


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Tokenized:
    """Token ids [S] int32, and which of them are supervised [S] bool."""

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Completion:
    """An answer to a prompt, both as text that no template is laid over."""

    prompt: str
    completion: str
    documents: Documents


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template. The first `context` of them are only read, whoever wrote them."""

    messages: list[Message]
    tools: list[Any]
    documents: Documents
    context: int = 0


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, the better one and the worse."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: list[Any]
    documents: Documents


@dataclass(frozen=True)
class BinaryPreference:
    """An answer to a prompt, and whether it is wanted."""

    prompt: Turns
    completion: Turns
    label: bool
    tools: list[Any]
    documents: Documents


@dataclass(frozen=True)
class Ranking:
    """Several answers to a prompt; a higher score is better."""

    prompt: Turns
    responses: list[Turns]
    scores: list[float]
    tools: list[Any]
    documents: Documents


Parsed = Text | Tokenized | Completion | Conversation | Preference | BinaryPreference | Ranking


def parse_row(row: Row, row_format: RowFormat) -> Parsed:
    """A row whose columns have their standard names. Raises ValueError for a malformed one."""
    return READERS[row_format](row)


def _chat(row: Row) -> Conversation:
    return Conversation(read_messages(row["messages"], "messages"), _tools(row), _documents(row))


def _sharegpt(row: Row) -> Conversation:
    messages = _system(row) + read_from_value(row["conversations"], "conversations")
    return Conversation(messages, _tools(row), _documents(row))


def _alpaca(row: Row) -> Conversation:
    """Instruction and input are one question, with a blank line between them."""
    messages = _system(row)
    for number, turn in enumerate(_list(row, "history")):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise ValueError(f"history[{number}] is {short(turn)}; expected [question, answer]")
        messages += [_said("user", turn[0]), _said("assistant", turn[1])]
    question = "\n\n".join(part for part in (_string(row, "instruction"), _string(row, "input")) if part)
    return Conversation(
        [*messages, _said("user", question), _said("assistant", _string(row, "output"))], [], _documents(row)
    )


def _prompt_completion(row: Row) -> Completion | Conversation:
    prompt, completion = _turns(row, "prompt"), _turns(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion, _documents(row))
    asked = _as_messages(prompt, "user")
    messages = asked + _as_messages(completion, "assistant")
    return Conversation(messages, _tools(row), _documents(row), context=len(asked))


def _text(row: Row) -> Text:
    return Text(_string(row, "text"))


def _tokenized(row: Row) -> Tokenized:
    """Ids as numbers or as the bytes of little-endian int32, and what `supervised` (true or false for each; as bytes:
    bits, `numpy.packbits`) or `labels` (IGNORED: not supervised) says; without them everything is supervised."""
    ids = _ids(row["input_ids"], "input_ids")
    if row.get("supervised") is not None:
        supervised = _flags(row["supervised"], len(ids))
    elif row.get("labels") is not None:
        supervised = _ids(row["labels"], "labels") >= 0
    else:
        supervised = np.ones(len(ids), np.bool_)
    if len(supervised) != len(ids):
        raise ValueError(f"input_ids holds {len(ids)} tokens, what is supervised {len(supervised)}; expected as many")
    return Tokenized(ids, supervised)


def _ids(value: Any, column: str) -> npt.NDArray[np.int32]:
    if isinstance(value, bytes) and len(value) % 4 == 0:
        return np.frombuffer(value, "<i4").astype(np.int32)
    if isinstance(value, list) and all(type(one) is int for one in value):
        return np.array(value, np.int32)
    raise ValueError(f"{column} is {short(value)}; expected a list of token ids")


def _flags(value: Any, count: int) -> npt.NDArray[np.bool_]:
    if isinstance(value, bytes):
        return np.unpackbits(np.frombuffer(value, np.uint8), count=min(count, 8 * len(value))).astype(np.bool_)
    if isinstance(value, list) and all(one in (0, 1) for one in value):
        return np.array(value, np.bool_)
    raise ValueError(f"supervised is {short(value)}; expected true or false for every token")


def _preference(row: Row) -> Preference:
    """Answers may be whole conversations; then the prompt is what both begin with."""
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    prompt = _turns(row, "prompt") if row.get("prompt") is not None else None
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = common_beginning(chosen, rejected)
        if shared:
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if prompt is None:
        raise ValueError(
            "no prompt, and chosen and rejected have no beginning in common that could be it; expected either"
        )
    if not chosen or not rejected:
        raise ValueError(f"{'rejected' if chosen else 'chosen'} holds nothing beyond the prompt; expected an answer")
    prompt, chosen, rejected = _alike(prompt, chosen, rejected)
    return Preference(prompt, chosen, rejected, _tools(row), _documents(row))


def _binary_preference(row: Row) -> BinaryPreference:
    prompt, completion = _alike(_turns(row, "prompt"), _turns(row, "completion"))
    label = _LABELS.get(str(row["label"]).lower())
    if label is None:
        raise ValueError(f"label is {short(row['label'])}; expected true or false (or 1 or 0)")
    return BinaryPreference(prompt, completion, label, _tools(row), _documents(row))


_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def _ranking(row: Row) -> Ranking:
    """Without scores and ranks the responses stand in order, the best one first."""
    responses = [_turns({"responses": one}, "responses") for one in _list(row, "responses")]
    if len(responses) < 2:
        raise ValueError(f"responses holds {len(responses)}; expected two or more to compare")
    prompt, *alike = _alike(_turns(row, "prompt"), *responses)
    return Ranking(prompt, alike, _scores(row, len(responses)), _tools(row), _documents(row))


def _scores(row: Row, count: int) -> list[float]:
    given = [column for column in ("scores", "ranks") if row.get(column) is not None]
    if len(given) == 2:
        raise ValueError("both scores and ranks are there; expected one of them (map the other column away)")
    if not given:
        return [float(-place) for place in range(count)]
    values = _list(row, given[0])
    if len(values) != count or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{given[0]} is {short(values)}; expected {count} numbers, one for each response")
    return [float(-value if given[0] == "ranks" else value) for value in values]


READERS: dict[RowFormat, Callable[[Row], Parsed]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "tokenized": _tokenized,
    "preference": _preference,
    "binary_preference": _binary_preference,
    "ranking": _ranking,
}
"""Row format -> its reader."""


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": "" if content is None else str(content)}


def _system(row: Row) -> list[Message]:
    text = _string(row, "system")
    return [_said("system", text)] if text else []


def _turns(row: Row, column: str) -> Turns:
    """Text, or a list of messages, or one message."""
    value = row.get(column)
    if isinstance(value, Mapping):
        value = [value]
    if value is None or isinstance(value, str):
        return value or ""
    return read_messages(value, column)


def _alike(*turns: Turns) -> tuple[Turns, ...]:
    """All as text, or all as messages when one of them is: the first is asked, the others answer."""
    if all(isinstance(one, str) for one in turns):
        return turns
    return tuple(_as_messages(one, "assistant" if number else "user") for number, one in enumerate(turns))


def _as_messages(turns: Turns, role: str) -> list[Message]:
    return [_said(role, turns)] if isinstance(turns, str) else turns


def _tools(row: Row) -> list[Any]:
    """Tools as templates take them: objects; JSON text is read, because tables have no place for free schemas."""
    given = json_value(row.get("tools"), "tools")
    if isinstance(given, Mapping):
        given = [given]
    if given is None or given == "":
        return []
    if not isinstance(given, list):
        raise ValueError(f"tools is {short(given)}; expected a list of tool descriptions")
    return [json_value(tool, f"tools[{number}]") for number, tool in enumerate(given)]


def _documents(row: Row) -> Documents:
    """Retrieved context: a text, an object with text and perhaps a title, or a list of them."""
    given = row.get("documents")
    if given is None or given == "":
        return []
    listed = given if isinstance(given, list) else [given]
    return [_document(one, number) for number, one in enumerate(listed)]


def _document(given: Any, number: int) -> dict[str, Any]:
    if isinstance(given, str):
        return {"text": given}
    if isinstance(given, Mapping) and isinstance(document_text(given), str):
        return dict(given)
    raise ValueError(f"documents[{number}] is {short(given)}; expected text, or an object with text and perhaps title")


def document_text(document: Mapping[str, Any]) -> Any:
    """What a document says; `contents` and `content` are what some tools call it."""
    return next((document[key] for key in ("text", "contents", "content") if key in document), None)


def written_out(documents: Documents) -> str:
    """Documents as text, for prompts and for templates that take none: numbered, each with its title if it has one."""
    return "\n\n".join(
        f"[{number}] {document.get('title') or ''}".rstrip() + f"\n{document_text(document)}"
        for number, document in enumerate(documents, start=1)
    )


def _list(row: Row, column: str) -> list[Any]:
    value = json_value(row.get(column), column)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise ValueError(f"{column} is {short(value)}; expected a list")
    return value


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {short(value)}; expected text")
    return value
