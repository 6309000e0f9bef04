"""The pages in a browser, wide and narrow, light and dark: nothing sticks out, no error, no dead link, no lost picture.

A page of ours opens each page of the site in a frame, looks at it, and posts what it saw to the server of the test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the path"),
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'"),
    pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs mkdocstrings"),
]
LOOK = """<!doctype html><meta charset="utf-8"><iframe id="frame" style="border:0"></iframe><script>
const frame = document.getElementById("frame"), pages = PAGES, seen = [], known = {};
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function there(address) {
  known[address] ??= fetch(address).then(async (answer) => answer.ok
    && new Set([...(await answer.text()).matchAll(/ id="([^"]+)"/g)].map((found) => found[1])));
  return known[address];
}
async function open(page) {
  frame.width = 390; frame.height = 900;
  await new Promise((done) => { frame.onload = done; frame.src = page; });
  for (const image of frame.contentDocument.images) {
    image.loading = "eager";
    await image.decode().catch(() => {});
  }
}
async function look(page, width, scheme) {
  const view = frame.contentWindow, html = frame.contentDocument;
  frame.width = width;
  html.body.setAttribute("data-md-color-scheme", scheme);
  for (let n = 0; n < 20 && (!n || html.documentElement.scrollWidth > view.innerWidth); n++) await wait(50);
  const dead = [];
  const links = scheme === "default" ? html.querySelectorAll(".md-content a[href], .md-nav a[href]") : [];
  for (const address of new Set([...links].map((link) => link.href))) {
    const url = new URL(address), id = decodeURIComponent(url.hash.slice(1));
    if (url.origin !== location.origin) continue;
    const ids = await there(url.pathname);
    if (!ids || (id && !ids.has(id) && !html.getElementById(id))) dead.push(url.pathname + url.hash);
  }
  const wide = (part) => part.getBoundingClientRect().right > view.innerWidth + 1;
  const sticking = [...html.querySelectorAll(".md-content__inner > *")].filter(
    (part) => wide(part) && view.getComputedStyle(part).overflowX === "visible");
  seen.push({ page, width, scheme, dead,
    overflow: html.documentElement.scrollWidth - view.innerWidth,
    sticking: sticking.map((part) => part.tagName + " " + part.textContent.slice(0, 60)),
    lost: [...html.images].filter((image) => !image.naturalWidth).map((image) => image.src),
    filtered: html.querySelector(".filters output")?.textContent ?? null });
}
(async () => {
  try {
    for (const page of pages) {
      await open(page);
      for (const [width, scheme] of [[390, "slate"], [1400, "default"]]) await look(page, width, scheme);
    }
  } catch (error) { seen.push({ page: "look", failed: String(error) }); }
  await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
})();
</script>"""


class Server(SimpleHTTPRequestHandler):
    """Serves the site, and takes what was seen."""

    seen: list[dict[str, Any]]
    told = threading.Event()

    def do_POST(self) -> None:
        type(self).seen = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.told.set()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    site, log = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("log") / "browser"
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "--site-dir", str(site)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    pages = sorted(f"/{path.relative_to(site)}" for path in site.rglob("*.html") if path.name != "404.html")
    (site / "look.html").write_text(LOOK.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}", f"http://127.0.0.1:{server.server_port}/look.html",
    ]  # fmt: skip
    with log.open("w") as out, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=out) as browser:
        answered = Server.told.wait(180)
        browser.terminate()
    server.shutdown()
    server.server_close()
    assert answered, log.read_text()[-2000:]
    return Server.seen, log.read_text()


def test_nothing_sticks_out_and_nothing_is_lost(seen: tuple[list[dict[str, Any]], str]) -> None:
    pages = seen[0]
    assert len(pages) > 30, pages
    for page in pages:
        assert "failed" not in page, page
        where = page["page"], page["width"]
        assert page["overflow"] <= 0, where
        assert not page["sticking"], where
        assert not page["lost"], where
        assert not page["dead"], where


def test_the_console_tells_no_error(seen: tuple[list[dict[str, Any]], str]) -> None:
    told = [line for line in seen[1].splitlines() if ":CONSOLE" in line and ("Uncaught" in line or "Failed" in line)]
    assert not told


def test_conformance_can_be_filtered(seen: tuple[list[dict[str, Any]], str]) -> None:
    counted = {page["filtered"] for page in seen[0] if page.get("page") == "/conformance.html"}
    assert len(counted) == 1
    assert counted.pop().endswith(" cases")
