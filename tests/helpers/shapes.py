"""Annotations of both packages, checked while the tests run: jaxtyping's shapes and, by beartype, all other types.

Functions inside functions are left out. They are made anew, and their wrappers compiled anew, at every call of the
outer one: that was half of the time of the tests. Every function of a module and every method is checked.
"""

import ast
import sys

import beartype
from jaxtyping import _import_hook, install_import_hook

check = beartype.beartype
"""Named by `install`, so that bytecode that jaxtyping has cached for another checker is not taken for this one's."""


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


def install(*packages: str) -> None:
    """Checks these packages, to be called before they are imported."""
    _import_hook.JaxtypingTransformer = _OutermostFunctions
    install_import_hook(list(packages), f"{__name__}.check")
