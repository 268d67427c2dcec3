"""The page at `/` in headless Chromium: it shows the rewards, scores a dropped picture, and lets nothing in as markup."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from services.config import FleetConfig
from services.page.router import HEADERS
from tests.integration.services.conftest import fleet, until

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page is not looked at here")
Serve = Callable[[FleetConfig], httpx.Client]
EVIL = "<img src=x onerror=\"document.title='owned'\">"


class Page:
    """One tab, over the DevTools protocol."""

    def __init__(self, socket: str) -> None:
        self._socket = connect(socket, max_size=1 << 26)
        self._next = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._next += 1
        self._socket.send(json.dumps({"id": self._next, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._next:
                assert "error" not in message, message
                return dict(message["result"])
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] != "network":
                self.complaints.append(message["params"]["entry"]["text"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))

    def run(self, script: str) -> Any:
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str) -> Any:
        # until the document is there, its elements are not
        return until(lambda: self.run(f"location.protocol !== 'about:' && document.readyState === 'complete' && ({script})"), 60)

    def give(self, *files: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[[httpx.Client], Page]]:
    """Open the page of a service."""
    assert BROWSER is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--remote-debugging-port=0", "--window-size=1100,1000"]
    browser = subprocess.Popen([BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", "about:blank"], stderr=subprocess.PIPE, text=True)
    assert browser.stderr is not None
    port = next(found[1] for line in browser.stderr if (found := re.search(r"ws://127\.0\.0\.1:(\d+)/", line)))
    threading.Thread(target=browser.stderr.read, daemon=True).start()
    pages: list[Page] = []

    def open_page(client: httpx.Client) -> Page:
        tab = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", timeout=30).json()
        pages.append(Page(tab["webSocketDebuggerUrl"]))
        pages[-1].call("Page.navigate", url=str(client.base_url))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
    browser.terminate()
    browser.wait(20)


def picture(folder: Path, name: str, grey: int) -> Path:
    path = folder / name
    Image.fromarray(np.full((24, 32, 3), grey, np.uint8)).save(path, "PNG")
    return path


@needs_browser
def test_drop_a_picture_and_see_its_scores(rest: Serve, redis_url: str, browse: Callable[[httpx.Client], Page], tmp_path: Path) -> None:
    client = rest(fleet(redis_url))
    page = browse(client)
    assert page.wait("document.querySelectorAll('#models tr').length") == 1
    assert re.match(r"mean.*ready.*image, video.*mean, frames", page.run("document.querySelector('#models').innerText"), re.DOTALL)
    page.wait("document.querySelector('#state').innerText.includes('jobs: 0 waiting, 0 running')")
    assert page.run("document.querySelector('#go').disabled") is True
    page.give(picture(tmp_path, "a.png", 40), picture(tmp_path, f"{EVIL.replace('/', '')}.png", 80))
    page.wait("document.querySelectorAll('#previews img').length === 2 && [...document.querySelectorAll('#previews img')].every(i => i.naturalWidth === 32)")
    page.run(f"document.querySelector('#prompt').value = {json.dumps('say ' + EVIL)}")
    page.run("document.querySelector('#go').click()")
    page.wait("document.querySelectorAll('#results tbody tr').length === 2")
    text = page.run("document.querySelector('#results').innerText")
    assert re.search(r"\b40\b", text)
    assert re.search(r"\b80\b", text)
    assert f"read: {EVIL}" in text, "what a scorer says is shown as text"
    assert page.run("document.querySelectorAll('#results img, #drop-text img').length") == 0
    assert page.run("document.title") == "ddrl rewards"
    page.wait("document.querySelector('#models').innerText.includes(' ms')")
    if folder := os.environ.get("DDRL_SCREENSHOTS"):
        page.picture(Path(folder) / "page.png")
    own = str(client.base_url).rstrip("/")
    assert {url.partition("?")[0] for url in page.requests if not url.startswith(("blob:", "data:", own, "about:"))} == set(), "nothing comes from elsewhere"
    assert page.complaints == [], "the security policy was not tripped over"


@needs_browser
def test_failures_are_shown_and_the_policy_holds(rest: Serve, redis_url: str, browse: Callable[[httpx.Client], Page], tmp_path: Path) -> None:
    page = browse(rest(fleet(redis_url)))
    page.wait("document.querySelectorAll('#choices input').length === 1")
    page.give(picture(tmp_path, "a.png", 40))
    page.run("document.querySelector('#prompt').value = 'fail'; document.querySelector('#go').click()")
    assert "fail: as asked" in page.wait("document.querySelector('#results').innerText")
    broken = tmp_path / "b.png"
    broken.write_bytes(b"no picture")
    page.give(broken)
    page.run("document.querySelector('#go').click()")
    page.wait("document.querySelector('#results').innerText.includes('media_invalid')")
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = true\"><script>window.owned = true</' + 'script>')")
    page.wait("new Promise(r => setTimeout(() => r(true), 300))")
    assert page.run("window.owned === undefined") is True


@needs_browser
def test_with_keys_the_page_asks_for_one_and_keeps_it_in_memory(rest: Serve, redis_url: str, browse: Callable[[httpx.Client], Page], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("me score my-secret-0123456789\n")
    keys.chmod(0o600)
    page = browse(rest(fleet(redis_url, keys_file=str(keys))))
    page.wait("document.querySelector('#state').innerText.includes('key_missing')")
    page.run("const k = document.querySelector('#key'); k.value = 'wrong'; k.dispatchEvent(new Event('change'))")
    page.wait("document.querySelector('#state').innerText.includes('key_unknown')")
    page.run("{ const k = document.querySelector('#key'); k.value = 'my-secret-0123456789'; k.dispatchEvent(new Event('change')) }")
    page.wait("document.querySelectorAll('#models tr').length === 1")
    page.give(picture(tmp_path, "a.png", 40))
    page.run("document.querySelector('#go').click()")
    page.wait("document.querySelectorAll('#results tbody tr').length === 1")
    assert page.run("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert not any("my-secret" in url for url in page.requests)


def test_the_page_and_its_headers(rest: Serve) -> None:
    client = rest(fleet(None))
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"https?://|//[a-z]|@import|<link(?! rel=\"icon\" href=\"data:)", answer.text), "self-contained"
    assert not re.search(r"\son[a-z]+=|innerHTML|insertAdjacentHTML|document\.write|\beval\b|style=", answer.text)
