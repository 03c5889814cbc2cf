"""The web page in fourteen states: axe-core finds nothing in both colour schemes, and nothing is wider than the window at three widths.

SCREENSHOTS=1 saves each state in both schemes at each width in test-results/states.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest
import tiny_csm
from browsing import RESULTS, Visit, running_chromium, visit
from client_programs import CLIENTS
from conftest import RunningServer, start_server
from playwright.sync_api import Browser, expect
from small_hub import SmallHub

AXE = CLIENTS / "node_modules" / "axe-core" / "axe.min.js"
WIDTHS = {1280: 860, 768: 1024, 320: 640}
STORY = (
    "The lighthouse keeper had one rule: never answer the radio after midnight. For thirty years it was an easy rule to keep. "
    "Then, on the last night of October, a small voice on channel nine asked him, very politely, to turn the lamp off."
)
FINDINGS = """async () => (await axe.run(document, { resultTypes: ["violations"] })).violations
    .flatMap(({ id, nodes }) => nodes.map(({ target, any }) => `${id}: ${target} ${any[0]?.message ?? ""}`))"""

State = Callable[[Visit], None]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as running:
        yield running


@pytest.fixture(scope="module")
def downloading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that downloads CSM slowly."""
    folder = tmp_path_factory.mktemp("downloading")
    tiny = tiny_csm.build(repo=tiny_csm.MLX_COMMUNITY, small_codec=True)  # the hub hashes all that it serves
    repositories = {repo: tiny_csm.snapshot_of(tiny, repo) for repo in (tiny_csm.MLX_COMMUNITY, tiny_csm.MIMI, tiny_csm.TOKENIZER)}
    with SmallHub(repositories, bytes_a_second=1_000_000) as hub:
        network = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": 0, "HF_HUB_CACHE": folder / "hub"}
        running = start_server(folder, CSM="on", MODEL_ID=tiny_csm.MLX_COMMUNITY, MODEL_DTYPE="float32", DEFAULT_VOICE="heart", **network)
        try:
            running.wait_for(lambda health: health["models"]["hibari"]["state"] == "ready")
            yield running
        finally:
            hub.over.set()
            running.stop()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that cannot reach the hub."""
    settings = {"CSM": "on", "HF_HUB_OFFLINE": 0, "HF_ENDPOINT": "http://127.0.0.1:9", "DEFAULT_VOICE": "heart"}
    running = start_server(tmp_path_factory.mktemp("failed"), **settings)
    try:
        running.wait_for(lambda health: health["models"]["csm-1b"]["state"] == "failed")
        yield running
    finally:
        running.stop()


def first_visit(seen: Visit) -> None:
    seen.open()


def speaking(seen: Visit) -> None:
    seen.open()
    seen.speak(f"{STORY} {STORY}")
    seen.wait("sesame.player.position > 1")
    expect(seen.page.locator("#spoken mark")).to_have_count(1)


def spoken(seen: Visit, text: str = STORY[:74]) -> None:
    seen.open()
    seen.speak(text)
    seen.wait_complete()
    seen.page.keyboard.press("Escape")


def download_menu(seen: Visit) -> None:
    spoken(seen)
    seen.page.click("#download")


def details(seen: Visit) -> None:
    spoken(seen)
    seen.page.locator(".resting summary").first.click()
    seen.page.click("#advanced summary")
    seen.page.fill("#seed", "x")
    seen.page.click("#details-button")


def recent_and_share(seen: Visit) -> None:
    spoken(seen, "One.")
    seen.speak("A second text, a little longer than the first one, so that it does not fit into one line of a narrow window.")
    seen.wait("sesame.takes === 2")
    seen.page.keyboard.press("Escape")
    seen.page.get_by_label("OpenClaw", exact=True).check()
    seen.page.locator("#recent").scroll_into_view_if_needed()


def refusal(seen: Visit) -> None:
    seen.expect_refusals = True
    seen.open()
    seen.speak("Привет, мир.")
    expect(seen.page.locator("#error")).to_be_visible()


def long_text(seen: Visit) -> None:
    seen.open()
    seen.page.fill("#text", " ".join([STORY] * 20))
    expect(seen.page.locator("#count")).to_contain_text("spoken in parts")
    seen.page.locator("#text").press("End")


def sample_chosen(seen: Visit) -> None:
    seen.open()
    seen.page.fill("#text", STORY[:74])
    seen.page.get_by_role("button", name="Dialogue").click()
    expect(seen.page.locator("#undo")).to_be_visible()


def model_downloading(seen: Visit) -> None:
    seen.open()
    seen.page.click("#server-button")
    expect(seen.page.locator(".resting", has_text="Conversational").locator(".line")).to_have_text(
        re.compile(r"Downloading, \d+ %, \d+ (s|min) left")
    )
    seen.page.locator(".resting", has_text="Conversational").locator("summary").click()


def model_failed(seen: Visit) -> None:
    seen.open()
    seen.page.locator(".resting", has_text="Conversational").locator("summary").click()
    expect(seen.page.get_by_role("button", name="Try again now").first).to_be_visible()


def add_voice(seen: Visit) -> None:
    seen.open()
    seen.page.click("#add-voice")
    seen.page.click("#record")
    seen.wait("document.querySelector('#level').value > 0.01")
    seen.page.wait_for_timeout(1500)
    seen.page.click("#record")
    expect(seen.page.locator("#voice-error")).to_contain_text("nobody speaks so fast")


def upload(seen: Visit) -> None:
    seen.open()
    seen.page.click("#add-voice")
    seen.page.get_by_role("tab", name="Upload").click()
    seen.page.click("#voice-save")
    expect(seen.page.locator("#voice-error")).to_be_visible()


def key_needed(seen: Visit) -> None:
    seen.expect_refusals = True
    seen.page.goto(seen.url)
    expect(seen.page.locator("#key-dialog")).to_be_visible()
    seen.page.fill("#key", "wrong")
    seen.page.keyboard.press("Enter")
    expect(seen.page.locator("#key-error")).to_be_visible()


def offline(seen: Visit) -> None:
    seen.expect_refusals = True
    seen.open()
    seen.context.set_offline(True)
    seen.speak(STORY)
    expect(seen.page.locator("#error")).to_contain_text("cannot be reached")


HERE = (first_visit, speaking, download_menu, details, recent_and_share, refusal, long_text, sample_chosen, offline)


def findings(seen: Visit) -> list[str]:
    return list(seen.page.evaluate(FINDINGS))


def check(seen: Visit, name: str) -> None:
    """Check the state in both schemes: with axe-core, if it is installed, and at each width."""
    if AXE.exists():
        seen.page.evaluate(AXE.read_text())
    for scheme in ("light", "dark"):
        seen.page.emulate_media(color_scheme=scheme)
        for width, height in WIDTHS.items():
            seen.page.set_viewport_size({"width": width, "height": height})
            assert seen.page.evaluate("document.documentElement.scrollWidth") == width
            assert seen.page.evaluate("[...document.querySelectorAll('dialog[open]')].every((e) => e.scrollWidth <= e.clientWidth)")
            if "SCREENSHOTS" in os.environ:
                save(seen, f"{name}-{scheme}-{width}.png")
        if AXE.exists():
            assert findings(seen) == []


def save(seen: Visit, name: str) -> None:
    folder = RESULTS / "states"
    folder.mkdir(parents=True, exist_ok=True)
    seen.page.wait_for_timeout(120)
    seen.page.screenshot(path=folder / name)


@pytest.mark.parametrize("state", HERE, ids=lambda state: str(state.__name__))
def test_a_state_of_the_page(state: State, browser: Browser, server: RunningServer) -> None:
    with visit(browser, f"{server.url}/", state.__name__) as seen:
        state(seen)
        check(seen, state.__name__)


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: `make clients`")
def test_axe_finds_what_is_wrong(browser: Browser, server: RunningServer) -> None:
    with visit(browser, f"{server.url}/", "axe") as seen:
        seen.open()
        seen.page.evaluate(AXE.read_text())
        seen.page.evaluate("document.querySelector('main').append(document.createElement('button'))")
        assert [finding.partition(":")[0] for finding in findings(seen)] == ["button-name"]


@pytest.mark.parametrize("state", [model_failed, add_voice, upload], ids=lambda state: str(state.__name__))
def test_a_state_without_csm(state: State, browser: Browser, failed: RunningServer) -> None:
    with visit(browser, f"{failed.url}/", state.__name__, permissions=["microphone"]) as seen:
        state(seen)
        check(seen, state.__name__)


def test_the_state_while_csm_is_downloaded(browser: Browser, downloading: RunningServer) -> None:
    with visit(browser, f"{downloading.url}/", "downloading") as seen:
        model_downloading(seen)
        check(seen, "downloading")


def test_the_state_before_the_key_is_entered(browser: Browser, make_server: Callable[..., RunningServer]) -> None:
    own = make_server(API_KEY="open-sesame-7")
    with visit(browser, f"{own.url}/", "key_needed") as seen:
        key_needed(seen)
        check(seen, "key_needed")
