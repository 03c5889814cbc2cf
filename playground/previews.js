// Previews of voices: a sentence in each voice, requested once and then kept in this browser.

import { speakFile } from "./api.js";
import { make, icon } from "./dom.js";
import { storedPreview, storePreview } from "./store.js";

const WORDS = "Hello, this is my voice. I can read to you for as long as you like.";
const SEED = 1; // so that a voice has one preview

export class Previews extends EventTarget {
  #player;
  #version;
  #playing = null; // {voice, controller}
  #state = "";
  #silence = null;

  /** @param player Plays the sound. @param version Returns the server's version: another version may sound different. */
  constructor(player, version) {
    super();
    this.#player = player;
    this.#version = version;
  }

  /** A button that plays and stops the preview of a voice. */
  button(voice) {
    const button = make("button", { type: "button", className: "round preview" }, icon(["M4.8 2.8v10.4L13.2 8z", "when-play"], ["M4 4h8v8H4z", "when-pause"]));
    button.dataset.preview = voice.id;
    button.dataset.name = voice.display_name;
    button.addEventListener("click", () => this.toggle(voice));
    this.#mark(button);
    return button;
  }

  toggle(voice) {
    if (this.#playing?.voice.id === voice.id) return this.stop();
    return this.#play(voice);
  }

  stop() {
    this.#playing?.controller.abort();
    this.#playing = null;
    this.#silence?.();
    this.#silence = null;
    this.#player.rest();
    this.#show("");
  }

  async #play(voice) {
    this.stop();
    const playing = { voice, controller: new AbortController() };
    this.#playing = playing;
    this.dispatchEvent(new Event("start"));
    this.#player.wake(); // browsers allow sound only right after a user action
    this.#show("waiting");
    try {
      const blob = await this.#load(voice, playing.controller.signal);
      if (this.#playing !== playing) return;
      const silence = await this.#player.clip(await blob.arrayBuffer(), () => this.#playing === playing && this.stop());
      if (this.#playing !== playing) return silence();
      this.#silence = silence;
      this.#show("playing");
    } catch (error) {
      if (this.#playing !== playing) return; // stopped
      this.stop();
      this.dispatchEvent(new CustomEvent("fault", { detail: error }));
    }
  }

  /** Return a preview: stored, or from the server, where it waits in the queue like every other request. */
  async #load({ id, model, description }, signal) {
    const key = [id, model, description, this.#version()].join(" ");
    const stored = await storedPreview(key);
    if (stored) return stored;
    const blob = await speakFile({ model, voice: id, input: WORDS, response_format: "mp3", seed: SEED }, signal);
    storePreview(key, blob);
    return blob;
  }

  #show(state) {
    this.#state = state;
    for (const button of document.querySelectorAll("[data-preview]")) this.#mark(button);
  }

  #mark(button) {
    const on = this.#playing?.voice.id === button.dataset.preview && this.#state !== "";
    button.classList.toggle("active", on);
    button.classList.toggle("waiting", on && this.#state === "waiting");
    button.setAttribute("aria-label", `${on ? "Stop" : "Hear"} ${button.dataset.name}`);
  }
}
