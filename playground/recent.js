// The list of recent takes, newest first: play, use the settings again, delete. It survives a reload.

import { brief, byId, icon, lasting, make } from "./dom.js";
import { forgetTake, forgetTakes, MOST_TAKES, storedSamples, storedTakes, storeTake } from "./store.js";
import { Take } from "./take.js";

const PLAY = ["M4.8 2.8v10.4L13.2 8z", "when-play"];
const PAUSE = ["M4 3h3v10H4zM9 3h3v10H9z", "when-pause"];

/** Return a take's known figures as `[name, value]`. */
export function figuresOf(take) {
  const known = [];
  if (take.firstAudio !== null) known.push(["First audio", `${Math.round(take.firstAudio)} ms`]);
  if (take.realTimeFactor !== null) known.push(["Real-time factor", brief(take.realTimeFactor)]);
  if (take.length) known.push(["Duration", lasting(take.duration)]);
  if (take.queued >= 0.1) known.push(["In the queue", lasting(take.queued)]);
  known.push(["Seed", String(take.request.seed)]);
  return known;
}

export class Recent {
  #section = byId("recent");
  #list = byId("results");
  #actions;
  #rows = new Map(); // take → row
  #stored = new Set(); // takes that are in memory and in the store

  /** @param actions `{play(take), restore(take), current()}`; `current` returns the take in the player. */
  constructor(actions) {
    this.#actions = actions;
    byId("recent-clear").addEventListener("click", () => this.#clear());
  }

  /** Show the takes of earlier visits. */
  async load() {
    for (const record of await storedTakes()) this.#append(Object.assign(new Take(record.request, record.voiceName, record.parts), record), false);
  }

  /** Add the take that was just spoken. Only its samples and those of takes that could not be stored stay in memory. */
  async add(take) {
    for (const old of this.#stored) {
      if (old === this.#actions.current()) continue;
      old.release();
      this.#stored.delete(old);
    }
    this.#append(take, true);
    for (const [old, row] of [...this.#rows].sort(([a], [b]) => b.made - a.made).slice(MOST_TAKES)) this.#drop(old, row);
    if (await storeTake(take.record(), take.pieces)) this.#stored.add(take);
  }

  /** Show which take is playing. */
  mark(playing) {
    for (const [take, row] of this.#rows) {
      const button = row.querySelector(".round");
      const on = take === playing;
      button.classList.toggle("active", on);
      button.setAttribute("aria-label", `${on ? "Pause" : "Play"}: ${excerpt(take)}`);
    }
  }

  #append(take, first) {
    const row = this.#row(take);
    this.#rows.set(take, row);
    if (first) this.#list.prepend(row);
    else this.#list.append(row);
    this.#section.hidden = false;
  }

  #drop(take, row) {
    row.remove();
    this.#rows.delete(take);
    this.#section.hidden = this.#rows.size === 0;
  }

  async #play(take) {
    if (take.pieces.length === 0) {
      const samples = await storedSamples(take.id);
      if (!samples) return;
      take.fill(samples);
      this.#stored.add(take);
    }
    this.#actions.play(take);
  }

  async #clear() {
    await forgetTakes();
    for (const [take, row] of [...this.#rows]) this.#drop(take, row);
    byId("text").focus();
  }

  #row(take) {
    const play = make("button", { type: "button", className: "round" }, icon(PLAY, PAUSE));
    play.setAttribute("aria-label", `Play: ${excerpt(take)}`);
    play.addEventListener("click", () => this.#play(take));
    const state = { stopped: "stopped", failed: "incomplete" }[take.state];
    const meta = [take.voiceName, lasting(take.duration), ago(take.made), state].filter(Boolean).join(" · ");
    const again = this.#button("Use again", "Use this text and these settings again", take, () => this.#actions.restore(take));
    const remove = this.#button("Delete", "Delete this take", take, () => this.#remove(take));
    return make("li", {}, play, make("p", { className: "said" }, excerpt(take)), make("p", { className: "meta" }, meta), make("div", { className: "acts" }, again, remove));
  }

  async #remove(take) {
    const row = this.#rows.get(take);
    const next = row.nextElementSibling ?? row.previousElementSibling;
    await forgetTake(take.id);
    this.#drop(take, row);
    (next?.querySelector(".acts button:last-child") ?? byId("text")).focus();
  }

  #button(text, title, take, action) {
    const button = make("button", { type: "button", className: "small-button", title }, text);
    button.setAttribute("aria-label", `${text}: ${excerpt(take)}`);
    button.addEventListener("click", action);
    return button;
  }
}

/** Return when something was made: the time today, else the day. */
function ago(made) {
  const then = new Date(made);
  const today = then.toDateString() === new Date().toDateString();
  return today ? then.toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", hour12: false }) : then.toLocaleDateString("en", { day: "numeric", month: "short" });
}

const excerpt = ({ request: { input } }) => {
  const line = input.replace(/\s+/g, " ").trim();
  return line.length > 90 ? `${line.slice(0, 89)}…` : line;
};
