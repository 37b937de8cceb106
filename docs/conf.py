"""Sphinx configuration; built by `make docs`, without network."""

from helios import __version__

project = "Helios"
author = "The Helios developers"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write `name`
nitpicky = False  # torch and Accelerate are not in reach: nothing is downloaded

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"Helios {version}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["helios.css"]


def _keep_whole(app, what, name, obj, options, lines):
    # Napoleon takes what stands before a colon in an attribute's text as its type.
    if what == "attribute":
        lines[:0] = ["..", ""]


def setup(app):
    app.connect("autodoc-process-docstring", _keep_whole, priority=400)
