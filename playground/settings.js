// The settings form: format, speed and seed. Format and speed are stored in this browser between visits.

import { byId, memory } from "./dom.js";

const LARGEST_SEED = 2 ** 32 - 1;

export class SettingsForm extends EventTarget {
  #speed = byId("speed");
  #seed = byId("seed");
  #formats = [...document.querySelectorAll("[name=format]")];

  constructor() {
    super();
    this.restore({ speed: Number(memory.read("speed")) || 1, response_format: memory.read("format") ?? "mp3", seed: null });
    for (const input of [this.#speed, this.#seed, ...this.#formats]) input.addEventListener("input", () => this.#changed());
  }

  get values() {
    const text = this.#seed.value.trim();
    const seed = text && !this.fault ? Number(text) : null;
    return { response_format: this.#formats.find(({ checked }) => checked).value, speed: Number(this.#speed.value), seed };
  }

  /** Why the seed is invalid, or null if it is valid. */
  get fault() {
    const text = this.#seed.value.trim();
    const usable = /^\d*$/.test(text) && Number(text) <= LARGEST_SEED;
    return usable ? null : `The seed must be a whole number from 0 to ${LARGEST_SEED}, or empty.`;
  }

  restore({ speed, response_format: format, seed }) {
    this.#speed.value = speed;
    this.#seed.value = seed ?? "";
    const radio = this.#formats.find(({ value }) => value === format) ?? this.#formats[0];
    radio.checked = true;
    this.#changed();
  }

  #changed() {
    const { speed, response_format: format } = this.values;
    byId("speed-shown").textContent = `${speed.toFixed(2)}×`;
    this.#speed.setAttribute("aria-valuetext", `${speed.toFixed(2)} times`);
    memory.write("speed", String(speed));
    memory.write("format", format);
    const { fault } = this;
    this.#seed.setAttribute("aria-invalid", String(fault !== null));
    byId("seed-hint").textContent = fault ? `A whole number, 0 to ${LARGEST_SEED}` : "Empty: random";
    byId("seed-hint").classList.toggle("fault", fault !== null);
    this.dispatchEvent(new Event("change"));
  }
}

/** Return a random seed for a request without one, so that the download can repeat the request. */
export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
