"""A real headless browser, and a strict reader of pages for machines without one.

The browser is spoken to over its debugging pipe (the Chrome DevTools Protocol), so that nothing but
the browser itself is needed.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})
LIMIT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Opened:
    """A page as the browser sees it.

    Attributes:
        title: Of the document.
        text: All that can be read.
        images: Pixels (width, height) of each picture; (0, 0) if it cannot be shown.
        width: Of everything, in pixels; wider than the window if something sticks out.
        requests: Addresses that the page asked for, itself and embedded data left out.
        complaints: What the browser has to say about it.
        screenshot: PNG of the whole page.
    """

    title: str
    text: str
    images: tuple[tuple[int, int], ...]
    width: int
    requests: tuple[str, ...]
    complaints: tuple[str, ...]
    screenshot: bytes


def open_in_browser(page: Path, *, width: int = 1200) -> Opened:
    """Open a file in a headless Chromium; skips the test where there is none.

    Args:
        page: An HTML file.
        width: Of the window, in pixels.
    """
    names = (name for name in _NAMES if shutil.which(name))
    program = next(names, None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is on the path")
    with _running(program, width) as browser:
        return _visit(browser, page.resolve().as_uri())


class _Browser:
    """One end of the debugging pipe: messages are JSON, each ended by a zero byte."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def wait_for(self, method: str) -> None:
        while all(event.get("method") != method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._back, 2**20)
            assert piece, "the browser has gone away"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


@contextmanager
def _running(program: str, width: int) -> Iterator[_Browser]:
    read_there, write_here = os.pipe()
    read_here, write_there = os.pipe()
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:

        def place_pipes() -> None:
            # The protocol's descriptors are 3 and 4; by way of high ones, which are nobody's.
            os.dup2(read_there, 203)
            os.dup2(write_there, 204)
            os.dup2(203, 3)
            os.dup2(204, 4)

        process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",  # a container's root has no user namespaces to give away
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--no-first-run",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                f"--window-size={width},900",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place_pipes,
            close_fds=False,
        )
        os.close(read_there)
        os.close(write_there)
        try:
            yield _Browser(write_here, read_here)
        finally:
            process.kill()
            process.wait()
            os.close(write_here)
            os.close(read_here)


def _visit(browser: _Browser, address: str) -> Opened:
    target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
    session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
        browser.ask(f"{domain}.enable", session)
    browser.ask("Page.navigate", session, url=address)
    browser.wait_for("Page.loadEventFired")
    deadline = time.monotonic() + LIMIT_SECONDS

    def evaluate(expression: str) -> Any:
        assert time.monotonic() < deadline, f"the browser took over {LIMIT_SECONDS} s"
        answer = browser.ask("Runtime.evaluate", session, expression=expression, returnByValue=True)
        return answer["result"].get("value")

    images = evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
    title, text = evaluate("document.title"), evaluate("document.body.innerText")
    width = evaluate("document.documentElement.scrollWidth")
    shot = browser.ask("Page.captureScreenshot", session, captureBeyondViewport=True)
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    return Opened(
        title,
        text,
        tuple((w, h) for w, h in images),
        width,
        tuple(url for url in asked if url != address and not url.startswith("data:")),
        tuple(_complaints(browser.events)),
        base64.b64decode(shot["data"]),
    )


def _complaints(events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        if event.get("method") == "Log.entryAdded":
            yield event["params"]["entry"]["text"]
        elif event.get("method") == "Runtime.exceptionThrown":
            yield event["params"]["exceptionDetails"]["text"]


# --------------------------------------------------------------------------------------------------
# Without a browser.


@dataclass(slots=True)
class Read:
    """What a page consists of.

    Attributes:
        images: Content of each picture, decoded.
        text: All text outside of style sheets.
        ids: Every id.
        links: Every reference within the page, without its `#`.
    """

    images: list[bytes] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


class _Strict(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Read()
        self._open: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "link"), f"a page has no <{tag}>"
        if tag not in _VOID:
            self._open.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag}> has a handler, {name}"
            if name == "id":
                self.page.ids.append(value or "")
            elif name in ("src", "href", "action", "data", "srcset", "poster"):
                self._refer(tag, name, value or "")
        if tag == "img":
            assert dict(attrs).get("alt"), "a picture needs a description"

    def _refer(self, tag: str, name: str, value: str) -> None:
        if value.startswith("#"):
            self.page.links.append(value[1:])
            return
        kind, _, encoded = value.partition(";base64,")
        assert (tag, name) == ("img", "src"), f"<{tag}> refers to {value[:60]!r}"
        assert kind in ("data:image/png", "data:image/svg+xml"), f"<img> loads {value[:60]!r}"
        try:
            content = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise AssertionError("a picture is no base64") from error
        if kind == "data:image/png":
            _check_png(content)
        self.page.images.append(content)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    @override
    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            assert "url(" not in data, "a style sheet refers to something"
            assert "@import" not in data, "a style sheet refers to something"
        else:
            self.page.text.append(data)

    @override
    def close(self) -> None:
        super().close()
        assert not self._open, f"never closed: {self._open}"


def read_strictly(page: str) -> Read:
    """Read a page that refers to nothing outside of itself.

    Args:
        page: HTML.

    Raises:
        AssertionError: A tag is not closed, something is fetched or run, a picture cannot be
            decoded, an id is there twice, or a link leads nowhere.
    """
    parser = _Strict()
    parser.feed(page)
    parser.close()
    found = parser.page
    assert len(found.ids) == len(set(found.ids)), "an id is there twice"
    assert set(found.links) <= set(found.ids), "a link leads nowhere"
    return found


def _check_png(content: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        image.load()
