"""Build the site from the README, RESULTS.md and the executed notebooks (make site).

    python docs/build.py             # into site/, where index.html is the start

Nothing is run again. Links between files become links between pages, and the index of equations
leads to the functions in the steps' pages.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.stem for path in ROOT.glob("0[0-9]_*.py"))
PAGES = {"README.md": "index.md", "RESULTS.md": "RESULTS.md"}
INDEX = "### Where is equation 7?"
FUNCTION = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)


def functions():
    """Find the page of every function and class: {name: step}."""
    found = {}
    for step in reversed(STEPS):  # of two with one name the earlier step's wins
        text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
        found.update(dict.fromkeys(FUNCTION.findall(text), step))
    return found


def relink(text):
    """Turn links to scripts and folders of the project into links to pages."""
    text = re.sub(r"\]\((?:\.\./)?(0\d_\w+)\.py\)", r"](\1.ipynb)", text)
    text = re.sub(r"\[([^][]+)\]\(notebooks\)", r"\1", text)  # the steps are listed at the side
    text = re.sub(r"\]\((?:\.\./|docs/)?(\w+)\.md", r"](\1.md", text)
    return text.replace("](README.md", "](index.md")


def index_of_equations(text, where):
    """Link every function of the README's index to its place in a page."""
    lines = []
    for line in text.splitlines():
        step = re.search(r"\]\((0\d_\w+)\.ipynb\)", line)
        if line.startswith("|") and step:
            cells = line.split("|")
            link = lambda m: (  # noqa: E731
                f'<a href="{where[m[1]]}.html#{m[1]}"><code>{m[1]}</code></a>'
                if m[1] in where
                else m[0]
            )
            cells[2] = re.sub(r"`(\w+)`", link, cells[2])
            line = "|".join(cells)
        lines.append(line)
    return "\n".join(lines) + "\n"


def write_pages(source):
    """Write the pages' sources into a folder."""
    where = functions()
    texts = {new: relink((ROOT / old).read_text(encoding="utf-8")) for old, new in PAGES.items()}
    begin = texts["index.md"].index(INDEX)
    end = texts["index.md"].index("\n## ", begin)
    found = index_of_equations(texts["index.md"][begin:end], where)
    texts["equations.md"] = found.replace("### ", "# ", 1)
    link = "[Where is equation 7?](equations.md) leads from each equation to its line.\n"
    texts["index.md"] = texts["index.md"][:begin] + link + texts["index.md"][end:]
    more = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    texts.update(
        {name: relink((ROOT / "docs" / name).read_text(encoding="utf-8")) for name in more}
    )
    texts["index.md"] += toctree("The steps", STEPS)
    texts["index.md"] += toctree("More", ["equations", "RESULTS", *(Path(n).stem for n in more)])
    for name, text in texts.items():
        (source / name).write_text(text, encoding="utf-8")
    for step in STEPS:
        notebook = nbformat.read(ROOT / "notebooks" / f"{step}.ipynb", as_version=4)
        nbformat.write(with_places(notebook), source / f"{step}.ipynb")
    for name in ("experiments", "docs", "benchmarks"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("results", "*.md")
        )
    for name in ("LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, source)


def toctree(caption, pages):
    """Write a list of pages for the side of every page."""
    return "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def with_places(notebook):
    """Give a notebook a place to link to before every function, and links to pages."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
        elif names := FUNCTION.findall(cell.source):
            marks = "".join(f'<span id="{name}"></span>' for name in names)
            cells.append(nbformat.v4.new_markdown_cell(marks))
        cells.append(cell)
    notebook.cells = cells
    return notebook


def build(out):
    """Build the site into a folder, which is replaced once all is done; returns Sphinx's status."""
    from sphinx.cmd.build import main

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "site"
        source.mkdir()
        write_pages(source)
        settings = ["-c", str(ROOT / "docs"), "-d", f"{folder}/trees"]
        asked = ["-b", "html", "-q", "-W", "--keep-going", *settings, str(source), str(made)]
        if status := main(asked):
            return status
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(made, out)
    print(f"the site is in {out}: open {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser("build.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site")
    sys.exit(build(parser.parse_args().out))
