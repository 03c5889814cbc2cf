"""Operates the web page in a real Chromium and fails on console errors, policy violations and requests to other hosts."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from listening import Samples
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, Request, expect, sync_playwright

RESULTS = Path(__file__).resolve().parent.parent / "test-results"

_NAMES = (
    "chromium-headless-shell",  # the same engine without the browser around it: half of the processor time
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
_FLAGS = [
    "--no-sandbox",  # needed to run as root; it opens only our own page
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


# A slow page on a busy machine is not an error.
expect.set_options(timeout=30_000)


def find_chromium() -> str | None:
    """Return the path of Chromium or Chrome; the variable CHROMIUM overrides it."""
    return os.environ.get("CHROMIUM") or next((found for name in _NAMES if (found := which(name))), None)


@contextmanager
def running_chromium() -> Iterator[Browser]:
    """Run a headless browser, or skip the test if there is none."""
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium-headless-shell`, or CHROMIUM=/path/to/it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One visit to the page, in a browser profile in which nothing is stored.

    Attributes:
        page: Playwright's page.
        context: Its profile.
        faults: Errors that a user would not see.
        refusals: Responses with status 4xx and 5xx; a test that causes them sets `expect_refusals`.
    """

    page: Page
    context: BrowserContext
    url: str
    faults: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    expect_refusals: bool = False

    def watch(self) -> None:
        """Start to record faults."""
        self.page.on("console", self._console)
        self.page.on("pageerror", self._exception)
        self.context.on("request", self._request)

    def leave(self) -> None:
        """Forget all that the visit has left in the browser, so that another one can use its page."""
        self.page.remove_listener("console", self._console)
        self.page.remove_listener("pageerror", self._exception)
        self.context.remove_listener("request", self._request)
        self.context.set_offline(False)
        for other in self.context.pages:
            if other != self.page:
                other.close()
        self.page.mouse.move(0, 0)
        self.page.evaluate("addEventListener('pagehide', () => sessionStorage.clear())")  # after the page's own, which writes to it
        self.page.goto("about:blank")
        browser = self.context.new_cdp_session(self.page)
        browser.send("Storage.clearDataForOrigin", {"origin": "://".join(urlsplit(self.url)[:2]), "storageTypes": "all"})
        browser.send("Network.clearBrowserCache")
        browser.detach()

    def _exception(self, error: Error) -> None:
        self.faults.append(f"exception: {error}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            kept = self.refusals if message.text.startswith("Failed to load resource") else self.faults
            kept.append(f"{message.type}: {message.text}")

    def _request(self, request: Request) -> None:
        self.requested.append(request.url)
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data") and parts.netloc != urlsplit(self.url).netloc:
            self.faults.append(f"foreign request: {request.url}")

    def check(self) -> None:
        """Fail if a fault was recorded."""
        assert self.faults == [], self.faults
        assert self.expect_refusals or self.refusals == [], self.refusals

    def open(self) -> None:
        """Load the page and wait for its voices."""
        self.page.goto(self.url)
        self.page.locator(".voice input").first.wait_for()

    def speak(self, text: str) -> None:
        """Type a text and speak it; this replaces the current playback."""
        self.page.fill("#text", text)
        self.page.keyboard.press("Control+Enter")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Return the first truthy value of a JavaScript expression.

        The page looks by itself: a round trip for each look takes more processor time than what is waited for. (Playwright's own waiting
        needs `eval`, which our policy forbids.)
        """
        value = self.page.evaluate(
            f"""async () => {{
                const deadline = performance.now() + {seconds * 1000};
                while (performance.now() < deadline) {{
                    const value = {expression};
                    if (value) return value;
                    await new Promise((resolve) => setTimeout(resolve, 20));
                }}
            }}"""
        )
        assert value, f"not within {seconds} s: {expression}"
        return value

    def wait_complete(self) -> None:
        """Wait until the whole utterance has arrived."""
        self.wait("sesame.take?.state === 'complete'")

    def loudest_heard(self) -> float:
        """Return the peak of what the player plays, as soon as it is louder than silence."""
        return float(
            self.wait(
                """(() => {
                    const { analyser } = sesame.player;
                    if (!analyser) return 0;
                    const heard = new Float32Array(analyser.fftSize);
                    analyser.getFloatTimeDomainData(heard);
                    const loudest = Math.max(...heard.map(Math.abs));
                    return loudest > 0.02 ? loudest : 0;
                })()"""
            )
        )

    def samples(self) -> Samples:
        """Return all samples of the last take, float32, shape (n,), at 24 kHz."""
        encoded = self.page.evaluate(
            """async () => {
                const blob = new Blob([sesame.take.slice(0)]);
                const reader = new FileReader();
                reader.readAsDataURL(blob);
                await new Promise((resolve) => (reader.onload = resolve));
                return reader.result.split(",")[1];
            }"""
        )
        return np.frombuffer(base64.b64decode(encoded), "<f4")

    def pixels(self, variable: str) -> int:
        """Return how many pixels of the waveform have the colour of a CSS variable."""
        return int(
            self.page.evaluate(
                """(name) => {
                    const canvas = document.getElementById("canvas");
                    const probe = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
                    const pen = probe.getContext("2d", { willReadFrequently: true });
                    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
                    pen.fillRect(0, 0, 1, 1);
                    const wanted = pen.getImageData(0, 0, 1, 1).data;
                    pen.clearRect(0, 0, 1, 1);
                    pen.drawImage(canvas, 0, 0);
                    const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
                    let count = 0;
                    for (let i = 0; i < data.length; i += 4) count += wanted.every((value, k) => data[i + k] === value) ? 1 : 0;
                    return count;
                }""",
                variable,
            )
        )


# Options that a page can change; all others need a context of their own.
_EMULATED = {"viewport", "color_scheme", "reduced_motion"}
_used: WeakKeyDictionary[Browser, Page] = WeakKeyDictionary()


@contextmanager
def visit(browser: Browser, url: str, name: str, **options: Any) -> Iterator[Visit]:
    """Open a visit; a failing test leaves a screenshot in test-results/.

    It uses the page of the last visit, which has been made as new: a new one takes 0.2 s more of processor time, and so does axe-core in it.
    Without `reduced_motion="no-preference"` it has no animations: each of their frames takes milliseconds.
    """
    page = _page(browser, {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light", "reduced_motion": "reduce"} | options)
    guest = Visit(page, page.context, url)
    guest.watch()
    try:
        yield guest
        guest.check()
        guest.leave()
    except BaseException:
        RESULTS.mkdir(exist_ok=True)
        page.screenshot(path=RESULTS / f"{name}.png", full_page=True)
        page.context.close()
        raise
    if options.keys() <= _EMULATED:
        _used[browser] = page
    else:
        page.context.close()


def _page(browser: Browser, options: dict[str, Any]) -> Page:
    page = _used.pop(browser, None) if options.keys() <= _EMULATED else None
    if page is None:
        page = browser.new_context(**options).new_page()
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (e) => console.error(`policy: ${e.violatedDirective} ${e.blockedURI}`));"
        )
    else:
        page.set_viewport_size(options["viewport"])
        page.emulate_media(color_scheme=options["color_scheme"], reduced_motion=options["reduced_motion"])
    return page
