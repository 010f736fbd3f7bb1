"""The site: Sphinx with Furo and MyST. `make docs` builds it, warnings as errors.

Sphinx rather than mkdocs-material: Sphinx builds the reference from docstrings and fails on an
unknown name or link (`-n -W`). mkdocs-material gets only bug fixes since the end of 2025.
"""

import ray_zerocopy
from sphinx.ext.napoleon import GoogleDocstring

project = "ray-zerocopy"
author = "the ray-zerocopy authors"
copyright = author  # noqa: A001 - the name Sphinx reads
version = release = ray_zerocopy.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "ray-zerocopy"
html_static_path = ["_static"]
html_css_files = ["site.css"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Returns", "params_style")]
# Annotations give the types of attributes: napoleon takes what precedes a colon for the type.
GoogleDocstring._consume_inline_attribute = lambda self: ("", self._dedent(self._consume_to_end()))

copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

nitpicky = True
# Names of other projects are not linked, so that the build needs no network.
nitpick_ignore_regex = [(r"py:.*", r"(?!ray_zerocopy).*|.*\._.*")]
linkcheck_ignore = [r"https?://(localhost|127\.0\.0\.1).*"]
