"""Functions of the user's own, named as `path.py:name`."""

import importlib.util
import inspect
import sys
from pathlib import Path

from common.cli import UserError, existing_file, nearest


def function_file(spec, option, example):
    """(file, name) of `path.py:name`; a relative path may also be from the project's folder.

    Raises:
        UserError: not of that form, or no such file; names `option`.
    """
    path, separator, name = spec.rpartition(":")
    if not separator or not name.isidentifier():
        raise UserError(f"{option} {spec}: give FILE.py:NAME, for example {example}")
    root = Path(__file__).resolve().parents[1]  # a name such as tiny/task.py is found from any folder
    path = root / path if not Path(path).is_file() and (root / path).is_file() else Path(path)
    return existing_file(path, f"{option.strip('-').replace('_', ' ')} file"), name


def load_function(spec, option, example):
    """The function that `path.py:name` names.

    Raises:
        UserError: as `function_file`; a file that does not import, no such function in it.
    """
    path, name = function_file(spec, option, example)
    path = path.resolve()
    kind = option.strip("-").split("_")[0]
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"{kind}_{path.stem}", path))
    sys.modules[module.__name__] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))  # for modules beside it
    try:
        module.__spec__.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not import: {type(error).__name__}: {' '.join(str(error).split())}") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if inspect.isfunction(v)]
        raise UserError(f"{path} has no function {name}{nearest(name, known)}")
    return function
