"""The site, opened in a real browser: headless Chromium, where the system has it."""

import asyncio
import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, STEPS

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
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
            anchor = unquote(parts.fragment)
            there = target.is_file()
            if there and anchor and target in pages:
                there = anchor in pages[target].places
            dead += [] if there else [(path.name, link)]
    assert (dead, hosts) == ([], [])


def test_the_index_of_equations_leads_into_the_pages(site):
    text = (site / "equations.html").read_text(encoding="utf-8")
    assert text.count(".html#") > 50
    assert 'href="02_clustering.html#similarity"' in text


class Browser:
    """Speak with Chromium through its DevTools protocol."""

    def __init__(self, folder):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        flags += [f"--user-data-dir={folder}", "--allow-file-access-from-files", "about:blank"]
        self.process = subprocess.Popen([BROWSER, *flags], stderr=subprocess.DEVNULL)
        port = folder / "DevToolsActivePort"
        for _ in range(600):
            if port.is_file() and port.read_text(encoding="utf-8").count("\n"):
                break
            time.sleep(0.1)
        self.port, self.count = int(port.read_text(encoding="utf-8").split()[0]), 0

    async def connect(self):
        from tornado import httpclient, websocket

        where = f"http://127.0.0.1:{self.port}/json"
        found = await httpclient.AsyncHTTPClient().fetch(where)
        (tab,) = [tab for tab in json.loads(found.body) if tab["type"] == "page"]
        self.socket = await websocket.websocket_connect(
            tab["webSocketDebuggerUrl"], max_message_size=2**28
        )
        self.events = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.ask(f"{domain}.enable")

    async def ask(self, method, **parameters):
        self.count += 1
        said = dict(id=self.count, method=method, params=parameters)
        await self.socket.write_message(json.dumps(said))
        while True:
            message = json.loads(await asyncio.wait_for(self.socket.read_message(), 60))
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def evaluate(self, code):
        result = await self.ask(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def visit(self, address, width, height=1000):
        """Open a page and wait until its formulas are set; returns what went wrong."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        await self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        await self.ask("Page.navigate", url=address)
        ready = (
            "document.readyState == 'complete' && (!window.MathJax || !!MathJax.startup?.promise)"
        )
        for _ in range(300):
            if await self.evaluate(f"location.href != 'about:blank' && {ready}"):
                break
            await asyncio.sleep(0.1)
        await self.evaluate("window.MathJax ? MathJax.startup.promise.then(() => 1) : 1")
        wrong = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        logs = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        wrong += [entry for entry in logs if entry["level"] == "error"]
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [e["params"]["request"]["url"] for e in sent]
        return wrong + [url for url in urls if urlsplit(url).scheme not in ("file", "data", "blob")]

    async def screenshot(self, path):
        """Keep a picture of the whole page, for whoever wants to look at it."""
        picture = await self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(picture["data"]))


LOOK = """(() => {
  const math = [...document.querySelectorAll('.math')];
  return {
    formulas: math.length,
    set: math.filter(part => part.querySelector('mjx-container')).length,
    failed: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    folded: document.querySelectorAll('details.below').length,
    title: document.title,
  };
})()"""


@pytest.mark.skipif(not BROWSER, reason="this machine has no Chromium")
def test_every_page_in_a_browser(site, tmp_path):
    """No error in the console, nothing from a host, every formula set, nothing too wide."""

    async def look():
        browser = Browser(tmp_path)
        try:
            await browser.connect()
            found = {}
            for path in sorted(site.glob("*.html")):
                for width in (390, 1280):
                    wrong = await browser.visit(path.as_uri(), width)
                    found[path.name, width] = dict(wrong=wrong, **await browser.evaluate(LOOK))
                    if folder := os.environ.get("SCREENSHOTS"):
                        await browser.screenshot(f"{folder}/{path.stem}-{width}.png")
            return found
        finally:
            browser.process.kill()

    found = asyncio.run(look())
    for (name, width), seen in found.items():
        print(name, width, seen)
        assert not seen["wrong"], (name, seen)
        assert seen["formulas"] == seen["set"] and not seen["failed"], (name, seen)
        assert seen["wide"] <= 0, (name, width, seen)
        assert seen["folded"] == (name.removesuffix(".html") in STEPS[1:7]), name
    assert sum(seen["formulas"] for seen in found.values()) > 500
    assert re.match(r"01 · ", found["01_sde_and_denoiser.html", 390]["title"])
