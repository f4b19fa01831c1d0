"""The documentation site: `make docs`. The same files are read on their own, without Sphinx."""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "docs")]

from settings_tables import find, markdown  # noqa: E402

from fomoe_pl import __version__  # noqa: E402

project, author, release = "fomoe-pl", "the fomoe-pl developers", __version__
copyright = "the fomoe-pl developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fomoe-pl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
myst_heading_anchors = 4
nb_execution_mode = "off"  # a test runs the notebooks; their outputs are kept with them
highlight_language = "none"  # of blocks that name none
default_role = "code"  # docstrings have single backticks
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_use_ivar = True  # attributes of a dataclass in one list, as parameters
suppress_warnings = ["myst.strikethrough"]

PAGES = {ROOT / "README.md": "index", ROOT / "CONTRIBUTING.md": "contributing", ROOT / "CHANGELOG.md": "changelog"}


def adapted(text: str, page: Path, written: Path) -> str:
    """A page's text with links that lead where they should on the site.

    Args:
        text: Markdown.
        page: The site's page, below docs/.
        written: The file that the text is from, whose folder its links start in.
    """

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        path = (written.parent / target).resolve()
        up = "../" * len(page.relative_to(DOCS).parents[:-1])
        if path in PAGES:
            return f"[{words}]({up}{PAGES[path]}.md{anchor})"
        if path.is_relative_to(DOCS) and path.is_file():
            return f"[{words}]({up}{path.relative_to(DOCS)}{anchor})"
        return f"{words} (`{path.relative_to(ROOT)}`)" if words.strip("`") not in str(path) else words

    return re.sub(r"(?<!!)\[([^]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Whole files of the repository's root are pages of the site too; links are made to fit."""
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    for path, name in PAGES.items():
        if name == docname:
            app.env.note_dependency(str(path))
            text = adapted(path.read_text(), page, path).replace("](docs/", "](")
            content[0] = f"{text}\n{content[0]}"
            return
    content[0] = adapted(content[0], page, page)
    if (docname.startswith("benchmarks/") and docname != "benchmarks/README") or docname == "system-model/scale":
        content[0] = f"---\norphan: true\nnosearch: true\n---\n{content[0]}"  # records, which other pages name


class Settings(SphinxDirective):
    """A table of settings, from a class or function."""

    required_arguments = 1
    option_spec = {"only": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """The table's nodes."""
        only = [key.strip() for key in self.options["only"].split(",")] if "only" in self.options else None
        lines = markdown(find(self.arguments[0]), only).splitlines()
        around = nodes.container(classes=["settings"])
        self.state.nested_parse(StringList(lines, self.arguments[0]), 0, around)
        return [around]


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.add_directive("settings", Settings)
    app.connect("source-read", read)
