"""Sphinx settings. The pages' code is executed by tests/test_docs.py, not here, so that a build takes seconds."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "elbowroom"
author = "the elbowroom developers"
copyright = "the elbowroom developers"
release = "0.1.0"
language = "en-GB"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb"}
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# Attributes are described by their class's docstring; autodoc would list them a second time.
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "elbowroom"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False

_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def _from_markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings mark code as Markdown does, by one backtick; here it becomes reStructuredText's literal."""
    for i, line in enumerate(lines):
        plain_and_code = _CODE.split(line)
        plain_and_code[::2] = [text.replace("|", r"\|") for text in plain_and_code[::2]]
        plain_and_code[1::2] = [rf"``{text}``\ " for text in plain_and_code[1::2]]
        lines[i] = "".join(plain_and_code)


def setup(app: Any) -> None:
    """Run before napoleon (priority 500), which writes roles with backticks of its own."""
    app.connect("autodoc-process-docstring", _from_markdown, priority=100)
