"""Jinja templates over the columns of a data row, in jinja2's sandbox: they make prompts and reference answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_tropd.data.cells import plainly
from megatron_tropd.data.files import BadRow
from megatron_tropd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """``{{ question }}`` is the column ``question`` of the row. Made by ``row_template``."""

    text: str
    columns: frozenset[str]  # all that it may look at
    _compiled: jinja2.Template

    def render(self, row: Mapping[str, Any]) -> str:
        """Render a row. Raises BadRow when the row lacks a column, or the template fails on it."""
        try:
            return self._compiled.render(**row)
        except Exception as error:  # templates are programs: they raise whatever they do wrong
            raise BadRow(f"the template {self.text[:60]!r} fails: {error}. It has the columns {sorted(row)}.") from None


@lru_cache(maxsize=64)
def row_template(text: str) -> RowTemplate:
    """Compile a template. White space is kept as written, but for the line break after a block.

    Raises:
        ConfigError: it is not valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=plainly,
    )
    try:
        columns = jinja2.meta.find_undeclared_variables(environment.parse(text))
        return RowTemplate(text, frozenset(columns), environment.from_string(text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"template {text[:80]!r} is not valid Jinja, line {error.lineno}: {error.message}. "
            "Write columns as {{ column }}."
        ) from None
