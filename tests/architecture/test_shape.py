"""The size ratchet, and what may stand in an `__init__` file. A longer function is a missing name."""

from __future__ import annotations

import ast
import statistics

FILE_LINES = 400
FUNCTION_LINES = 60
FUNCTION_LINES_P95 = 40
FUNCTION_LINES_MEDIAN = 12


def functions(tree: ast.Module) -> list[tuple[str, int, int]]:
    """Name, line, and length in lines of every function, nested ones too."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [(node.name, node.lineno, node.end_lineno - node.lineno + 1) for node in found]


def is_docstring_only(tree: ast.Module) -> bool:
    return len(tree.body) == 1 and ast.get_docstring(tree) is not None


def test_files_are_short(sources):
    lengths = {source.name: source.text.count("\n") for source in sources}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_long(sources):
    named = [(f"{s.name}:{line} {name}", length) for s in sources for name, line, length in functions(s.tree)]
    assert [entry for entry in named if entry[1] > FUNCTION_LINES] == []


def test_most_functions_are_short(sources):
    lengths = sorted(length for source in sources for _, _, length in functions(source.tree))
    assert statistics.median(lengths) <= FUNCTION_LINES_MEDIAN
    assert lengths[int(len(lengths) * 0.95)] <= FUNCTION_LINES_P95


def test_init_files_hold_a_docstring_only(sources):
    inits = [source for source in sources if source.path.name == "__init__.py"]
    assert inits
    assert [source.name for source in inits if not is_docstring_only(source.tree)] == []


def test_the_measures_themselves():
    tree = ast.parse("def outer():\n    x = 1\n    def inner():\n        return x\n    return inner\n")
    assert functions(tree) == [("outer", 1, 5), ("inner", 3, 2)]
    assert is_docstring_only(ast.parse('"""What it is."""\n'))
    assert not is_docstring_only(ast.parse('"""What it is."""\nimport os\n'))
    assert not is_docstring_only(ast.parse(""))
