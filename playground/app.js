// The page: connects its parts and handles Speak, Stop, downloads and errors.
//
// Speak sends one streamed request (server-sent events with 24 kHz samples) and plays the audio as it arrives. A download sends the request again,
// with the same seed, for a complete file in the chosen format: the same samples, with the exact header and tags of a complete file.
//
// `window.sesame` is for tests: `player` (its `analyser` receives what is played), `take` (the last one) and `takes` (how many there were).

import { apiKey, GONE, speakFile, speakStreamed } from "./api.js";
import { byId, clock, make, showAlert } from "./dom.js";
import { KeyDialog } from "./key_dialog.js";
import { Player } from "./player.js";
import { figuresOf, Results } from "./results.js";
import { ServerState } from "./server_state.js";
import { newSeed, SettingsForm } from "./settings.js";
import { curlCode, pythonCode } from "./snippets.js";
import { Take } from "./take.js";
import { VoiceDialog } from "./voice_dialog.js";
import { VoiceList } from "./voices.js";
import { Waveform } from "./waveform.js";

const text = byId("text");
const player = new Player();
const settings = new SettingsForm();
const voices = new VoiceList(byId("voices"), (id) => server.health?.models?.[id]);
const waveform = new Waveform(byId("wave"), byId("canvas"), (seconds) => player.seek(seconds));
const server = new ServerState({ dot: document.querySelector("#server-button .dot"), word: byId("server-word"), models: byId("models"), queue: byId("queue"), fallback: byId("fallback") });
const keyDialog = new KeyDialog(() => begin());
const voiceDialog = new VoiceDialog((voice) => useNewVoice(voice));
const results = new Results(byId("recent"), byId("results"), { play: replay, download, restore });

const SPEAK_KEY = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘↵" : "Ctrl ↵";

let speaking = null; // the AbortController of the current request
let wanted = "curl";
let listed = true;
let shownError = null;

window.sesame = { player, take: null, takes: 0 };

// -- Speaking ---------------------------------------------------------------------------------------------------------------------------

/** The request as currently set on the page; its seed is null if it should be random. */
function currentRequest() {
  return { model: voices.voice?.model ?? "csm-1b", input: text.value, voice: voices.chosen ?? "alloy", ...settings.values };
}

async function speak() {
  stop();
  const fault = text.value.trim() ? settings.fault : "Type a text first.";
  report(fault && { message: fault });
  if (fault) return (text.value.trim() ? byId("seed") : text).focus();
  const request = currentRequest();
  const take = new Take({ ...request, seed: request.seed ?? newSeed() }, voices.voice?.name ?? request.voice);
  const controller = new AbortController();
  speaking = controller;
  window.sesame.take = take;
  player.start(take);
  render();
  say("Waiting for audio");
  server.hurry = true;
  server.ask();
  try {
    await receive(take, controller.signal);
    take.end("complete");
  } catch (error) {
    take.end(controller.signal.aborted ? "stopped" : "failed");
    if (take.state === "failed") fail(error, speak);
  }
  if (speaking === controller) speaking = null;
  server.hurry = speaking !== null;
  finishTake(take);
}

async function receive(take, signal) {
  const { headers, events } = await speakStreamed(take.request, signal);
  server.ask();
  take.queued = Number(headers.get("X-Queue-Time")) || 0;
  const spokenBy = headers.get("X-Voice");
  for await (const event of events) {
    if (event.type === "speech.audio.delta") {
      if (!take.length) say(spokenBy && spokenBy !== take.request.voice ? `Speaking with the voice ${spokenBy}` : "Speaking");
      player.push(take, take.append(event.audio));
    } else if (event.type === "speech.audio.timestamps") {
      take.sentences[event.group] = event;
    }
  }
}

function finishTake(take) {
  window.sesame.takes += 1;
  if (take.length) results.add(take);
  if (take === window.sesame.take) {
    player.arrived(take);
    if (take.state === "failed" && !take.length) player.pause();
    render();
  }
  server.ask();
}

/** Stop the request, which frees the server's queue, and the playback. */
function stop() {
  const busy = speaking || player.playing;
  speaking?.abort();
  speaking = null;
  player.pause();
  if (busy) say("Stopped");
}

/** Show an error, or ask for the API key. @param again Called after the user has entered the key. */
function fail(error, again = null) {
  say("");
  if (error.status === 401) return keyDialog.open(error, again);
  report(error);
}

function report(error) {
  shownError = error;
  showAlert(byId("error"), error);
}

const say = (words) => (byId("status").textContent = words);

// -- The player -------------------------------------------------------------------------------------------------------------------------

let frame = 0;
let transcribed = null;

function render() {
  const active = Boolean(speaking) || player.playing;
  byId("speak").classList.toggle("active", active);
  byId("speak-word").textContent = active ? "Stop" : "Speak";
  byId("speak-key").textContent = active ? "Esc" : SPEAK_KEY;
  byId("play").classList.toggle("active", player.playing);
  byId("play").setAttribute("aria-label", player.playing ? "Pause" : "Play");
  byId("play").disabled = !player.take?.length;
  byId("download").hidden = !player.take?.length || player.take.state === "arriving";
  byId("download").textContent = `Download ${settings.values.response_format.toUpperCase()}`;
  results.mark(player.playing ? player.take : null);
  cancelAnimationFrame(frame);
  animate();
}

function animate() {
  const { take, position } = player;
  const moving = waveform.draw(take, position);
  byId("now").textContent = clock(position);
  byId("length").textContent = clock(take?.duration ?? 0);
  showSentences(take, position);
  showFigures(take);
  if (byId("play").disabled && take?.length) byId("play").disabled = false;
  if (moving || player.playing || speaking) frame = requestAnimationFrame(animate);
}

function showSentences(take, position) {
  const line = byId("transcript");
  const known = take?.sentences.filter(Boolean) ?? [];
  if (transcribed !== take) line.replaceChildren();
  transcribed = take;
  const first = line.hidden && known.length > 0;
  line.hidden = known.length === 0;
  for (const { text: words, start } of known.slice(line.querySelectorAll("span").length)) {
    const span = make("span", {}, words);
    span.addEventListener("click", () => player.seek(start));
    line.append(span, " ");
  }
  if (first && speaking) line.closest(".player").scrollIntoView({ block: "nearest" }); // on a phone, a long text may have pushed it off the screen
  const current = player.playing ? take.sentenceAt(position) : -1;
  for (const [index, span] of line.querySelectorAll("span").entries()) {
    if (span.hasAttribute("aria-current") === (index === current)) continue;
    span.toggleAttribute("aria-current", index === current);
    if (index === current) {
      span.setAttribute("aria-current", "true");
      // Scroll the transcript only, never the page.
      line.scrollTop = span.offsetTop - line.offsetTop - line.clientHeight / 3;
    }
  }
}

let shownFigures = "";

function showFigures(take) {
  const figures = take ? figuresOf(take) : [];
  const now = JSON.stringify(figures);
  if (now === shownFigures) return;
  shownFigures = now;
  const list = byId("figures");
  list.hidden = figures.length === 0;
  list.replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/** Play or pause a take of the list. */
function replay(take) {
  if (player.playing && player.take === take) return player.pause();
  stop();
  say("");
  return player.start(take);
}

async function download(take, button) {
  const format = settings.values.response_format;
  const request = { ...take.request, response_format: button.id === "download" ? format : take.request.response_format };
  const before = [...button.childNodes];
  button.disabled = true;
  button.textContent = "Preparing…";
  try {
    save(await speakFile(request), `speech.${request.response_format}`);
    say(`Saved as speech.${request.response_format}`);
  } catch (error) {
    fail(error);
  }
  button.disabled = false;
  button.replaceChildren(...before);
}

function save(blob, name) {
  const address = URL.createObjectURL(blob);
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

function restore(take) {
  text.value = take.request.input;
  settings.restore(take.request); // also calls edited()
  if (voices.voices.some(({ id }) => id === take.request.voice)) voices.choose(take.request.voice);
  stop();
  player.show(take);
  text.focus();
  showChoice();
}

player.addEventListener("change", render);
player.addEventListener("over", () => {
  if (player.take.state === "complete") say("Finished");
});

// -- Current choices --------------------------------------------------------------------------------------------------------------------

function showChoice() {
  const request = currentRequest();
  const length = [...text.value].length;
  const limit = server.health?.max_input_length ?? Infinity;
  const most = length > limit ? ` of ${limit.toLocaleString("en")}` : "";
  byId("count").textContent = `${length.toLocaleString("en")}${most} ${length === 1 ? "character" : "characters"}`;
  byId("count").classList.toggle("over", length > limit);
  byId("chosen").textContent = `${voices.voice?.name ?? request.voice}, ${request.speed.toFixed(2)}×`;
  byId("code").textContent = (wanted === "curl" ? curlCode : pythonCode)(request);
  byId("download").textContent = `Download ${request.response_format.toUpperCase()}`;
}

/** After a change by the user, clear the error and the status, except an error about an unreachable server. */
function edited() {
  if (server.health) report(null);
  if (!speaking && !player.playing) say("");
  showChoice();
}

async function copyCode() {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(byId("code").textContent);
  } catch {
    // On plain http pages browsers block the clipboard API; the old command still works.
    getSelection().selectAllChildren(byId("code"));
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function useNewVoice(voice) {
  voices.refresh().then(() => {
    voices.choose(voice.id);
    say(`Voice ${voice.name} saved and selected`);
    byId("voices").querySelector("input:checked")?.focus();
  }, report);
}

/** A note for users whose server does not run CSM, which speaks added voices; empty if it does. */
function noteOnOwnVoices() {
  const csm = server.health?.models?.["csm-1b"];
  if (!csm || ["ready", "unloaded"].includes(csm.state)) return "";
  const why = { loading: "is still loading", failed: "could not be loaded", disabled: "is switched off on this server" }[csm.state];
  return `Added voices use CSM-1B, which ${why}. You can save a voice now and use it when CSM-1B is ready.`;
}

// -- Start ------------------------------------------------------------------------------------------------------------------------------

async function begin() {
  byId("key-button").hidden = !apiKey.value;
  server.ask();
  await listVoices();
  showChoice();
}

/** @param unasked Whether this happens without an action of the user; then no dialog opens. */
async function listVoices(unasked = false) {
  try {
    await voices.refresh();
    if (!listed) report(null); // clears the error of an earlier attempt, but not an error of speaking
    listed = true;
  } catch (error) {
    listed = false;
    voices.refuse(error.status === 401);
    if (!unasked || error.status !== 401) fail(error);
  }
}

byId("speak").addEventListener("click", () => (speaking || player.playing ? stop() : speak()));
byId("play").addEventListener("click", () => player.toggle());
byId("download").addEventListener("click", ({ currentTarget }) => download(player.take, currentTarget));
byId("copy").addEventListener("click", copyCode);
byId("add-voice").addEventListener("click", () => voiceDialog.open(noteOnOwnVoices()));
byId("chosen").addEventListener("click", (event) => {
  event.preventDefault();
  byId("settings").scrollIntoView();
  byId("voices").querySelector("input:checked")?.focus({ preventScroll: true });
});
byId("server-button").addEventListener("click", ({ currentTarget }) => {
  if (server.locked) return keyDialog.open();
  const open = byId("server-panel").toggleAttribute("hidden") === false;
  currentTarget.setAttribute("aria-expanded", String(open));
  server.ask();
});
for (const radio of document.querySelectorAll("[name=language]")) {
  radio.addEventListener("change", () => {
    wanted = radio.value;
    showChoice();
  });
}
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    speak();
  } else if (event.key === "Escape") {
    stop();
  }
});
text.addEventListener("input", edited);
settings.addEventListener("change", edited);
byId("voices").addEventListener("change", edited);
voices.addEventListener("change", showChoice);
voices.addEventListener("deleted", ({ detail: name }) => say(`Voice ${name} deleted`));
server.addEventListener("change", () => {
  if (shownError?.code === GONE) report(null);
  listVoices(true);
});
text.setSelectionRange(text.value.length, text.value.length);
render();
begin();
