// Polls the server's state and shows it: one word in the header, and each model's progress in the panel.

import { ApiError, getJson } from "./api.js";
import { make, sentence, setText } from "./dom.js";

const BUSY = 1500; // polling interval in milliseconds while something changes
const CALM = 8000; // otherwise
const MEASURED = 3; // seconds of a download before its remaining time is shown

const WORDS = { ready: "Ready", ok: "Ready", loading: "Loading", failed: "Failed", disabled: "Off", unloaded: "Unloaded" };
const DOTS = { ready: "good", ok: "good", loading: "wait", degraded: "wait", failed: "bad" };

export class ServerState extends EventTarget {
  #parts;
  #timer = 0;
  #lastState = "";
  #speeds = new Map(); // of the downloads, by model

  /** @param parts `{dot, word, models, queue, fallback}` elements. */
  constructor(parts) {
    super();
    this.#parts = parts;
    this.health = null;
    this.models = {}; // as they were last known
    this.hurry = false; // polls often, because a request of this page is in progress
    document.addEventListener("visibilitychange", () => document.hidden || this.ask());
  }

  /** Poll now, and keep polling. */
  async ask() {
    clearTimeout(this.#timer);
    let fault = null;
    try {
      this.health = await getJson("health");
      this.models = this.health.models ?? {};
      this.#measure();
    } catch (error) {
      this.health = null;
      fault = error;
    }
    this.#show(fault);
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.ask(), this.#moving() ? BUSY : CALM);
  }

  #moving() {
    const { status, queue } = this.health ?? {};
    return this.hurry || status !== "ok" || (queue?.active ?? 0) + (queue?.waiting ?? 0) > 0;
  }

  #show(fault) {
    const { dot, word, models, queue, fallback } = this.#parts;
    const [text, colour] = this.locked ? ["API key required", "wait"] : this.health ? summary(this.health) : [fault instanceof ApiError && fault.status ? "Refused" : "Offline", "bad"];
    setText(word, text);
    dot.className = `dot ${colour}`;
    if (!models.contains(document.activeElement)) models.replaceChildren(...Object.entries(this.health?.models ?? {}).map(([id, model]) => modelItem(id, model)));
    queue.textContent = this.health ? queueWords(this.health) : fault.message;
    const words = fallbackWords(this.health?.fallback);
    fallback.hidden = !words;
    setText(fallback, words);
    this.#notifyChanges();
    this.dispatchEvent(new Event("asked"));
  }

  /** Add `seconds_left` to the progress of each download, from its speed since the page was opened. */
  #measure() {
    for (const [id, { progress }] of Object.entries(this.models)) {
      if (!progress?.total) {
        this.#speeds.delete(id);
        continue;
      }
      const now = { at: performance.now() / 1000, done: progress.done };
      const known = this.#speeds.get(id) ?? now;
      const first = known.done > now.done ? now : known; // another file
      this.#speeds.set(id, first);
      const seconds = now.at - first.at;
      if (seconds >= MEASURED && now.done > first.done) progress.seconds_left = ((progress.total - now.done) * seconds) / (now.done - first.done);
    }
  }

  /** Whether the server hides its state because the API key is missing. */
  get locked() {
    return this.health !== null && !this.health.models;
  }

  /** Dispatch "change" when a model's state changed, because the voices change with it; not at the first answer. */
  #notifyChanges() {
    const states = Object.entries(this.health?.models ?? {}).map(([id, model]) => `${id} ${model.state}`);
    const now = this.health ? [this.health.status, ...states].join() : "offline";
    if (this.#lastState && now !== "offline" && now !== this.#lastState) this.dispatchEvent(new Event("change"));
    this.#lastState = now;
  }
}

function summary(health) {
  const models = Object.entries(health.models);
  const loading = models.find(([, model]) => model.state === "loading");
  if (loading) return [`Loading ${loading[0]}${percent(loading[1].progress)}`, "wait"];
  const { active = 0, waiting = 0 } = health.queue ?? {};
  if (waiting) return [`Busy, ${waiting} waiting`, "good"]; // not "Speaking": the page may be silent, or still play what has arrived
  if (active) return ["Busy", "good"];
  const failed = models.find(([, model]) => model.state === "failed");
  if (failed) return [`${failed[0]} failed`, "bad"];
  return [WORDS[health.status] ?? health.status, DOTS[health.status] ?? ""];
}

const percent = (progress) => (typeof progress?.fraction === "number" ? ` ${Math.floor(progress.fraction * 100)} %` : "");

function queueWords({ queue, version }) {
  if (!queue) return "This server requires an API key.";
  const { active, waiting } = queue;
  return `Version ${version}. Requests: ${active} active, ${waiting} waiting.`;
}

const fallbackWords = (fallback) =>
  fallback ? `The default voice ${fallback.replaces} is not ready. Until it is, ${fallback.voice} speaks for clients that use OpenAI's voice names.` : "";

/** Return a model's state as a word, and the class of its dot. */
const stateOf = (model) => [WORDS[model?.state] ?? model?.state ?? "", DOTS[model?.state] ?? ""];

/** Return why a model cannot speak, as a sentence, or null if there is no error. */
function reasonOf(model) {
  const reason = typeof model?.error === "string" ? model.error : model?.error?.message;
  if (!reason) return null;
  return /^[A-Z_]+=\S+$/.test(reason) ? `Switched off by a setting (${reason.replace(/\.$/, "")}).` : sentence(reason);
}

function modelItem(id, model) {
  const [word, colour] = stateOf(model);
  const item = make(
    "li",
    {},
    make(
      "div",
      { className: "model-head" },
      make("span", { className: `dot ${colour}` }),
      make("span", {}, id),
      make("span", { className: "state" }, word + percent(model.progress)),
    ),
  );
  if (model.state === "loading") item.append(progressBar(id, model.progress), make("p", {}, loadingWords(model.progress)));
  const reason = reasonOf(model);
  if (reason) item.append(make("p", {}, reason));
  return item;
}

function progressBar(id, progress) {
  const bar = make("progress", { attributes: { "aria-label": `Loading ${id}` } });
  if (typeof progress?.fraction === "number") Object.assign(bar, { max: 1, value: progress.fraction });
  return bar;
}

/**
 * Return why a voice cannot speak: `{kind, line, reason, dot, again}`. Voices of one kind are shown together.
 *
 * `again` says whether loading again may help.
 */
export function restingWords(model, voice) {
  const reason = reasonOf(model) ?? sentence(voice.reason ?? "The voice is available when its model is loaded.");
  if (model?.state === "loading") return { kind: "loading", line: downloadWords(model.progress), reason: "It can speak as soon as its model is loaded.", dot: "wait", again: false };
  if (model?.state === "failed") return { kind: "failed", line: `Could not be loaded${nextTry(model)}`, reason, dot: "bad", again: true };
  if (model?.state === "disabled") return { kind: "disabled", line: neverWords(model), reason, dot: "", again: false };
  if (/is not downloaded/.test(voice.reason ?? "")) return missingWords(voice.reason);
  return { kind: "other", line: "Not ready", reason, dot: "wait", again: false };
}

function missingWords(reason) {
  const why = sentence(reason.replace(/^.*is not downloaded: /, ""));
  if (/HF_HUB_OFFLINE/.test(why)) return { kind: "offline", line: "Not downloaded (HF_HUB_OFFLINE)", reason: "The server downloads nothing while HF_HUB_OFFLINE is set.", dot: "", again: false };
  if (/has not finished/.test(why)) return { kind: "fetching", line: "Downloading, 8 MB each", reason: "The server downloads these voices in the background.", dot: "wait", again: false };
  return { kind: "missing", line: "Could not be downloaded", reason: why, dot: "", again: true };
}

/** Return why a model never runs on this server, in three or four words. */
export function neverWords(model) {
  return /Apple Silicon/.test(model.error ?? "") ? "Needs Apple Silicon" : "Switched off";
}

function nextTry({ next_try_seconds: seconds }) {
  return seconds ? `, next try in ${remaining(seconds)}` : "";
}

const remaining = (seconds) => (seconds < 90 ? `${Math.ceil(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`);

/** Return the progress of a load: "Downloading, 34 %, 4 min left". */
function downloadWords(progress) {
  const stage = /^download/i.test(progress?.stage ?? "") ? "Downloading" : "Loading";
  const left = progress?.seconds_left ? `, ${remaining(progress.seconds_left)} left` : "";
  return `${stage}${percent(progress).replace(" ", ", ")}${left}`;
}

function loadingWords(progress) {
  const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(2)} GB`;
  const amount = progress?.total ? ` (${gigabytes(progress.done ?? 0)} of ${gigabytes(progress.total)})` : "";
  const left = progress?.seconds_left ? `, ${remaining(progress.seconds_left)} left` : "";
  return `${sentence(progress?.stage ?? "loading")}${amount}${left}`;
}
