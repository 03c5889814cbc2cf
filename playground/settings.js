// The settings form: speed, and under Advanced seed, temperature and top-k. Speed and the last format are stored in this browser.

import { byId, memory, setText } from "./dom.js";

// The bounds of the server's request, each with its message.
const FIELDS = {
  seed: { id: "seed", pattern: /^\d*$/, least: 0, most: 2 ** 32 - 1, fault: `A whole number, 0 to ${2 ** 32 - 1}`, hint: "Empty: random" },
  temperature: { id: "temperature", pattern: /^(\d+([.,]\d*)?|[.,]\d+)?$/, least: 0, most: 2, fault: "A number, 0 to 2", hint: "Higher is livelier" },
  top_k: { id: "top-k", pattern: /^\d*$/, least: 1, most: 2051, fault: "A whole number, 1 to 2051", hint: "Lower is steadier" },
};

export class SettingsForm extends EventTarget {
  #speed = byId("speed");
  #model = "";

  constructor() {
    super();
    this.format = memory.read("format") ?? "mp3";
    this.restore({ speed: Number(memory.read("speed")) || 1 });
    for (const { id } of [{ id: "speed" }, ...Object.values(FIELDS)]) byId(id).addEventListener("input", () => this.#changed());
  }

  get values() {
    const fields = Object.fromEntries(Object.keys(FIELDS).map((name) => [name, this.#valueOf(name)]));
    return { response_format: this.format, speed: Number(this.#speed.value), ...fields };
  }

  /** The first invalid field as `[element, message]`, or null. */
  get fault() {
    const name = Object.keys(FIELDS).find((each) => this.#faulty(each));
    return name ? [byId(FIELDS[name].id), `${byId(FIELDS[name].id).labels[0].textContent}: ${FIELDS[name].fault.toLowerCase()}, or empty.`] : null;
  }

  restore({ speed, ...values }) {
    this.#speed.value = speed;
    for (const [name, { id }] of Object.entries(FIELDS)) byId(id).value = values[name] ?? "";
    this.#changed();
  }

  /** Set the format that the last download had; the code under Share uses it. */
  setFormat(format) {
    this.format = format;
    memory.write("format", format);
  }

  /** Only CSM has a sampler: the built-in voices ignore temperature and top-k. */
  setModel(model) {
    if (model === this.#model) return;
    this.#model = model;
    this.#changed();
  }

  #text(name) {
    return byId(FIELDS[name].id).value.trim().replace(",", ".");
  }

  #faulty(name) {
    const { pattern, least, most } = FIELDS[name];
    const text = this.#text(name);
    return text !== "" && (!pattern.test(text) || Number(text) < least || Number(text) > most);
  }

  #unused(name) {
    return name !== "seed" && this.#model === "hibari";
  }

  #valueOf(name) {
    const text = this.#text(name);
    return text === "" || this.#faulty(name) || this.#unused(name) ? null : Number(text);
  }

  #changed() {
    const speed = Number(this.#speed.value);
    byId("speed-shown").textContent = `${speed.toFixed(2)}×`;
    this.#speed.setAttribute("aria-valuetext", `${speed.toFixed(2)} times`);
    memory.write("speed", String(speed));
    for (const name of Object.keys(FIELDS)) this.#showHint(name);
    this.dispatchEvent(new Event("change"));
  }

  #showHint(name) {
    const { id, fault, hint } = FIELDS[name];
    const faulty = this.#faulty(name);
    byId(id).disabled = this.#unused(name);
    byId(id).setAttribute("aria-invalid", String(faulty));
    const words = this.#unused(name) ? "For CSM voices only" : faulty ? fault : hint;
    const element = byId(`${id}-hint`);
    setText(element, words);
    element.classList.toggle("fault", faulty);
  }
}

/** Return a random seed for a request without one, so that the download can repeat the request. */
export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
