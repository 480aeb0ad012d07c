"""Functions of the user's own, named as `path.py:name`."""

import ast
import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from common.cli import UserError, existing_file, nearest, one_line


def function_file(spec: str, option: str, example: str, look: bool = False) -> tuple[Path, str]:
    """(file, name) of `path.py:name`; a relative path may also be from the project's folder. `look`: whether
    the file's text has the name.

    Raises:
        UserError: not of that form, no such file, or no such name in it; names `option`.
    """
    path, separator, name = spec.rpartition(":")
    if not separator or not name.isidentifier():
        raise UserError(f"{option} {spec}: give FILE.py:NAME, for example {example}")
    root = Path(__file__).resolve().parents[1]  # a name such as tiny/task.py is found from any folder
    path = root / path if not Path(path).is_file() and (root / path).is_file() else Path(path)
    path = existing_file(path, f"{option.strip('-').replace('_', ' ')} file")
    names = defined_names(path) if look else None
    if names is not None and name not in names:
        raise UserError(f"{path} has no function {name}{nearest(name, names)}")
    return path, name


def defined_names(path: str | Path) -> set[str] | None:
    """Names that a Python file defines or imports, wherever in it, without running it; None where that cannot
    be said.
    """
    try:
        nodes = list(ast.walk(ast.parse(Path(path).read_bytes())))
    except (SyntaxError, ValueError):  # loading it says what is wrong
        return None
    names = {
        node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    return None if "*" in names or "__getattr__" in names else names


def as_number(value: object) -> float:
    """What a function of the user's own returned, as a float; a TypeError that shows it where it is no
    number. May be NaN.
    """
    if not isinstance(value, (str, bytes, bytearray)):  # float() would read a text
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    shown = " ".join(repr(value).split())
    raise TypeError(f"it returned {shown if len(shown) <= 40 else shown[:40] + '…'}, a number was expected")


def load_function(spec: str, option: str, example: str) -> Callable:
    """The function that `path.py:name` names.

    Raises:
        UserError: as `function_file`; a file that does not import, no such function in it.
    """
    path, name = function_file(spec, option, example)
    path = path.resolve()
    kind = option.strip("-").split("_")[0]
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location(f"{kind}_{path.stem}", path)
    )
    sys.modules[module.__name__] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))  # for modules beside it
    try:
        module.__spec__.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not import: {one_line(error, 1000)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if inspect.isfunction(v)]
        raise UserError(f"{path} has no function {name}{nearest(name, known)}")
    return function
