"""Settings of Sphinx for the site that docs/build.py puts together."""

from docutils import nodes

project = "Multistage diffusion models"
author = "the authors of this project"
copyright = "its authors, MIT licence"
extensions = ["myst_nb", "sphinx-mathjax-offline"]  # MathJax from a package, not from a host
nb_execution_mode = "off"  # the notebooks are committed with their outputs
nb_code_prompt_show = "Imports and settings"  # all that docs/build.py folds
nb_code_prompt_hide = nb_code_prompt_show
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
# A lesson's parts may begin with a smaller heading; outputs of tqdm are no language
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sphinx = False
html_copy_source = False
html_use_index = False


def fold_what_is_below(app, doctree):
    """Put everything from a step's line on into a part of the page that is opened by a click."""
    for section in list(doctree.findall(nodes.section)):
        if section.next_node(nodes.title).astext().startswith("Below this line"):
            begin = nodes.raw("", '<details class="below"><summary>Below the line</summary>')
            end = nodes.raw("", "</details>")
            begin["format"] = end["format"] = "html"
            section.parent.insert(section.parent.index(section), begin)
            section.parent.append(end)


def setup(app):
    """Let Sphinx call `fold_what_is_below` for every page."""
    app.connect("doctree-read", fold_what_is_below)
    return {"parallel_read_safe": True}
