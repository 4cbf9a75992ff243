# SPDX-License-Identifier: AGPL-3.0-or-later
"""How Sphinx builds these pages: `sphinx-build -W --keep-going -n docs build/docs`."""

from __future__ import annotations

import os
import tempfile

# Ultralytics reads these once, when it is first imported.
os.environ |= {"MPLBACKEND": "Agg", "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": tempfile.mkdtemp(prefix="yolo-prune-docs-")}

from yolo_prune import __version__

project = "yolo-prune"
copyright = "yolo-prune developers, AGPL-3.0-or-later"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["*.py"]
highlight_language = "text"
default_role = "literal"  # docstrings mark code with single backticks, as Markdown does

myst_heading_anchors = 4  # links to headings, as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# What the signatures name and these pages do not describe: Python's own types, those of other packages, our inner ones.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = project
html_static_path = ["static", "images"]  # the style sheet names a picture
html_css_files = ["docs.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_search_summary = False  # these are fetched, which browsers refuse to pages that are files
html_theme_options = {"navigation_with_keys": True}
