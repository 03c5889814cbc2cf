"""The web page in a real Chromium with a real server: speaking, stopping, figures, downloads, code examples, error messages."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import numpy as np
import pytest
from browsing import Visit, running_chromium, visit
from conftest import RunningServer
from listening import decode, transcribe, word_error_rate
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from config import Settings, csm_can_run
from server import create_app

SENTENCE = "The quick brown fox jumps over the lazy dog."


def days(number: int) -> str:
    """A story of so many sentences; each takes 6 s to speak."""
    return " ".join(
        f"On day {day} the ship sailed further north, and the wind grew colder with every mile." for day in range(1, number + 1)
    )


STORY = days(45)
HOSTILE = "It's 5 o'clock; she said \"hi\" & $HOME `id` \\n — naïve 🙂\nNew line, {braces}, 100%."
# The page shows a take before the browser has stored it. This reads what is committed.
STORED_TAKES = """await new Promise((resolve) => {
    indexedDB.open("sesame").onsuccess = ({ target: { result: database } }) => {
        database.transaction("takes").objectStore("takes").count().onsuccess = ({ target }) => {
            database.close();
            resolve(target.result);
        };
    };
})"""

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
        seen.page.click("#details-button")
        figures = seen.page.locator("#details").inner_text()
        assert "Heart" in figures
        assert "First audio" in figures
        assert "Real-time factor" in figures
        assert f"{len(samples) / 24_000:.1f} s" in figures
        assert seen.page.inner_text("#length") == f"0:{int(len(samples) / 24_000 + 0.5):02d}"
        expect(seen.page.locator("#status")).to_have_text("Finished", timeout=30_000)
        seen.wait("sesame.player.analyser.context.state === 'suspended'")  # a sound device in use takes power
        expect(seen.page.locator("#speak-word")).to_have_text("Speak")
        row = seen.page.locator("#results li")
        expect(row).to_have_count(1)
        assert SENTENCE in row.inner_text()
        assert "Heart" in row.inner_text()


def test_playback_starts_while_the_rest_still_arrives(guest: Guest) -> None:
    with guest(reduced_motion="no-preference") as seen:
        seen.open()
        seen.speak(days(14))
        assert seen.loudest_heard() > 0.02
        assert seen.page.evaluate("sesame.take.state") == "arriving"
        early, ahead = seen.pixels("--wave-rest"), seen.pixels("--line")
        assert ahead > 0
        seen.wait_complete()
        seen.wait("sesame.player.position > 0.5")
        assert seen.pixels("--wave-rest") > early
        assert seen.pixels("--accent") > 0
        assert seen.page.evaluate("sesame.take.duration") > 60
        expect(seen.page.locator("#results .meta")).to_contain_text(re.compile(r"· [1-9] min \d+ s ·"))


def test_the_spoken_word_is_highlighted_in_the_text_box_and_a_click_goes_to_another(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        typed = f"{STORY[:400]} 🙂 {SENTENCE}"
        seen.speak(typed)
        mark = seen.page.locator("#spoken mark")
        expect(mark).to_have_text(re.compile("On|day|1"))
        seen.wait_complete()
        word = seen.page.evaluate("sesame.take.words.at(-1)")
        assert typed.encode("utf-16-le")[2 * word["from"] : 2 * word["to"]].decode("utf-16-le") == "dog"  # offsets after an emoji
        assert seen.page.evaluate("sesame.take.words.length") >= 50
        seen.page.evaluate(
            "document.getElementById('text').setSelectionRange(sesame.take.words.at(-2).from + 1, sesame.take.words.at(-2).from + 1)"
        )
        seen.page.locator("#text").dispatch_event("click")
        expect(mark).to_have_text(re.compile("lazy|dog"))
        assert seen.page.evaluate("sesame.player.position") >= seen.page.evaluate("sesame.take.words.at(-2).start") - 0.01


def test_the_highlight_lies_exactly_under_the_text(guest: Guest) -> None:
    with guest(viewport={"width": 1200, "height": 700}) as seen:  # eleven lines of text are visible
        seen.open()
        seen.page.fill("#text", f"{STORY}\n\nThe end.\n")
        box = (
            "(id) => { const { x, y, width, height } = document.getElementById(id).getBoundingClientRect(); return [x, y, width, height]; }"
        )
        assert seen.page.evaluate(box, "spoken") == seen.page.evaluate(box, "text")
        assert seen.page.evaluate("(e => e.scrollHeight - e.clientHeight)(document.getElementById('text'))") == 0
        styles = """() => ['spoken', 'text'].map((id) => getComputedStyle(document.getElementById(id))).map((s) =>
            [s.font, s.letterSpacing, s.padding, s.whiteSpace, s.overflowWrap, s.wordSpacing, s.tabSize, s.textIndent])"""
        layer, text = seen.page.evaluate(styles)
        assert layer == text
        seen.speak(f"{days(12)}\n\n{SENTENCE}")
        seen.wait_complete()
        seen.page.evaluate("sesame.player.seek(sesame.take.words.at(-3).start)")
        seen.wait("document.getElementById('sheet').scrollTop > 100")  # the text follows the spoken word
        assert seen.page.evaluate("scrollY") == 0


def test_the_highlight_ends_where_the_text_is_changed(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.speak(STORY)
        expect(seen.page.locator("#spoken mark")).to_have_count(1)
        seen.page.locator("#text").press("End")
        seen.page.keyboard.type("!")
        expect(seen.page.locator("#spoken mark")).to_have_count(0)
        assert seen.page.evaluate("sesame.player.playing")


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
        seen.speak(SENTENCE)
        seen.wait_complete()
        heard = seen.samples()
        seen.page.keyboard.press("Escape")
        path = download(seen, "wav", tmp_path)
        samples, rate = decode(path.read_bytes(), "wav")
        assert rate == 24_000
        np.testing.assert_allclose(samples, heard, atol=1e-4)
        expect(seen.page.locator("#status")).to_have_text("Saved as speech.wav")
        captions = download(seen, "srt", tmp_path).read_text()
        assert re.fullmatch(rf"1\n00:00:00,\d\d\d --> 00:00:0\d,\d\d\d\n{SENTENCE}\n", captions)
        assert download(seen, "vtt", tmp_path).read_text().startswith("WEBVTT\n\n00:00:00.")
        seen.page.get_by_text("Use again").click()
        expect(seen.page.locator("#status")).to_be_empty()


def download(seen: Visit, kind: str, folder: Path) -> Path:
    """Choose an entry of the download menu and return the saved file."""
    seen.page.click("#download")
    with seen.page.expect_download() as waiting:
        seen.page.click(f"#download-menu [data-value={kind}]")
    assert waiting.value.suggested_filename == f"speech.{kind}"
    waiting.value.save_as(folder / f"saved.{kind}")
    return folder / f"saved.{kind}"


def test_speed_and_seed_are_applied_and_can_be_restored(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.page.click("#advanced summary")
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
        expect(seen.page.locator("#error")).to_contain_text("a whole number, 0 to 4294967295")
        expect(seen.page.locator("#seed")).to_be_focused()
        expect(seen.page.locator("#temperature")).to_be_disabled()
        expect(seen.page.locator("#temperature-hint")).to_have_text("For CSM voices only")


def test_a_refusal_shows_the_servers_message(guest: Guest) -> None:
    with guest() as seen:
        seen.expect_refusals = True
        seen.open()
        seen.speak("Привет, мир.")
        expect(seen.page.locator("#error")).to_contain_text("heart")
        expect(seen.page.locator("#error")).to_contain_text("Request ")
        expect(seen.page.locator("#speak-word")).to_have_text("Speak")
        seen.page.fill("#text", "   ")
        seen.page.click("#speak")
        expect(seen.page.locator("#error")).to_have_text("Type a text first.")
        expect(seen.page.locator("#text")).to_be_focused()
        seen.page.fill("#text", SENTENCE)
        expect(seen.page.locator("#error")).to_be_hidden()


def test_voices_that_cannot_speak_are_folded_with_their_reason(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.page.evaluate("localStorage.setItem('sesame.voice', 'conversational_b')")
        seen.open()
        assert seen.page.locator(".voice b").all_inner_texts() == ["Heart"]
        expect(seen.page.get_by_label("Heart", exact=True)).to_be_checked()
        expect(seen.page.locator("#meanwhile")).to_have_text("Conversational B cannot speak now. Heart is selected until it can.")
        csm, missing = seen.page.locator(".resting").all()
        expect(csm.locator("summary")).to_have_text("Conversational, Conversational BSwitched off")
        expect(csm.locator(".reason")).to_be_hidden()
        csm.locator("summary").click()
        expect(csm.locator(".reason")).to_have_text("Switched off by a setting (CSM=off).")
        expect(missing.locator("summary")).to_have_text("Emma, Fenrir, Fable, KoreNot downloaded (HF_HUB_OFFLINE)")
        csm.get_by_role("button", name="Use Heart meanwhile").click()
        expect(seen.page.get_by_label("Heart", exact=True)).to_be_focused()
        expect(csm.get_by_role("button")).to_have_count(0)
        expect(seen.page.locator("#meanwhile")).to_be_hidden()
        expect(seen.page.locator("#add-voice")).to_be_disabled()
        expect(seen.page.locator("#add-note")).to_have_text("Added voices need CSM-1B, which is switched off.")


@pytest.mark.skipif(csm_can_run(), reason="CSM runs on this machine")
def test_a_machine_that_can_never_run_csm_is_told_so(guest: Guest, make_server: Callable[..., RunningServer]) -> None:
    own = make_server(CSM="auto")
    with guest(f"{own.url}/") as seen:
        seen.open()
        group = seen.page.locator(".resting", has_text="Conversational B")
        expect(group.locator(".line")).to_have_text("Needs Apple Silicon")
        expect(seen.page.locator("#add-voice")).to_be_disabled()
        expect(seen.page.locator("#add-note")).to_have_text("Added voices need CSM-1B, which needs Apple Silicon.")
        group.locator("summary").click()
        expect(group.locator(".reason")).to_contain_text("far too slow")
        expect(group.get_by_role("button")).to_have_count(0)  # Heart is selected already


def test_a_preview_is_requested_once_and_kept(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.page.get_by_role("button", name="Hear Heart").click()
        assert seen.loudest_heard() > 0.02
        expect(seen.page.get_by_role("button", name="Stop Heart")).to_have_class(re.compile("active"))
        seen.page.get_by_role("button", name="Stop Heart").click()
        assert len([url for url in seen.requested if url.endswith("/v1/audio/speech")]) == 1
        seen.page.reload()
        seen.page.get_by_role("button", name="Hear Heart").click()
        assert seen.loudest_heard() > 0.02
        assert len([url for url in seen.requested if url.endswith("/v1/audio/speech")]) == 1
        seen.speak(STORY)  # ends the preview
        expect(seen.page.get_by_role("button", name="Hear Heart")).to_be_visible()


def test_a_text_over_the_servers_limit_is_spoken_in_parts(guest: Guest, make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    own = make_server(MAX_INPUT_LENGTH=60)
    with guest(f"{own.url}/") as seen:
        seen.open()
        seen.page.fill("#text", "x" * 60)
        expect(seen.page.locator("#count")).to_have_text("60 characters")
        seen.speak(f"{SENTENCE} {SENTENCE}")
        expect(seen.page.locator("#count")).to_have_text("89 characters, 29 over the limit of a request: spoken in parts")
        seen.wait_complete()
        assert seen.page.evaluate("sesame.take.parts.map(({ start }) => start)") == [0, 45]
        samples = seen.samples()
        assert word_error_rate(f"{SENTENCE} {SENTENCE}", transcribe(samples, 24_000)) == 0
        starts = seen.page.evaluate("sesame.take.words.map(({ start }) => start)")
        assert starts == sorted(starts)
        assert seen.page.evaluate("sesame.take.words.slice(-1)[0].to") == 88
        seen.page.keyboard.press("Escape")
        joined, _ = decode(download(seen, "wav", tmp_path).read_bytes(), "wav")
        np.testing.assert_allclose(joined, samples, atol=1e-4)
        seen.page.fill("#text", "x " * 25_100)
        expect(seen.page.locator("#count.over")).to_have_text("50,200 characters, 200 too many")
        seen.page.click("#speak")
        expect(seen.page.locator("#error")).to_contain_text("too long for this page by 200 characters")


def test_samples_files_and_clear_replace_the_text_and_can_be_undone(guest: Guest, tmp_path: Path) -> None:
    notes, picture, latin = tmp_path / "notes.md", tmp_path / "cat.png", tmp_path / "old.txt"
    notes.write_text("# Notes\n\nBuy *milk*.")
    picture.write_bytes(b"\x89PNG")
    latin.write_bytes("Müller".encode("latin-1"))
    with guest() as seen:
        seen.open()
        page = seen.page
        page.get_by_role("button", name="Story").click()
        assert page.input_value("#text").startswith("The lighthouse keeper")
        expect(page.locator("#undo")).to_be_hidden()
        page.fill("#text", "My own words.")
        page.get_by_role("button", name="News").click()
        page.click("#undo")
        assert page.input_value("#text") == "My own words."
        page.click("#clear")
        assert page.input_value("#text") == ""
        expect(page.locator("#text")).to_be_focused()
        page.set_input_files("#text-file", notes)
        expect(page.locator("#status")).to_have_text("Opened notes.md")
        assert page.input_value("#text") == "# Notes\n\nBuy *milk*."
        for file, fault in ((picture, "“cat.png” is not a .txt or .md file"), (latin, "“old.txt” is not a text in UTF-8")):
            page.set_input_files("#text-file", file)
            expect(page.locator("#error")).to_contain_text(fault)
        page.evaluate(
            """() => {
                const data = new DataTransfer();
                data.items.add(new File(["Dropped words."], "dropped.txt", { type: "text/plain" }));
                const stage = document.getElementById("stage");
                for (const kind of ["dragenter", "dragover", "drop"]) stage.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
            }"""
        )
        expect(page.locator("#status")).to_have_text("Opened dropped.txt")
        assert page.input_value("#text") == "Dropped words."


def test_a_text_survives_a_reload_of_its_tab_only(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        greeting = seen.page.input_value("#text")
        seen.page.fill("#text", SENTENCE)
        seen.page.reload()
        assert seen.page.input_value("#text") == SENTENCE
        later = seen.context.new_page()
        later.goto(seen.url)
        assert later.input_value("#text") == greeting
        seen.page.click("#clear")
        seen.page.reload()
        assert seen.page.input_value("#text") == greeting


def test_a_shared_link_opens_the_page_with_its_text_voice_and_speed(guest: Guest, browser: Browser) -> None:
    with guest() as seen:
        seen.open()
        seen.page.fill("#text", HOSTILE)
        seen.page.locator("#speed").fill("1.5")
        seen.page.get_by_label("Link", exact=True).check()
        link = seen.page.locator("#code").inner_text()
        friend = browser.new_context()
        page = friend.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url + (request.post_data or "")))
        page.goto(link)
        expect(page.locator("#chosen")).to_have_text("Heart, 1.50×")
        assert page.input_value("#text") == HOSTILE
        assert page.url == seen.url
        page.fill("#text", "My own words.")
        page.goto(link)  # the page is open already: only the fragment changes
        expect(page.locator("#text")).to_have_value(HOSTILE)
        page.click("#undo")
        expect(page.locator("#text")).to_have_value("My own words.")
        assert not [request for request in asked if request.startswith(f"{seen.url}v1/audio/speech")]
        friend.close()
        seen.page.goto(f"{seen.url}#text")  # what the link "Skip to the text" leaves in the address
        assert seen.page.input_value("#text") == HOSTILE


def test_recent_takes_survive_a_reload_until_they_are_cleared(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        for words in ("One.", "Two."):
            seen.speak(words)
            seen.wait(f"sesame.take?.request.input === '{words}' && sesame.take.state === 'complete'")
        expect(seen.page.locator("#results li")).to_have_count(2)
        seen.wait(f"({STORED_TAKES}) === 2")
        seen.page.reload()
        expect(seen.page.locator("#results .said")).to_have_text(["Two.", "One."])
        expect(seen.page.locator("#dock")).to_be_hidden()
        requests = len(seen.requested)
        seen.page.get_by_role("button", name="Play: One.").click()
        assert seen.loudest_heard() > 0.02
        assert not [url for url in seen.requested[requests:] if url.endswith("speech")]
        expect(seen.page.locator("#dock")).to_be_visible()
        seen.page.get_by_role("button", name="Delete: Two.").click()
        expect(seen.page.locator("#results .said")).to_have_text(["One."])
        expect(seen.page.get_by_role("button", name="Delete: One.")).to_be_focused()
        seen.page.click("#recent-clear")
        expect(seen.page.locator("#recent")).to_be_hidden()
        expect(seen.page.locator("#text")).to_be_focused()
        seen.page.reload()
        seen.page.locator(".voice").first.wait_for()
        expect(seen.page.locator("#recent")).to_be_hidden()


def test_the_page_is_small_and_asks_for_nothing_but_itself(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.wait("document.getElementById('server-word').textContent === 'Ready'")
        sizes = seen.page.evaluate(
            "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')].map((e) => [new URL(e.name).pathname, e.transferSize])"
        )
        assert sum(size for _, size in sizes) < 100_000
        others = sorted(path for path, _ in sizes if not path.startswith("/playground/"))
        assert others == ["/", "/health", "/v1/audio/voices"]


def test_the_page_can_be_installed(server: RunningServer) -> None:
    with server.client(headers={"Accept-Encoding": "identity"}) as client:
        manifest = client.get("/playground/manifest.webmanifest")
        assert manifest.headers["content-type"] == "application/manifest+json"
        start = httpx.URL(f"{server.url}/playground/manifest.webmanifest").join(manifest.json()["start_url"])
        assert "manifest.webmanifest" in client.get(start).text
        for icon in manifest.json()["icons"]:
            answer = client.get(f"/playground/{icon['src']}")
            assert answer.headers["content-type"] == icon["type"]
            if icon["type"] == "image/png":
                width = int.from_bytes(answer.content[16:20], "big")
                assert icon["sizes"] == f"{width}x{width}"


def test_the_pages_files_are_compressed_for_clients_that_accept_it(server: RunningServer) -> None:
    with server.client() as client:
        plain = client.get("/playground/app.js", headers={"Accept-Encoding": "identity"})
        zipped = client.get("/playground/app.js", headers={"Accept-Encoding": "gzip"})
        assert plain.content == zipped.content  # httpx unpacks it
        assert "content-encoding" not in plain.headers
        assert int(zipped.headers["content-length"]) < len(plain.content) / 2
        assert zipped.headers["etag"] != plain.headers["etag"]
        for answer in (plain, zipped):
            again = {"Accept-Encoding": answer.headers.get("content-encoding", "identity"), "If-None-Match": answer.headers["etag"]}
            assert client.get("/playground/app.js", headers=again).status_code == 304


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
            group = seen.page.locator(".resting", has_text="Conversational B")
            expect(group.locator(".line")).to_have_text("Loading")
            expect(seen.page.locator("#chosen")).to_contain_text("Heart")
            expect(seen.page.locator("#add-voice")).to_be_enabled()
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
        group = seen.page.locator(".resting", has_text="Conversational B")
        expect(group.locator(".line")).to_have_text(re.compile(r"Could not be loaded, next try in \d+ (s|min)"))
        group.locator("summary").click()
        assert group.locator(".reason").inner_text().casefold() == reason.casefold()
        before = own.log_text().count("loading")
        group.get_by_role("button", name="Try again now").click()
        own.wait_for(lambda _: own.log_text().count("loading") > before, 20)
        expect(group.get_by_role("button", name="Try again now")).to_be_visible()  # it has failed again
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
        expect(page.locator("#voices")).to_have_text("Enter the API key to see the voices.")
        expect(page.locator("#code")).to_contain_text("curl")
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


@pytest.fixture(scope="module")
def copied_code(browser: Browser, server: RunningServer) -> dict[str, str]:
    """The code examples for a text, as the page copies them, by language."""
    code = {}
    with visit(browser, f"{server.url}/", "copied_code", permissions=["clipboard-read", "clipboard-write"]) as seen:
        seen.open()
        seen.page.evaluate("localStorage.setItem('sesame.format', 'flac')")  # the format of the last download
        seen.open()
        seen.page.fill("#text", HOSTILE)
        seen.page.click("#advanced summary")
        seen.page.fill("#seed", "11")
        for language in ("curl", "Python", "JavaScript"):
            seen.page.get_by_label(language, exact=True).check()
            expect(seen.page.locator("#copy")).to_have_text("Copy")
            seen.page.click("#copy")
            expect(seen.page.locator("#copy")).to_have_text("Copied")
            code[language] = seen.page.evaluate("navigator.clipboard.readText()")
    return code


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_the_copied_code_runs_and_speaks(language: str, copied_code: dict[str, str], tmp_path: Path) -> None:
    code = copied_code[language]
    if language == "JavaScript":
        (tmp_path / "speak.mjs").write_text(code)
    node = which("node") or "node"
    if language == "JavaScript" and not which("node"):
        pytest.skip("no Node on this machine")
    command = {"curl": ["bash", "-euc", code], "Python": [sys.executable, "-c", code], "JavaScript": [node, "speak.mjs"]}[language]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True, env=os.environ | {"HOME": str(tmp_path)})
    samples, rate = decode((tmp_path / "speech.flac").read_bytes(), "flac")
    assert rate == 24_000
    assert len(samples) > 2 * rate


def test_openclaws_configuration_names_the_chosen_voice(guest: Guest) -> None:
    with guest() as seen:
        seen.open()
        seen.page.get_by_label("OpenClaw", exact=True).check()
        command = shlex.split(seen.page.locator("#code").inner_text())
        assert command[:4] == ["openclaw", "config", "set", "tts"]
        assert command[5:] == ["--strict-json", "--merge"]
        openai = json.loads(command[4])["providers"]["openai"]
        assert openai == {"apiKey": "local", "baseUrl": f"{seen.url}v1", "model": "hibari", "speakerVoice": "heart"}


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
