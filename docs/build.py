"""Build the site from the README, RESULTS.md and the executed notebooks (make site).

    python docs/build.py             # into site/, where index.html is the start

Nothing is run again. Links between files become links between pages, and links to lines of the
steps lead to their functions in the steps' pages.
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
MORE = "equations reproduced samples commands machines differences"
MORE = ["RESULTS", *MORE.split(), "house", "teaching", "troubleshooting"]
PLACE = re.compile(r"^(?:def |class |(?=[A-Z]\w* = [A-Z]\w*\())(\w+)", re.MULTILINE)

FOLDED = {"imports", "parameters", "draws"}  # tags of cells that are no part of the lesson
PROMPTS = "code_prompt_show", "code_prompt_hide"  # what stands where a cell is folded


def relink(text):
    """Turn links to scripts and folders of the project into links to pages."""
    place = r'<a href="\2.html#\1"><code>\1</code></a>'
    text = text.replace("](../", "](")
    text = re.sub(r"\[`(\w+)`\]\((0\d_\w+)\.py#L\d+\)", place, text)
    text = re.sub(r"\]\((?:notebooks/)?(0\d_\w+)\.(?:py|ipynb)\)", r"](\1.ipynb)", text)
    text = re.sub(r"\]\((?:docs/)?(\w+)\.md", r"](\1.md", text)
    return text.replace("](README.md", "](index.md")


def write_pages(source):
    """Write the pages' sources into a folder."""
    pages = PAGES | {f"docs/{name}.md": f"{name}.md" for name in MORE[1:]}
    texts = {new: relink((ROOT / old).read_text(encoding="utf-8")) for old, new in pages.items()}
    texts["index.md"] += toctree("The steps", STEPS) + toctree("More", MORE)
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
    """Give a notebook places to link to, links to pages, and one folded cell for its settings."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
        elif FOLDED & set(cell.metadata.get("tags", [])):
            if "draws" in cell.metadata["tags"]:  # else it says what docs/conf.py says
                cell.metadata["mystnb"] = dict.fromkeys(PROMPTS, "How this is drawn")
            cell.metadata["tags"] = ["hide-input"]  # which MyST-NB folds
            if "mystnb" not in cell.metadata and cells[-1].metadata.get("tags") == ["hide-input"]:
                cells[-1].source += "\n\n" + cell.source
                continue
        elif names := PLACE.findall(cell.source):
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
