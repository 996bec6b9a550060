"""The text that evaluation reads: real prose that calibration never sees."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_NOT_PROSE = re.compile(r"^\s|^[-*=.:+|@]|>>>|::|--", re.MULTILINE)


@cache
def default_evaluation_text() -> str:
    """Prose from the docstrings of Python's standard library: about 600,000 characters.

    It shares nothing with the language reference that calibration uses by default (`moa.search.text.default_text`).
    """
    paragraphs = dict.fromkeys(_prose())  # in order, without the many that occur twice
    return "\n\n".join(paragraphs)


def _prose() -> Iterator[str]:
    """Paragraphs of full sentences from all docstrings, each on one line."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of bad code
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                letters = sum(character.isalpha() or character.isspace() for character in paragraph)
                if len(paragraph) >= 120 and letters >= 0.9 * len(paragraph) and not _NOT_PROSE.search(paragraph):
                    yield " ".join(paragraph.split())
