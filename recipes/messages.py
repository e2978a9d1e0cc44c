"""Messages as chat templates expect them (OpenAI's), from what data sets hold: parts, tool calls, other tools' names.

Raises ValueError that names the place in the row, what is there, and what is expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

FROM_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""What ShareGPT's `from` says -> role."""

CALLS = ("function_call", "tool_call")
"""Values of `from` whose value is a call: JSON with name and arguments."""


def short(value: Any) -> str:
    """A value in an error: its kind, and its beginning."""
    return f"{type(value).__name__} {value!r:.60}"


def json_value(value: Any, where: str) -> Any:
    """A value that may be JSON text, read. Blank text is no value."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is text that is not JSON ({error}): {value!r:.60}") from error


def read_messages(value: Any, column: str) -> list[Message]:
    """Messages with role and content; the whole list may be JSON text, as it is in CSV."""
    listed = json_value(value, column)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ValueError(f"{column} is {short(value)}; expected a list of {{role, content}}")
    return [_message(one, f"{column}[{number}]") for number, one in enumerate(listed)]


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise ValueError(f"{where} is {short(given)}; expected {{role, content}}{_hint(given)}")
    message = dict(given)
    role = message["role"]
    meant = FROM_ROLES.get(role.lower(), role)
    if meant != role:
        raise ValueError(f"{where}.role is {role!r}; expected system, user, assistant or tool (here {meant})")
    if role == "function":
        message["role"] = "tool"
    if "content" in message:
        message["content"] = _content(message["content"], f"{where}.content")
    if message.get("function_call") is not None:  # what OpenAI had before tool_calls
        message["tool_calls"] = [message.pop("function_call")]
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    return message


def _hint(given: Any) -> str:
    is_sharegpt = isinstance(given, Mapping) and "from" in given and "value" in given
    return "; {from, value} is format sharegpt, with `columns: {conversations: …}`" if is_sharegpt else ""


def _content(given: Any, where: str) -> Any:
    """Text. Of several parts, the text of all, as templates write them one behind the other."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Sequence):
        raise ValueError(f"{where} is {short(given)}; expected text, or a list of {{type: text, text: …}}")
    return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(given))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in (None, "text"):
        raise ValueError(f"{where} is of type {kind}; only text can be learned from: leave such rows out")
    raise ValueError(f"{where} is {short(part)}; expected {{type: text, text: …}}")


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    listed = json_value(given, where)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ValueError(f"{where} is {short(given)}; expected a list of calls")
    return [_call(one, f"{where}[{number}]") for number, one in enumerate(listed)]


def _call(given: Any, where: str) -> dict[str, Any]:
    """`{type: function, function: {name, arguments}}` with arguments as an object: templates write JSON themselves."""
    call = json_value(given, where)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {short(given)}; expected {{function: {{name, arguments}}}}")
    arguments = json_value(function.get("arguments"), f"{where}.function.arguments")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.function.arguments is {short(arguments)}; expected an object, or JSON text of one")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments or {})}}


def read_from_value(value: Any, column: str) -> list[Message]:
    """ShareGPT's `{from, value}`; `{role, content}` under the same column is read as it says."""
    listed = json_value(value, column)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ValueError(f"{column} is {short(value)}; expected a list of {{from, value}}")
    return [_from_value(one, f"{column}[{number}]") for number, one in enumerate(listed)]


def _from_value(given: Any, where: str) -> Message:
    if isinstance(given, Mapping) and "role" in given:
        return _message(given, where)
    if not isinstance(given, Mapping) or "from" not in given or "value" not in given:
        raise ValueError(f"{where} is {short(given)}; expected {{from, value}}")
    role = FROM_ROLES.get(str(given["from"]).lower())
    if role is None:
        raise ValueError(f"{where}.from is {given['from']!r}; expected one of {', '.join(FROM_ROLES)}")
    rest = {key: item for key, item in given.items() if key not in ("from", "value")}
    if given["from"] in CALLS:
        calls = json_value(given["value"], f"{where}.value")
        return {**rest, "role": role, "content": "", "tool_calls": _calls(_as_list(calls), f"{where}.value")}
    return {**rest, "role": role, "content": _content(given["value"], f"{where}.value")}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


def common_beginning(first: Sequence[Message], second: Sequence[Message]) -> int:
    """Messages that two conversations begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
