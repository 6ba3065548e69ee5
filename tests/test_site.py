"""The site: its links, and its pages in a real browser, where the system has Chromium."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, STEPS

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
if importlib.util.find_spec("myst_nb") is None:
    pytest.skip("make site installs what the site needs", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from what the project has now."""
    out = tmp_path_factory.mktemp("site") / "site"
    asked = [sys.executable, ROOT / "docs" / "build.py", "--out", out]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Page(HTMLParser):
    """Collect what a page links to, what it loads, and the places that it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.places = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places.add(found.get("id"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif "src" in found or (tag == "link" and found.get("rel") != "canonical"):
            self.loads.append(found.get("src") or found.get("href"))


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_a_host(site):
    pages = {path: Page(path) for path in site.glob("*.html")}
    assert {f"{step}.html" for step in STEPS} <= {path.name for path in pages}
    dead, hosts = [], []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme == "data" or (parts.scheme and link in page.links):
                continue
            if parts.scheme or parts.netloc:
                hosts.append((path.name, link))
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there, anchor = target.is_file(), unquote(parts.fragment)
            if there and anchor and target in pages:
                there = anchor in pages[target].places
            dead += [] if there else [(path.name, link)]
    assert (dead, hosts) == ([], [])
    assert (site / "equations.html").read_text(encoding="utf-8").count(".html#") > 50


LOOK = """<body><script>
onload = async () => {
  const found = [];
  for (const page of PAGES) for (const width of [390, 1280]) {
    const frame = document.createElement("iframe");
    frame.style = `width: ${width}px; height: 1000px`;
    const loaded = new Promise(done => frame.onload = done);
    frame.src = page; document.body.append(frame); await loaded;
    const inside = frame.contentDocument, math = [...inside.querySelectorAll(".math")];
    await frame.contentWindow.MathJax?.startup?.promise;
    found.push({page, width, formulas: math.length,
      set: math.filter(part => part.querySelector("mjx-container")).length,
      failed: inside.querySelectorAll("mjx-merror, [data-mjx-error]").length,
      wide: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
      below: inside.querySelectorAll("details.below").length,
      folded: Boolean(inside.querySelector("div.cell")?.querySelector("details.hide"))});
    frame.remove();
  }
  document.body.textContent = JSON.stringify(found);
}</script>"""


@pytest.mark.skipif(not BROWSER, reason="this machine has no Chromium")
def test_every_page_in_a_browser(site, tmp_path):
    """No error in the console, every formula set, nothing too wide, on a phone and on a desk."""
    pages = [path.as_uri() for path in sorted(site.glob("*.html"))]
    (tmp_path / "look.html").write_text(LOOK.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom"]
    flags += ["--virtual-time-budget=600000", (tmp_path / "look.html").as_uri()]
    done = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1])
    for seen in found:
        print(seen)
        step = Path(seen["page"]).stem
        assert seen["formulas"] == seen["set"] and not seen["failed"] and seen["wide"] <= 0, seen
        assert seen["below"] == (step in STEPS[1:7]), seen
        assert seen["folded"] == (step in STEPS), seen  # imports and settings, the first cell
    assert len(found) == 2 * len(pages) and sum(seen["formulas"] for seen in found) > 500
