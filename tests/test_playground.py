"""The web page in a real Chromium with a real server: speaking, stopping, figures, downloads, code examples, error messages."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browsing import Visit, running_chromium, visit
from conftest import RunningServer
from listening import decode, transcribe, word_error_rate
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from config import Settings
from server import create_app

SENTENCE = "The quick brown fox jumps over the lazy dog."
STORY = " ".join(f"On day {day} the ship sailed further north, and the wind grew colder with every mile." for day in range(1, 46))
HOSTILE = "It's 5 o'clock; she said \"hi\" & $HOME `id` \\n — naïve 🙂\nNew line, {braces}, 100%."

Guest = Callable[..., AbstractContextManager[Visit]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as running:
        yield running


@pytest.fixture
def guest(browser: Browser, server: RunningServer, request: pytest.FixtureRequest) -> Guest:
    """Return a function: `with guest(url=…, color_scheme="dark") as seen:` opens the page and fails on hidden errors."""

    def open_visit(url: str | None = None, **options: Any) -> AbstractContextManager[Visit]:
        return visit(browser, url or f"{server.url}/", str(request.node.name), **options)

    return open_visit


def test_what_is_typed_is_heard(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.speak(SENTENCE)
        assert seen.loudest_heard() > 0.02
        seen.wait_complete()
        samples = seen.samples()
        assert float(np.sqrt(np.mean(samples**2))) > 0.01
        assert word_error_rate(SENTENCE, transcribe(samples, 24_000)) == 0
        figures = seen.page.locator("#figures").inner_text()
        assert "First audio" in figures
        assert "Real-time factor" in figures
        assert f"{len(samples) / 24_000:.1f} s" in figures
        assert seen.page.inner_text("#length") == f"0:{int(len(samples) / 24_000 + 0.5):02d}"
        expect(seen.page.locator("#status")).to_have_text("Finished", timeout=30_000)
        expect(seen.page.locator("#speak-word")).to_have_text("Speak")
        row = seen.page.locator("#results li")
        expect(row).to_have_count(1)
        assert SENTENCE in row.inner_text()
        assert "heart" in row.inner_text()


def test_playback_starts_while_the_rest_still_arrives(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.speak(STORY)
        assert seen.loudest_heard() > 0.02
        assert seen.page.evaluate("sesame.take.state") == "arriving"
        early, ahead = seen.pixels("--wave-rest"), seen.pixels("--line")
        assert ahead > 0
        seen.wait_complete()
        seen.wait("sesame.player.position > 0.5")
        assert seen.pixels("--wave-rest") > early
        assert seen.pixels("--accent") > 0
        expect(seen.page.locator("#results .meta")).to_contain_text(re.compile(r"· [1-9]:\d\d ·"))


def test_the_sentence_being_spoken_is_highlighted_and_a_click_goes_to_another(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.speak(f"{STORY[:400]} {SENTENCE}")
        current = seen.page.locator("#transcript [aria-current=true]")
        expect(current).to_contain_text("On day 1")
        seen.wait_complete()
        last = seen.page.locator("#transcript span").last
        expect(last).to_contain_text("lazy dog")
        last.click()
        expect(current).to_contain_text("lazy dog")
        start = seen.page.evaluate("sesame.take.sentences.at(-1).start")
        assert seen.page.evaluate("sesame.player.position") >= start - 0.01


def test_stop_ends_playback_and_frees_the_server(guest: Guest, server: RunningServer) -> None:
    with guest() as seen:
        seen.open()
        before = _cancelled(server)
        seen.speak(STORY)
        seen.wait("sesame.take?.length > 0")
        seen.page.click("#speak")  # the button now says Stop
        expect(seen.page.locator("#status")).to_have_text("Stopped")
        assert seen.page.evaluate("[sesame.player.playing, sesame.take.state]") == [False, "stopped"]
        server.wait_for(lambda health: health["queue"]["active"] == 0, 10)
        assert _cancelled(server) == before + 1
        assert seen.page.evaluate("sesame.take.duration") < 100
        expect(seen.page.locator("#results li")).to_contain_text("stopped")


def _cancelled(server: RunningServer) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if "requests_total" in line and 'outcome="cancelled"' in line)


def test_a_download_has_the_same_samples_as_the_playback(guest: Guest, tmp_path: Path) -> None:
    with guest() as seen:
        seen.open()
        seen.page.get_by_label("WAV", exact=True).check()
        seen.speak(SENTENCE)
        seen.wait_complete()
        heard = seen.samples()
        seen.page.keyboard.press("Escape")
        for fmt, button in (("wav", "#download"), ("wav", "#results li .acts button >> nth=0")):
            with seen.page.expect_download() as waiting:
                seen.page.click(button)
            assert waiting.value.suggested_filename == "speech.wav"
            path = tmp_path / f"saved.{fmt}"
            waiting.value.save_as(path)
            samples, rate = decode(path.read_bytes(), fmt)
            assert rate == 24_000
            np.testing.assert_allclose(samples, heard, atol=1e-4)
        expect(seen.page.locator("#status")).to_have_text("Saved as speech.wav")
        seen.page.get_by_text("Use again").click()
        expect(seen.page.locator("#status")).to_be_empty()


def test_speed_and_seed_are_applied_and_can_be_restored(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.page.fill("#seed", "7")
        seen.speak(SENTENCE)
        seen.wait_complete()
        normal = len(seen.samples())
        seen.page.locator("#speed").fill("2")
        expect(seen.page.locator("#speed-shown")).to_have_text("2.00×")
        seen.speak(SENTENCE)
        seen.wait("sesame.take.request.speed === 2 && sesame.take.state === 'complete'")
        assert len(seen.samples()) == pytest.approx(normal / 2, rel=0.08)
        seen.page.locator("#results li").last.get_by_text("Use again").click()
        assert seen.page.input_value("#speed") == "1"
        assert seen.page.input_value("#seed") == "7"
        for unusable in ("9999999999", "abc"):
            seen.page.fill("#seed", unusable)
            expect(seen.page.locator("#seed-hint")).to_have_text("A whole number, 0 to 4294967295")
            assert "seed" not in seen.page.inner_text("#code")
        seen.page.click("#speak")
        expect(seen.page.locator("#error")).to_contain_text("whole number from 0 to 4294967295")


def test_a_refusal_shows_the_servers_message(guest: Guest) -> None:
    with guest() as seen:
        seen.expect_refusals = True
        seen.open()
        seen.speak("x " * 3000)
        expect(seen.page.locator("#error")).to_contain_text("characters; at most 4096 are allowed")
        expect(seen.page.locator("#error")).to_contain_text("Request ")
        expect(seen.page.locator("#speak-word")).to_have_text("Speak")
        seen.page.fill("#text", "   ")
        seen.page.click("#speak")
        expect(seen.page.locator("#error")).to_have_text("Type a text first.")
        seen.page.fill("#text", SENTENCE)
        expect(seen.page.locator("#error")).to_be_hidden()
        assert seen.page.locator(".voice b").all_inner_texts() == [
            "heart",
            "conversational",
            "conversational_b",
            "emma",
            "fenrir",
            "hibari-fable",
            "kore",
        ]
        card = seen.page.locator(".voice", has_text="conversational_b")
        expect(card.locator(".ready")).to_have_text("Off")
        card.locator("input").check()
        expect(card).to_contain_text("Switched off by a setting (CSM=off).")
        seen.speak(SENTENCE)
        expect(seen.page.locator("#error")).to_contain_text("heart")
        expect(seen.page.locator("#error")).to_contain_text("csm-1b")
        seen.page.get_by_label("heart").check()
        expect(seen.page.locator("#error")).to_be_hidden()


def test_a_text_over_the_servers_limit_is_counted_against_it(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.page.fill("#text", "x" * 5000)
        expect(seen.page.locator("#count.over")).to_have_text("5,000 of 4,096 characters")
        seen.page.fill("#text", "x" * 4096)
        expect(seen.page.locator("#count:not(.over)")).to_have_text("4,096 characters")


def test_the_error_disappears_when_the_server_is_reachable_again(guest: Guest) -> None:
    with guest() as seen:
        seen.expect_refusals = True
        seen.open()
        seen.context.set_offline(True)
        seen.speak(SENTENCE)
        expect(seen.page.locator("#error")).to_contain_text("cannot be reached")
        expect(seen.page.locator("#server-word")).to_have_text("Offline")
        seen.page.fill("#text", STORY)
        expect(seen.page.locator("#error")).to_be_visible()
        seen.context.set_offline(False)
        expect(seen.page.locator("#error")).to_be_hidden()


def test_loading_shows_a_progress_bar_while_the_built_in_voice_speaks(guest: Guest, make_server: Callable[..., RunningServer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:  # accepts connections and never answers
        own = make_server(CSM="on", HF_HUB_OFFLINE=0, HF_ENDPOINT=f"http://127.0.0.1:{hub.getsockname()[1]}", wait=False)
        own.wait_for(lambda health: health["models"]["hibari"]["state"] == "ready")
        with guest(f"{own.url}/", reduced_motion="reduce") as seen:
            seen.open()
            expect(seen.page.locator("#server-word")).to_contain_text("Loading csm-1b")
            expect(seen.page.locator("#fallback")).to_contain_text("conversational is not ready. Until it is, heart speaks")
            seen.page.click("#server-button")
            expect(seen.page.get_by_role("progressbar", name="Loading csm-1b")).to_be_visible()
            assert seen.page.evaluate("document.getAnimations().length") == 0
            expect(seen.page.locator(".voice", has_text="conversational_b").locator(".ready")).to_have_text("Loading")
            seen.speak(SENTENCE)
            assert seen.loudest_heard() > 0.02


def test_a_failed_load_and_an_unreachable_server_are_shown_with_their_reason(
    guest: Guest, make_server: Callable[..., RunningServer]
) -> None:
    own = make_server(CSM="on", HF_HUB_OFFLINE=0, HF_ENDPOINT="http://127.0.0.1:9", DEFAULT_VOICE="heart")
    own.wait_for(lambda health: health["models"]["csm-1b"]["state"] == "failed")
    with guest(f"{own.url}/") as seen:
        seen.expect_refusals = True
        seen.open()
        expect(seen.page.locator("#server-word")).to_have_text("csm-1b failed")
        expect(seen.page.locator("#fallback")).to_be_hidden()
        seen.page.click("#server-button")
        reason = own.health()["models"]["csm-1b"]["error"]
        expect(seen.page.locator("#models li", has_text="csm-1b")).to_contain_text(reason)
        card = seen.page.locator(".voice", has_text="conversational_b")
        expect(card.locator(".ready")).to_have_text("Failed")
        expect(card.locator(".ready")).to_have_attribute("title", reason)
        own.stop()
        seen.speak(SENTENCE)
        expect(seen.page.locator("#error")).to_contain_text("cannot be reached")
        expect(seen.page.locator("#server-word")).to_have_text("Offline")


def test_the_queue_is_shown(guest: Guest, server: RunningServer) -> None:
    with guest() as seen:
        seen.open()
        seen.page.click("#server-button")
        expect(seen.page.locator("#queue")).to_contain_text("Requests: 0 active, 0 waiting")
        seen.speak(STORY)
        expect(seen.page.locator("#queue")).to_contain_text("1 active")


def test_the_page_asks_for_the_key_and_keeps_it_in_the_browser(guest: Guest, make_server: Callable[..., RunningServer]) -> None:
    own = make_server(API_KEY="open-sesame-7")
    with guest(f"{own.url}/") as seen:
        seen.expect_refusals = True
        page = seen.page
        page.goto(seen.url)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.click("#key-cancel")
        expect(page.locator("#server-word")).to_have_text("API key required")
        page.click("#server-button")
        expect(page.locator("#key-dialog")).to_be_visible()
        page.keyboard.press("Escape")
        seen.speak(SENTENCE)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.get_by_label("API key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_have_text("The API key is wrong.")
        page.get_by_label("API key", exact=True).fill("open-sesame-7")
        page.keyboard.press("Enter")
        expect(page.locator(".voice")).not_to_have_count(0)
        expect(page.locator("#key-dialog")).to_be_hidden()
        assert seen.loudest_heard() > 0.02  # the interrupted request continues without another click
        assert page.evaluate("JSON.stringify(localStorage)").count("open-sesame-7") == 0
        page.reload()
        expect(page.locator(".voice")).not_to_have_count(0)
        assert "open-sesame-7" not in page.content() + " ".join(seen.requested)
        assert "$SESAME_API_KEY" in page.locator("#code").inner_text()
        assert page.inner_text("#code").startswith("# export SESAME_API_KEY=")
        page.click("#key-button")
        page.get_by_label("API key", exact=True).fill("open-sesame-7")
        page.locator("#key-keep").check()
        page.keyboard.press("Enter")
        expect(page.locator("#key-dialog")).to_be_hidden()
        later = seen.context.new_page()  # tabs do not share their session storage
        later.goto(seen.url)
        expect(later.locator(".voice")).not_to_have_count(0)
        later.close()
        page.click("#key-button")
        page.click("#key-forget")
        expect(page.locator("#key-dialog")).to_be_visible()
        assert "open-sesame-7" not in page.evaluate("JSON.stringify([localStorage, sessionStorage])")


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_copied_code_runs_and_speaks(language: str, guest: Guest, tmp_path: Path) -> None:
    with guest(permissions=["clipboard-read", "clipboard-write"]) as seen:
        seen.open()
        seen.page.fill("#text", HOSTILE)
        seen.page.fill("#seed", "11")
        seen.page.get_by_label("FLAC", exact=True).check()
        seen.page.get_by_label(language, exact=True).check()
        seen.page.click("#copy")
        expect(seen.page.locator("#copy")).to_have_text("Copied")
        code = seen.page.evaluate("navigator.clipboard.readText()")
    command = ["bash", "-euc", code] if language == "curl" else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True, env=os.environ | {"HOME": str(tmp_path)})
    samples, rate = decode((tmp_path / "speech.flac").read_bytes(), "flac")
    assert rate == 24_000
    assert len(samples) > 2 * rate


def test_a_take_can_be_heard_again_and_searched(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.speak(SENTENCE)
        seen.wait_complete()
        seen.page.keyboard.press("Escape")
        box = seen.page.locator("#wave").bounding_box()
        assert box is not None
        seen.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
        assert seen.page.evaluate("sesame.player.position / sesame.take.duration") == pytest.approx(0.5, abs=0.1)
        seen.page.locator("#results").get_by_role("button", name="Play: ").click()
        assert seen.loudest_heard() > 0.02
        seen.page.locator("#results").get_by_role("button", name="Pause: ").click()
        assert seen.page.evaluate("sesame.player.playing") is False


def test_the_page_can_be_switched_off() -> None:
    def statuses(*, playground: bool) -> list[int]:
        chosen: dict[str, Any] = {"playground": playground, "csm": "off"}
        client = TestClient(create_app(Settings(**chosen)), base_url="http://127.0.0.1")
        return [client.get(path).status_code for path in ("/", "/playground/app.js")]

    assert statuses(playground=True) == [200, 200]
    assert statuses(playground=False) == [404, 404]
