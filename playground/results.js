// The list of recent takes, newest first, each with its figures and buttons: play, download, use its settings again.

import { brief, icon, lasting, make } from "./dom.js";

const KEPT = 6; // takes whose samples stay in memory; five minutes of speech are 29 MB

/** Return a take's known figures as `[name, value]`. */
export function figuresOf(take) {
  const known = [];
  if (take.firstAudio !== null) known.push(["First audio", `${Math.round(take.firstAudio)} ms`]);
  if (take.realTimeFactor !== null) known.push(["Real-time factor", brief(take.realTimeFactor)]);
  if (take.length) known.push(["Duration", lasting(take.duration)]);
  return known;
}

export class Results {
  #section;
  #list;
  #actions;
  #takes = [];

  /** @param actions `{play(take), download(take, button), restore(take)}`. */
  constructor(section, list, actions) {
    this.#section = section;
    this.#list = list;
    this.#actions = actions;
  }

  add(take) {
    this.#takes = [take, ...this.#takes].slice(0, KEPT);
    this.#list.prepend(this.#row(take));
    while (this.#list.children.length > KEPT) this.#list.lastChild.remove();
    this.#section.hidden = false;
  }

  /** Show which take is playing. */
  mark(playing) {
    for (const [index, row] of [...this.#list.children].entries()) {
      const button = row.querySelector(".round");
      const on = this.#takes[index] === playing;
      button.classList.toggle("active", on);
      button.setAttribute("aria-label", `${on ? "Pause" : "Play"}: ${excerpt(this.#takes[index])}`);
    }
  }

  #row(take) {
    const { seed, response_format: format } = take.request;
    const play = make("button", { type: "button", className: "round" }, icon(["M4.8 2.8v10.4L13.2 8z", "when-play"], ["M4 3h3v10H4zM9 3h3v10H9z", "when-pause"]));
    play.setAttribute("aria-label", `Play: ${excerpt(take)}`);
    play.addEventListener("click", () => this.#actions.play(take));
    const figures = figuresOf(take).map(([name, value]) => (name === "Duration" ? value : `${name.toLowerCase()} ${value}`));
    const state = { stopped: "stopped", failed: "incomplete" }[take.state];
    const meta = [take.voiceName, figures.pop(), ...figures, `seed\u00a0${seed}`, state].filter(Boolean).join(" · ");
    return make(
      "li",
      {},
      play,
      make("p", { className: "said" }, excerpt(take)),
      make("p", { className: "meta" }, meta),
      make("div", { className: "acts" }, this.#button(`${format.toUpperCase()}`, `Download as ${format}`, take, "download"), this.#button("Use again", "Use this text and these settings again", take, "restore")),
    );
  }

  #button(text, title, take, action) {
    const button = make("button", { type: "button", className: "small-button", title }, text);
    button.setAttribute("aria-label", `${title}: ${excerpt(take)}`);
    if (action === "download") button.prepend(icon(["M7.2 2h1.6v6l2.3-2.3 1.1 1.1L8 11 3.8 6.8l1.1-1.1L7.2 8zM3 12.4h10V14H3z"]));
    button.addEventListener("click", () => this.#actions[action](take, button));
    return button;
  }
}

const excerpt = ({ request: { input } }) => {
  const line = input.replace(/\s+/g, " ").trim();
  return line.length > 90 ? `${line.slice(0, 89)}…` : line;
};
