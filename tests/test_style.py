"""What ruff does not check of the code outside tests/: short functions, and type hints on public ones."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 60


def functions():
    """Yield (where, node) of each function, those inside others too."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", ":!tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{name}:{node.lineno} {node.name}", node


def without_hint(node):
    """Names of a function's parameters that have no type hint."""
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [x.arg for x in every if x and x.annotation is None and x.arg not in ("self", "cls")]


def test_the_functions_are_found():
    assert len(list(functions())) > 500


def test_no_function_is_long():
    lengths = {where: node.end_lineno - node.lineno + 1 for where, node in functions()}
    long = [f"{where}: {lines} lines" for where, lines in lengths.items() if lines > MOST_LINES]
    assert not long, "\n".join(long)


def test_public_functions_hint_their_parameters():
    bare = [
        f"{where}: {', '.join(missing)}"
        for where, node in functions()
        if not node.name.startswith("_") and (missing := without_hint(node))
    ]
    assert not bare, "\n".join(bare)
