"""Say of a chat template, without running it, whether what it does is bounded by what it is given.

A template is a program that came with a model. Most only write messages one after the other; those are recognized here,
by a short list of what may stand in them, and rendered in place. All others may loop or grow without bound for all that
can be seen, and are rendered by ``template_renderer`` within limits. Nothing is run, and no constant is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST = 100_000  # characters; a longer template is not looked at
_PLAIN = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.Const, nodes.Name, nodes.NSRef, nodes.Getattr),
    *(nodes.Getitem, nodes.Slice, nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or, nodes.CondExpr),
    *(nodes.Test, nodes.Neg, nodes.Sub, nodes.Keyword, nodes.List, nodes.Tuple, nodes.Break, nodes.Continue),
)
# text that is at most as long as what it is made of, however often that is done
_SHORTENING = {"trim", "length", "count", "lower", "first", "last", "default"}
# text that may be longer, by a factor that adds up when it is done again to the same
_LENGTHENING = {"tojson", "upper", "capitalize", "title", "string"}
_METHODS = {"strip", "lstrip", "rstrip", "split", "startswith", "endswith", "lower", "items", "keys", "values", "get"}
_FUNCTIONS = {"raise_exception", "namespace"}
_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "true"}
_TESTS |= {"false", "equalto", "sameas", "odd", "even", "in", "eq", "==", "ne", "gt", "lt", "ge", "le", "divisibleby"}


@lru_cache(maxsize=64)
def is_bounded(template: str) -> bool:
    """Say whether time and output are in proportion to what the template is given, by its look alone."""
    if len(template) > _LONGEST:
        return False
    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        bound = {name for loop in tree.find_all(nodes.For) for name in _names(loop.target)}
        kept = {name for assignment in tree.find_all(nodes.Assign) for name in _names(assignment.target)}
        # what a loop is at must stay what it is at
        return not bound & kept and not any(_complaints(tree, loop=None))
    except (jinja2.TemplateError, RecursionError, MemoryError):
        return False


def _complaints(node: nodes.Node, *, loop: Collection[str] | None, assigned: bool = False) -> Iterator[nodes.Node]:
    """Yield the nodes that may take more. ``loop``: names bound by the loop around; ``assigned``: it is kept in a name.

    A loop within a loop must run over a part of what that is at, so that all turns together are what there is.
    """
    if isinstance(node, nodes.For):
        if node.recursive or (loop is not None and _root(node.iter) not in loop):
            yield node
        yield from _complaints(node.iter, loop=loop, assigned=True)
        inner = _names(node.target)
        rest = [*node.body, *node.else_, *([node.test] if node.test is not None else [])]
        for child in rest:
            yield from _complaints(child, loop=inner)
        return
    assigned = assigned or isinstance(node, nodes.Assign)
    if not _is_fine(node, assigned=assigned):
        yield node
    for child in node.iter_child_nodes():
        yield from _complaints(child, loop=loop, assigned=assigned)


def _names(target: nodes.Node) -> set[str]:
    own = {target.name} if isinstance(target, nodes.Name) else set()
    return own | {name.name for name in target.find_all(nodes.Name)}


def _root(node: nodes.Node) -> str | None:
    """Return the name that an expression is a part of: ``call`` of ``call.arguments.items()``."""
    while isinstance(node, nodes.Getattr | nodes.Getitem | nodes.Call):
        node = node.node
    return node.name if isinstance(node, nodes.Name) else None


def _is_fine(node: nodes.Node, *, assigned: bool) -> bool:
    if isinstance(node, nodes.Assign):
        return isinstance(node.target, nodes.Name | nodes.NSRef)
    if isinstance(node, nodes.Add | nodes.Concat):  # twice itself, kept, is a text that doubles
        return not assigned
    if isinstance(node, nodes.Mod):  # of numbers; of a text it is a format, with a width
        return isinstance(node.right, nodes.Const) and isinstance(node.right.value, int) and _root(node.left) == "loop"
    if isinstance(node, nodes.Filter):
        return _is_fine_filter(node, assigned=assigned)
    if isinstance(node, nodes.Test):
        return node.name in _TESTS
    if isinstance(node, nodes.Call):
        return _is_fine_call(node)
    return isinstance(node, _PLAIN)


def _is_fine_filter(node: nodes.Filter, *, assigned: bool) -> bool:
    if node.name in _SHORTENING:
        return True
    again = any(inner.name in _LENGTHENING for inner in node.find_all(nodes.Filter))
    return node.name in _LENGTHENING and not (assigned or again or node.args or node.kwargs)


def _is_fine_call(node: nodes.Call) -> bool:
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    if isinstance(node.node, nodes.Getattr):
        return node.node.attr in _METHODS
    return isinstance(node.node, nodes.Name) and node.node.name in _FUNCTIONS
