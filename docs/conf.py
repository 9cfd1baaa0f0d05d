"""Settings of the documentation; `make docs` builds it, with or without a network."""

import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as installed_version
from pathlib import Path
from textwrap import indent

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent))
import records

project = "scrdit_diffusers"
author = "the scrdit_diffusers developers"
version = release = installed_version("scrdit-diffusers")

extensions = [
    "myst_nb",  # Markdown as well
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_generated"]
nitpicky = True
html_theme = "furo"
html_title = "scrdit_diffusers"
html_math_renderer = "mathml"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
smartquotes = False  # two hyphens begin a flag
copybutton_prompt_text = ">>> "

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown with the outputs that they store
nb_ipywidgets_js = {}  # no script from elsewhere

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_custom_sections = ["Returns", "Yields"]  # they hold sentences, without a type in the first line
default_role = "code"  # `name` in a docstring


def is_reachable(address: str) -> bool:
    """Whether the inventory of another project can be read now."""
    try:
        urllib.request.urlopen(f"{address}objects.inv", timeout=5).close()
    except OSError:
        return False
    return True


OTHER_DOCS = {
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "python": "https://docs.python.org/3/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "sklearn": "https://scikit-learn.org/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
with ThreadPoolExecutor() as pool:
    reachable = list(pool.map(is_reachable, OTHER_DOCS.values()))
intersphinx_mapping = {
    name: (address, None) for (name, address), there in zip(OTHER_DOCS.items(), reachable, strict=True) if there
}
# Links of this package must resolve, and so must its types. Those of others do where their inventory was reached.
nitpick_ignore_regex = [("py:(?!obj).*", r"(?!scrdit_diffusers\b).*"), ("py:obj", r"None|typing\..*|diffusers\..*")]


def convert_docstring(app, what, name, obj, options, lines):
    """Turn what docstrings share with diffusers into reStructuredText: links, indented formulas and fenced code."""
    text = re.sub(r"\[`~?(?:scrdit_diffusers\.(?:[a-z_]+\.)*)?([\w.]+)`\]", r":py:obj:`.\1`", "\n".join(lines))
    text = re.sub(r"(?m)^( *)(\S.*\n\n)(?=\1 +\S)", r"\1\2\1::\n\n", text)
    fenced = r"(?ms)^```python\n(.*?)^```$"
    text = re.sub(fenced, lambda code: ".. code-block:: python\n\n" + indent(code[1], "   "), text)
    lines[:] = text.split("\n")


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the fields of a NamedTuple, which its parameters describe."""
    return skip or str(obj.__doc__).startswith("Alias for field number")


# Where the targets of links that leave docs/ are on this site.
PAGES = {
    "../training/LOG.md": "log.md",
    "../hub_cards/space/README.md": "how-to.md",
    "../hub_cards)": "quality.md)",
}


def convert_links(app, docname, content):
    """Point links that work in the repository at pages of this site."""
    for there, here in PAGES.items():
        content[0] = content[0].replace(f"]({there}", f"]({here}")


def show_math(self, node):
    """Write a formula as MathML, which browsers draw without a script from elsewhere."""
    is_block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=is_block)
    self.body.append(f'<div style="padding: 0.5em 0">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode


def setup(app):
    """Write what the pages include, and register the functions above."""
    records.write_all()
    app.connect("source-read", convert_links)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (show_math, None), (show_math, None))
