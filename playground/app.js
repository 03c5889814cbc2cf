// The page: connects its parts and handles Speak, Stop, downloads and errors.
//
// Speak sends a streamed request (server-sent events with 24 kHz samples) and plays the audio as it arrives.
//
// `window.sesame` is for tests: `player` (its `analyser` receives what is played), `take` (the last one) and `takes` (how many there were).

import { apiKey, call, GONE } from "./api.js";
import { byId, clock, make, setText, showAlert } from "./dom.js";
import { filesOf, FILES, save } from "./files.js";
import { KeyDialog } from "./key_dialog.js";
import { Menu, Popup } from "./menu.js";
import { Player } from "./player.js";
import { Previews } from "./previews.js";
import { figuresOf, Recent } from "./recent.js";
import { neverWords, ServerState } from "./server_state.js";
import { newSeed, SettingsForm } from "./settings.js";
import { FORMS, requestOf } from "./share.js";
import { Speech } from "./speech.js";
import { MOST_CHARACTERS, Stage } from "./stage.js";
import { VoiceDialog } from "./voice_dialog.js";
import { VoiceList } from "./voices.js";
import { Waveform } from "./waveform.js";

const DEFAULT_LIMIT = 4096; // the server's, until it has told its own

const text = byId("text");
const stage = new Stage();
const player = new Player();
const speech = new Speech(player);
const settings = new SettingsForm();
const previews = new Previews(player, () => server.health?.version ?? "");
const voices = new VoiceList((id) => server.models[id], previews, tryAgain);
const waveform = new Waveform(byId("wave"), byId("canvas"), (seconds) => player.seek(seconds));
const server = new ServerState({ dot: document.querySelector("#server-button .dot"), word: byId("server-word"), models: byId("models"), queue: byId("queue"), fallback: byId("fallback") });
const keyDialog = new KeyDialog(() => begin());
const voiceDialog = new VoiceDialog(previews, csmReady, (voice) => useNewVoice(voice));
const recent = new Recent({ play: replay, restore, current: () => player.take });

const SPEAK_KEY = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘↵" : "Ctrl ↵";

let wanted = "curl";
let listed = true;
let shownError = null;

window.sesame = { player, take: null, takes: 0 };

// -- Speaking ---------------------------------------------------------------------------------------------------------------------------

/** The request as currently set on the page; its seed is null if it should be random. */
function currentRequest() {
  return { model: voices.voice?.model ?? "csm-1b", input: text.value, voice: voices.voice?.id ?? "alloy", ...settings.values };
}

/** What is missing for a request, as `[element, message]`, or null. */
function missing() {
  if (!text.value.trim()) return [text, "Type a text first."];
  if (stage.length > MOST_CHARACTERS) return [text, `The text is too long for this page by ${(stage.length - MOST_CHARACTERS).toLocaleString("en")} characters. The command line, say.py, reads texts of any length.`];
  return settings.fault;
}

function speak() {
  stop();
  previews.stop();
  const fault = missing();
  report(fault && { message: fault[1] });
  if (fault) {
    if (fault[0].closest("details")) fault[0].closest("details").open = true;
    return fault[0].focus();
  }
  const request = currentRequest();
  const limit = server.health?.max_input_length ?? DEFAULT_LIMIT;
  return speech.start({ ...request, seed: request.seed ?? newSeed() }, voices.voice?.display_name ?? request.voice, limit, { begun, heard, ended });
}

function begun(take) {
  window.sesame.take = take;
  player.start(take);
  say("Waiting for audio");
  server.hurry = true;
  server.ask();
}

function heard(take, spokenBy) {
  const other = spokenBy && spokenBy !== take.request.voice;
  say(other ? `Speaking with the voice ${spokenBy}` : "Speaking");
  byId("dock").hidden = false;
  server.ask();
  render();
}

function ended(take, error) {
  window.sesame.takes += 1;
  server.hurry = speech.busy;
  if (take.length) recent.add(take);
  if (take === window.sesame.take) {
    player.arrived(take);
    if (take.state === "failed" && !take.length) player.pause();
    render();
  }
  if (error) fail(error, speak);
  server.ask();
}

/** Stop the request and the playback. */
function stop() {
  const busy = speech.busy || player.playing;
  speech.stop();
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

const PAUSE = 20; // milliseconds between frames, so that the page draws 30 times a second: more takes twice the power and shows no more

let frame = 0;
let pause = 0;

function render() {
  const active = speech.busy || player.playing;
  byId("speak").classList.toggle("active", active);
  byId("speak-word").textContent = active ? "Stop" : "Speak";
  byId("speak-key").textContent = active ? "Esc" : SPEAK_KEY;
  byId("play").classList.toggle("active", player.playing);
  byId("play").setAttribute("aria-label", player.playing ? "Pause" : "Play");
  byId("download").disabled = !player.take?.length || player.take.state === "arriving";
  recent.mark(player.playing ? player.take : null);
  clearTimeout(pause);
  cancelAnimationFrame(frame);
  animate();
}

function animate() {
  const { take, position } = player;
  const moving = waveform.draw(take, position);
  setText(byId("now"), clock(position));
  setText(byId("length"), clock(take?.duration ?? 0));
  const same = take && take.request.input === text.value;
  stage.highlight(same && (player.playing || position > 0) && position < take.duration ? take.spokenAt(position) : null);
  showFigures(take);
  if (moving || player.playing || speech.busy) pause = setTimeout(() => (frame = requestAnimationFrame(animate)), PAUSE);
}

let shownFigures = "";

function showFigures(take) {
  const figures = take ? figuresOf(take) : [];
  const now = JSON.stringify([take?.voiceName, figures]);
  if (now === shownFigures) return;
  shownFigures = now;
  byId("playing-voice").textContent = take?.voiceName ?? "";
  byId("figures").replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/** Play or pause a take of the list. */
function replay(take) {
  if (player.playing && player.take === take) return player.pause();
  stop();
  previews.stop();
  say("");
  byId("dock").hidden = false;
  return player.start(take);
}

async function download(kind) {
  const { take } = player;
  const button = byId("download");
  button.setAttribute("aria-busy", "true");
  say("Preparing the file");
  try {
    const files = await filesOf(take, kind);
    for (const [name, blob] of files) save(name, blob);
    say(files.length === 1 ? `Saved as ${files[0][0]}` : `Saved as ${files.length} files, ${files[0][0]} to ${files.at(-1)[0]}`);
    if (!["vtt", "srt"].includes(kind)) settings.setFormat(kind);
    showChoice();
  } catch (error) {
    fail(error);
  }
  button.removeAttribute("aria-busy");
}

function restore(take) {
  stage.value = take.request.input;
  settings.restore(take.request); // also calls edited()
  if (voices.voices.some(({ id }) => id === take.request.voice)) voices.choose(take.request.voice);
  stop();
  say("");
  text.focus();
  showChoice();
}

/** A click on a word while it is played moves the playback there. */
function seekToWord() {
  if (!player.playing || player.take.request.input !== text.value || text.selectionStart !== text.selectionEnd) return;
  const word = player.take.at(text.selectionStart);
  if (word) player.seek(word.start);
}

player.addEventListener("change", render);
player.addEventListener("over", () => {
  if (player.take.state === "complete") say("Finished");
});
previews.addEventListener("start", () => {
  if (player.playing) player.pause();
});
previews.addEventListener("fault", ({ detail }) => fail(detail));

// -- Current choices --------------------------------------------------------------------------------------------------------------------

function showChoice() {
  const request = currentRequest();
  settings.setModel(voices.voice?.model ?? "");
  byId("count").textContent = countWords();
  byId("count").classList.toggle("over", stage.length > MOST_CHARACTERS);
  byId("chosen").textContent = `${voices.voice?.display_name ?? "No voice"}, ${request.speed.toFixed(2)}×`;
  const [code, note] = FORMS[wanted];
  byId("code").textContent = code(request);
  byId("code-note").textContent = note;
}

/** The length of the text, and how much of it is too much: for one request, or for this page. */
function countWords() {
  const { length } = stage;
  const shown = (number) => number.toLocaleString("en");
  const limit = server.health?.max_input_length ?? DEFAULT_LIMIT;
  const words = `${shown(length)} ${length === 1 ? "character" : "characters"}`;
  if (length > MOST_CHARACTERS) return `${words}, ${shown(length - MOST_CHARACTERS)} too many`;
  return length > limit ? `${words}, ${shown(length - limit)} over the limit of a request: spoken in parts` : words;
}

/** After a change by the user, clear the error and the status, except an error about an unreachable server. */
function edited() {
  if (server.health) report(null);
  if (!speech.busy && !player.playing) say("");
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

// -- Voices -----------------------------------------------------------------------------------------------------------------------------

async function useNewVoice(voice) {
  try {
    await voices.refresh();
    voices.choose(voice.id);
    say(`Voice ${voice.name} saved${voices.voice?.id === voice.id ? " and selected" : ""}`);
  } catch (error) {
    report(error);
  }
}

function csmReady() {
  return ["ready", "unloaded"].includes(server.health?.models?.["csm-1b"]?.state);
}

/** Where CSM can never run, no voice can be added, and the page says why. */
function showAdding() {
  const csm = server.models["csm-1b"];
  const never = csm?.state === "disabled";
  const why = never ? `Added voices need CSM-1B, which ${neverWords(csm) === "Switched off" ? "is switched off" : "needs Apple Silicon"}.` : "";
  byId("add-voice").disabled = never;
  byId("add-note").hidden = !never;
  setText(byId("add-note"), why);
}

/** A note for users whose server does not run CSM yet; empty if it does. */
function noteOnOwnVoices() {
  const csm = server.health?.models?.["csm-1b"];
  if (!csm || csmReady()) return "";
  return `Added voices use CSM-1B, which ${csm.state === "failed" ? "could not be loaded" : "is still loading"}. You can save a voice now and use it when CSM-1B is ready.`;
}

/** Load failed models again. */
async function tryAgain() {
  try {
    await call("admin/reload", { method: "POST" });
  } catch (error) {
    fail(error);
  }
  server.ask();
}

// -- Start ------------------------------------------------------------------------------------------------------------------------------

async function begin() {
  byId("key-button").hidden = !apiKey.value;
  showChoice();
  openLink();
  await Promise.all([server.ask(), listVoices()]);
  showChoice();
}

/** Take text, voice and speed from the page's address, if it is a link made under Share. Nothing is spoken before the user presses Speak. */
function openLink() {
  const linked = requestOf(location.hash);
  if (!linked) return;
  history.replaceState(null, "", location.pathname); // a reload keeps what the user has changed since
  stage.replace(linked.input, "Opened the link");
  settings.restore(linked);
  if (linked.voice) voices.choose(linked.voice);
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

byId("speak").addEventListener("click", () => (speech.busy || player.playing ? stop() : speak()));
byId("play").addEventListener("click", () => player.toggle());
byId("copy").addEventListener("click", copyCode);
byId("add-voice").addEventListener("click", () => voiceDialog.open(noteOnOwnVoices()));
byId("chosen").addEventListener("click", (event) => {
  event.preventDefault();
  byId("settings").scrollIntoView();
  voices.focus({ preventScroll: true });
});
byId("server-button").addEventListener("click", ({ currentTarget }) => {
  if (server.locked) return keyDialog.open();
  const open = byId("server-panel").toggleAttribute("hidden") === false;
  currentTarget.setAttribute("aria-expanded", String(open));
  return server.ask();
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
    previews.stop();
  }
});
addEventListener("hashchange", openLink);
text.addEventListener("click", seekToWord);
stage.addEventListener("change", edited);
stage.addEventListener("done", ({ detail }) => say(detail));
stage.addEventListener("fault", ({ detail }) => report({ message: detail }));
settings.addEventListener("change", edited);
byId("voices").addEventListener("change", edited);
voices.addEventListener("change", showChoice);
voices.addEventListener("deleted", ({ detail: name }) => say(`Voice ${name} deleted`));
server.addEventListener("change", () => listVoices(true));
server.addEventListener("asked", () => {
  if (server.health && shownError?.code === GONE) report(null);
  if (server.health && !listed && !server.locked) listVoices(true);
  showAdding();
  if (voices.voices.length) voices.update();
});
new Popup(byId("details-button"), byId("details"));
new Menu(byId("download"), byId("download-menu"), FILES, download);
render();
recent.load();
begin();
