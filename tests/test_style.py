"""What ruff does not check of the code outside tests/: short functions, and type hints on public ones."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 60


@pytest.fixture(scope="module")
def functions():
    """{where: node} of each function, those inside others too."""
    command = "git ls-files --cached --others --exclude-standard *.py :!tests".split()
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {}
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[f"{name}:{node.lineno} {node.name}"] = node
    assert len(found) > 500
    return found


def without_hint(node):
    """Names of a function's parameters that have no type hint."""
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [x.arg for x in every if x and x.annotation is None and x.arg not in ("self", "cls")]


def test_no_function_is_long(functions):
    lengths = {where: node.end_lineno - node.lineno + 1 for where, node in functions.items()}
    long = [f"{where}: {lines} lines" for where, lines in lengths.items() if lines > MOST_LINES]
    assert not long, "\n".join(long)


def test_public_functions_hint_their_parameters(functions):
    bare = [
        f"{where}: {', '.join(missing)}"
        for where, node in functions.items()
        if not node.name.startswith("_") and (missing := without_hint(node))
    ]
    assert not bare, "\n".join(bare)
