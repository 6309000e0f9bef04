"""Annotations of both packages, checked while the tests run: jaxtyping's shapes and, by beartype, all other types.

In place of `jaxtyping.jaxtyped`, which binds all arguments by name at every call to have them for its message, and
looks at them twice: that was a third of the time of the tests. Here beartype looks once, before and after the call,
inside a memo of jaxtyping's, in which an axis has one size for all arguments and the result.

Functions inside functions are left out. They are made anew, and their wrappers compiled anew, at every call of the
outer one: that was half of the time of the tests. Every function of a module and every method is checked.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any
from unittest.mock import patch

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, _import_hook, install_import_hook, jaxtyped
from jaxtyping._storage import pop_shape_memo, push_shape_memo, shape_str

looked_at = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


def checked(function: Any) -> Any:
    """Returns a function that checks its annotations, or a class of which `dataclass` has made `__init__` do so.

    Named by `install`, so that bytecode that jaxtyping has cached for another checker is not taken for this one's.
    """
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and not hasattr(function.__init__, "__wrapped__"):
            function.__init__ = checked(function.__init__)
        return function
    if not _mentions_shapes(function):
        return looked_at(function)
    if inspect.isgeneratorfunction(function):  # its body runs after the call, when the memo is gone
        return jaxtyped(function, typechecker=looked_at)
    inside = looked_at(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        memos = push_shape_memo({})
        try:
            return inside(*args, **kwargs)
        except TypeCheckError as violation:
            sizes = shape_str(memos)
            if sizes and hasattr(violation, "add_note"):  # Python 3.11
                violation.add_note(sizes)
            raise
        finally:
            pop_shape_memo()

    return wrapper


def _mentions_shapes(function: Any) -> bool:
    """Whether an annotation is, or has in it, an array of jaxtyping's: by the quotes of its axes, or by a name."""
    text = " ".join(str(annotation) for annotation in function.__annotations__.values())
    named = (function.__globals__.get(name) for name in re.findall(r"\w+", text))
    return any(quote in text for quote in "'\"") or any("jaxtyping." in repr(each) for each in named)


class _Decorator(_import_hook.Typechecker):
    def get_ast(self) -> ast.expr:
        return super().get_ast().keywords[0].value  # `checked` itself, and not jaxtyping.jaxtyped(typechecker=checked)


def without_unpack(node: ast.FunctionDef) -> ast.FunctionDef:
    """The function without the annotation of `**options: Unpack[…]`, which beartype refuses on Python 3.10.

    There Unpack is that of typing_extensions, and typing has none. The function and its other annotations stay.
    """
    options = node.args.kwarg
    if options and options.annotation and "Unpack[" in ast.unparse(options.annotation):
        options.annotation = None
    return node


class _OutermostFunctions(_import_hook.JaxtypingTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if sys.version_info < (3, 11):
            node = without_unpack(node)
        inside = any(isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef) for parent in self._parents)
        return node if inside else super().visit_FunctionDef(node)


class _Loader(_import_hook._JaxtypingLoader):
    """Looks for bytecode of its own for the module, and not for what the module imports (torch) as well."""

    def exec_module(self, module: ModuleType) -> None:
        SourceFileLoader.exec_module(self, module)

    def get_code(self, fullname: str) -> Any:
        tagged = functools.partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
        with patch("importlib._bootstrap_external.cache_from_source", tagged):
            return super().get_code(fullname)


def install(*packages: str) -> None:
    """Checks these packages, to be called before they are imported."""
    _import_hook.JaxtypingTransformer = _OutermostFunctions
    _import_hook.Typechecker = _Decorator
    _import_hook._JaxtypingLoader = _Loader
    install_import_hook(list(packages), f"{__name__}.checked")
