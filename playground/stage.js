// The text box: highlights the spoken word in place, sample texts, opened and dropped files, counter.
//
// The highlight is a mark in a copy of the text that lies exactly under the text box and is itself invisible.

import { byId, make, memory } from "./dom.js";

/** The page keeps the samples of a take in memory: an hour of speech has about 54,000 characters and 173 MB. */
export const MOST_CHARACTERS = 50_000;
const LARGEST_FILE = 1_000_000; // bytes
const UNTOUCHED = 3000; // milliseconds after the user has scrolled in which the page does not scroll

export const SAMPLES = [
  ["Greeting", "Good morning. This voice runs on your own machine, and nothing you type leaves it. Change this text, then press Speak."],
  [
    "Story",
    "The lighthouse keeper had one rule: never answer the radio after midnight. For thirty years it was an easy rule to keep. " +
      "Then, on the last night of October, a small voice on channel nine asked him, very politely, to turn the lamp off.",
  ],
  [
    "News",
    "Good evening, here are the headlines. Engineers in Rotterdam have opened the city’s longest bridge, two months ahead of schedule. " +
      "Bus fares will not rise this year, the council says. And the weather: clear skies tonight, with a light wind from the west.",
  ],
  [
    "Numbers",
    "On Mar. 3, 2026, at 9:45 a.m., the train covered 128 km in 1 h 12 min. Tickets cost $24.50, or 15% less for groups of 10–20. " +
      "Call (415) 555-0134, or write to info@example.com.",
  ],
  [
    "Dialogue",
    "“Is anybody home?” she called.\n“Only me,” said the parrot. “And I am not supposed to open the door.”\n" +
      "She laughed. “Then how about the window?”\n“Nobody has said anything about the window.”",
  ],
];

export class Stage extends EventTarget {
  #text = byId("text");
  #layer = byId("spoken");
  #sheet = byId("sheet");
  #shown = "";
  #scrolled = 0;
  #replaced = null; // the text before the last sample, file or Clear

  constructor() {
    super();
    byId("samples").append(...SAMPLES.map(([name, words]) => this.#chip(name, words)));
    this.#text.addEventListener("input", () => this.#changed());
    byId("clear").addEventListener("click", () => this.replace("", "Cleared"));
    byId("undo").addEventListener("click", () => this.replace(this.#replaced, "Restored"));
    byId("text-file").addEventListener("change", ({ target }) => this.#open(target.files[0]).then(() => (target.value = "")));
    for (const kind of ["wheel", "touchmove", "keydown"]) this.#sheet.addEventListener(kind, () => (this.#scrolled = performance.now()), { passive: true });
    this.#acceptDrops(byId("stage"));
    addEventListener("pagehide", () => memory.write("text", this.untouched ? null : this.value, sessionStorage));
    this.value = memory.read("text", sessionStorage) ?? SAMPLES[0][1]; // a reload keeps the user's own text
    this.#text.setSelectionRange(this.value.length, this.value.length);
  }

  get value() {
    return this.#text.value;
  }

  set value(words) {
    this.#text.value = words;
    byId("undo").hidden = true;
    this.highlight(null);
  }

  /** The number of characters as people and the server count them. */
  get length() {
    return [...this.value].length;
  }

  get untouched() {
    return SAMPLES.some(([, words]) => words === this.value.trim()) || !this.value.trim();
  }

  /** Replace the text; Undo restores what the user had written. */
  replace(words, done) {
    const before = this.value;
    const keep = !this.untouched;
    this.value = words;
    this.#changed();
    if (keep) this.#replaced = before;
    byId("undo").hidden = !keep;
    if (keep) this.#say(done);
    if (document.activeElement === document.body || document.activeElement === byId("undo") || !words) this.#text.focus();
  }

  /** Highlight a place in the text, `{from, to}`, or nothing. */
  highlight(place) {
    const text = this.value;
    const now = `${place?.from},${place?.to},${text}`;
    if (now === this.#shown) return;
    this.#shown = now;
    // A last empty line has a height in a text box, but not elsewhere.
    if (!place) return this.#layer.replaceChildren(`${text}\n`);
    const mark = make("mark", {}, text.slice(place.from, place.to));
    this.#layer.replaceChildren(text.slice(0, place.from), mark, `${text.slice(place.to)}\n`);
    this.#follow(mark);
  }

  /** Scroll the text, never the page, to the mark. */
  #follow(mark) {
    if (performance.now() - this.#scrolled < UNTOUCHED) return;
    const top = mark.offsetTop - this.#sheet.scrollTop;
    if (top < 0 || top + mark.offsetHeight > this.#sheet.clientHeight - 24) this.#sheet.scrollTop = mark.offsetTop - this.#sheet.clientHeight / 3;
  }

  #chip(name, words) {
    const chip = make("button", { type: "button", className: "chip" }, name);
    chip.addEventListener("click", () => this.replace(words, `${name} sample`));
    return chip;
  }

  #changed() {
    byId("undo").hidden = true;
    this.highlight(null);
    this.dispatchEvent(new Event("change"));
  }

  #say(words) {
    this.dispatchEvent(new CustomEvent("done", { detail: words }));
  }

  async #open(file) {
    if (!file) return;
    const fault = faultOf(file);
    const words = fault ? null : await new Response(file).arrayBuffer().then(decoded);
    if (words === null) return this.dispatchEvent(new CustomEvent("fault", { detail: fault ?? `“${file.name}” is not a text in UTF-8.` }));
    this.replace(words, `Opened ${file.name}`);
    if (byId("undo").hidden) this.#say(`Opened ${file.name}`);
  }

  #acceptDrops(stage) {
    let inside = 0; // dragenter and dragleave also report the elements within
    const show = (change) => stage.classList.toggle("dropping", (inside = Math.max(0, inside + change)) > 0);
    const hasFile = ({ dataTransfer }) => dataTransfer.types.includes("Files");
    stage.addEventListener("dragenter", (event) => hasFile(event) && show(1));
    stage.addEventListener("dragleave", (event) => hasFile(event) && show(-1));
    stage.addEventListener("dragover", (event) => hasFile(event) && event.preventDefault());
    stage.addEventListener("drop", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      show(-inside);
      this.#open(event.dataTransfer.files[0]);
    });
  }
}

function faultOf({ name, size }) {
  if (!/\.(txt|md|markdown|text)$/i.test(name)) return `“${name}” is not a .txt or .md file.`;
  return size > LARGEST_FILE ? `“${name}” is larger than 1 MB.` : null;
}

function decoded(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes).replaceAll("\r\n", "\n");
  } catch {
    return null;
  }
}
