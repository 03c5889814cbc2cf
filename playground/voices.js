// The list of voices: one radio button each, with its description, its model and whether it can speak now; own voices can be deleted.

import { call, getJson } from "./api.js";
import { byId, make, memory, showAlert } from "./dom.js";

export class VoiceList extends EventTarget {
  #list;
  #shown = "";

  constructor(list) {
    super();
    this.#list = list;
    this.voices = [];
    this.chosen = memory.read("voice");
    list.addEventListener("change", ({ target }) => this.choose(target.value));
    this.#prepareDeleting();
  }

  /** The chosen voice, as the server describes it. */
  get voice() {
    return this.voices.find(({ id }) => id === this.chosen) ?? null;
  }

  /** Ask the server again. */
  async refresh() {
    this.voices = (await getJson("v1/audio/voices")).voices;
    if (!this.voice) this.chosen = this.#suggestion()?.id ?? null;
    this.#render();
    this.dispatchEvent(new Event("change"));
  }

  /** The server's default voice, which OpenAI's names reach; while that is not ready, one that is. */
  #suggestion() {
    const ready = this.voices.filter((voice) => voice.ready);
    const standard = ({ aliases }) => aliases?.includes("alloy");
    return ready.find(standard) ?? ready[0] ?? this.voices.find(standard) ?? this.voices[0];
  }

  /** The server did not list its voices: say so in their place, unless some are shown already. */
  refuse() {
    if (!this.voices.length) this.#list.replaceChildren(make("p", { className: "empty" }, "The server has not listed its voices."));
  }

  choose(id) {
    this.chosen = id;
    memory.write("voice", id);
    for (const radio of this.#list.querySelectorAll("input")) radio.checked = radio.value === id;
    this.dispatchEvent(new Event("change"));
  }

  #render() {
    const now = JSON.stringify(this.voices);
    if (now === this.#shown) return; // leaves the keyboard's focus where it is
    this.#shown = now;
    const focused = this.#list.contains(document.activeElement);
    this.#list.replaceChildren(...this.voices.map((voice) => this.#card(voice)));
    if (!this.voices.length) this.#list.append(make("p", { className: "empty" }, "The server has no voice. Its presets folder is empty."));
    if (focused) this.#list.querySelector("input:checked")?.focus();
  }

  #card(voice) {
    const { id, name, description, model, ready } = voice;
    const radio = make("input", { type: "radio", name: "voice", value: id, checked: id === this.chosen });
    radio.setAttribute("aria-describedby", `about-${id}`);
    const state = make("span", { className: "ready" }, make("span", { className: `dot ${ready ? "good" : ""}` }), ready ? "Ready" : "Not ready");
    const head = make("span", { className: "voice-head" }, make("b", {}, name ?? id), state);
    const about = make("p", { id: `about-${id}` }, [description, model].filter(Boolean).join(" · "));
    const card = make("div", { className: "voice" }, make("label", {}, radio, head), about);
    card.addEventListener("click", ({ target }) => target.closest("button, label") || radio.click());
    if (voice.uploaded) card.append(this.#deleteButton(voice));
    return card;
  }

  #deleteButton({ id, name }) {
    const button = make("button", { type: "button", className: "small-button" }, "Delete");
    button.setAttribute("aria-label", `Delete the voice ${name ?? id}`);
    button.addEventListener("click", () => {
      this.deleting = id;
      showAlert(byId("delete-error"), null);
      byId("delete-note").textContent = `“${name ?? id}” and its recording are removed from the server. This cannot be undone.`;
      byId("delete-dialog").showModal();
    });
    return button;
  }

  #prepareDeleting() {
    const dialog = byId("delete-dialog");
    byId("delete-cancel").addEventListener("click", () => dialog.close());
    byId("delete-go").addEventListener("click", async () => {
      try {
        await call(`v1/audio/voices/${encodeURIComponent(this.deleting)}`, { method: "DELETE" });
        dialog.close();
        await this.refresh();
        byId("add-voice").focus();
      } catch (error) {
        showAlert(byId("delete-error"), error);
      }
    });
  }
}
