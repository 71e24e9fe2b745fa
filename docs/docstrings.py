"""Docstrings as the site shows them: their reStructuredText roles and formulas, as Markdown and MathML.

Belongs here: a griffe extension, named in ``mkdocs.yml``. Does not belong here: which pages there are (``site.py``).
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert


def mathml(tex: str, display: str = "inline") -> str:
    return convert(" ".join(tex.split()).replace(r"\_", "_"), display=display)


def as_markdown(text: str) -> str:
    """A docstring's roles, formulas and literal blocks in Markdown. Formulas are MathML: no script is needed."""

    def formula(match: re.Match) -> str:
        indent, tex = match[1], " ".join(match[2].split()).replace("&", "")
        lines = [mathml(line, "block") for line in tex.split(r"\\") if line.strip()]
        return "\n" + "\n".join(f"{indent}{line}" for line in lines) + "\n"

    text = re.sub(
        r"^( *)\.\. math::((?:.+\n?|\n(?=\1 +\S))(?:\1 +\S.*\n?|\n(?=\1 +\S))*)",
        formula,
        text,
        flags=re.M,
    )
    # Not at the beginning of a line, where Markdown takes it for a block of HTML.
    text = re.sub(r"(?:(?<=\S)\n *)?(:math:`[^`]+`)", r" \1", text)
    text = re.sub(r" ?( ):math:`([^`]+)`", lambda m: m[1] + mathml(m[2]), text)
    text = re.sub(r":\w+:`~(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    text = re.sub(r"`([^`<]+) <(https?://[^>]+)>`_+", r"[\1](\2)", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"::$", ":", text, flags=re.M)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
