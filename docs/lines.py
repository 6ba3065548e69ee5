"""Keep the links from README.md and docs/equations.md to lines of the steps true.

    python docs/lines.py        # rewrites the numbers; a test says when that is needed

A link [`similarity`](02_clustering.py#L95) leads to the line of that function which is tagged with
what stands in the first cell of the link's row, as by `# Eq. 6`; without a tag to its first line.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "equations.md"]
LINK = re.compile(r"(\[`(\w+)`\]\((?:\.\./)?(0\d_\w+)\.py#L)\d+\)")


def find_line(step, name, what):
    """Find the line of function `name` that is tagged with `what`: (number, text of the line)."""
    lines = (ROOT / f"{step}.py").read_text(encoding="utf-8").splitlines()
    begin = next((i for i, x in enumerate(lines) if re.match(rf"(def |class )?{name}\b", x)), None)
    if begin is None:
        raise ValueError(f"{step}.py has no {name}: its row {what!r} leads nowhere")
    inside = [begin]
    for i in range(begin + 1, len(lines)):
        if re.match(r"[^\s)]", lines[i]):  # the next thing of the file
            break
        inside.append(i)
    tag = re.compile(rf"# {re.escape(what)}(?!\w)")
    found = next((i for i in inside if tag.search(lines[i])), begin)
    return found + 1, lines[found]


def relink(text):
    """Put the true numbers into all links of a page."""
    rows = []
    for row in text.splitlines(keepends=True):
        what = row.strip("| \n").split("|")[0].strip()
        rows.append(LINK.sub(lambda m, w=what: f"{m[1]}{find_line(m[3], m[2], w)[0]})", row))
    return "".join(rows)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(relink(page.read_text(encoding="utf-8")), encoding="utf-8")
