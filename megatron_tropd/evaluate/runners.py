"""Take the calls of test runners out of a program: they end the process, and the tests are called without them."""

from __future__ import annotations

import ast

_MODULES = ("unittest", "pytest", "absl.testing.absltest", "absltest")


class _Runners(ast.NodeTransformer):
    """Remove ``unittest.main()`` and its like, by whatever name it is imported; count what was changed."""

    def __init__(self, tree: ast.AST) -> None:
        self.changed = 0
        self._names = _runner_names(tree)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return self._without(node)

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        return self._without(node)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        """Keep a runner whose result is looked at, but let it return."""
        for part in ast.walk(node.value):
            if isinstance(part, ast.Call) and self._is_runner(part) and not part.args:
                part.keywords = [*(word for word in part.keywords if word.arg != "exit"), _RETURNS]
                self.changed += 1
        return node

    def _without(self, node: ast.stmt) -> ast.stmt:
        if any(isinstance(part, ast.Call) and self._is_runner(part) for part in ast.walk(node)):
            self.changed += 1
            return ast.Pass()
        return node

    def _is_runner(self, call: ast.Call) -> bool:
        return isinstance(call.func, ast.Name | ast.Attribute) and ast.unparse(call.func) in self._names


_RETURNS = ast.keyword(arg="exit", value=ast.Constant(value=False))


def _runner_names(tree: ast.AST) -> set[str]:
    """Return the names under which a program calls a runner: ``ut.main`` after ``import unittest as ut``."""
    names = {f"{module}.main" for module in _MODULES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {f"{alias.asname}.main" for alias in node.names if alias.name in _MODULES and alias.asname}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").removesuffix(".main")
            for alias in node.names:
                bound = alias.asname or alias.name
                if alias.name == "main" and module in _MODULES:
                    names.add(bound)
                elif f"{module}.{alias.name}" in _MODULES:
                    names.add(f"{bound}.main")
    return names


def without_runners(tree: ast.Module) -> bool:
    """Remove the runners of a tree, in place; return whether there were any."""
    runners = _Runners(tree)
    runners.visit(tree)
    return runners.changed > 0


def source_without_runners(source: str) -> str:
    """Return a program without its runners; as it is where it has none, or does not compile."""
    if "main" not in source:
        return source
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return source
    return ast.unparse(tree) if without_runners(tree) else source
