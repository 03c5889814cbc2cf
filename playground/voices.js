// The list of voices: one radio button each, with description, model and state. Added voices can be deleted.

import { call, getJson } from "./api.js";
import { byId, make, memory, showAlert } from "./dom.js";
import { reasonOf, stateOf } from "./server_state.js";

// Ready voices come first; among those, the server's default voice, which has OpenAI's names as aliases.
const rank = ({ ready, aliases }) => (ready ? 0 : 2) + (aliases?.includes("alloy") ? 0 : 1);

export class VoiceList extends EventTarget {
  #list;
  #modelOf;
  #shown = "";

  /** @param modelOf Returns the state of a model by its id, if known. */
  constructor(list, modelOf) {
    super();
    this.#list = list;
    this.#modelOf = modelOf;
    this.voices = [];
    this.chosen = memory.read("voice");
    list.addEventListener("change", ({ target }) => this.choose(target.value));
    list.addEventListener("scroll", () => this.#showMore());
    new ResizeObserver(() => this.#showMore()).observe(list);
    this.#prepareDeleting();
  }

  /** The chosen voice, as the server describes it. */
  get voice() {
    return this.voices.find(({ id }) => id === this.chosen) ?? null;
  }

  /** Load the list from the server. */
  async refresh() {
    this.voices = (await getJson("v1/audio/voices")).voices.sort((a, b) => rank(a) - rank(b));
    if (!this.voice) this.chosen = this.voices[0]?.id ?? null;
    this.#render();
    this.dispatchEvent(new Event("change"));
  }

  /** Show that the voices could not be loaded, unless some are shown. @param locked Whether the API key is missing. */
  refuse(locked) {
    const words = locked ? "Enter the API key to see the voices." : "The voices could not be loaded.";
    if (!this.voices.length) this.#list.replaceChildren(make("p", { className: "empty" }, words));
  }

  choose(id) {
    this.chosen = id;
    memory.write("voice", id);
    for (const radio of this.#list.querySelectorAll("input")) radio.checked = radio.value === id;
    this.dispatchEvent(new Event("change"));
  }

  #render() {
    const now = JSON.stringify(this.voices.map((voice) => [voice, this.#stateOf(voice)]));
    if (now === this.#shown) return; // keeps the keyboard focus
    this.#shown = now;
    const focused = this.#list.contains(document.activeElement);
    this.#list.replaceChildren(...this.voices.map((voice) => this.#card(voice)));
    if (!this.voices.length) this.#list.append(make("p", { className: "empty" }, "The server has no voices. Its presets folder is empty."));
    if (focused) this.#list.querySelector("input:checked")?.focus();
    this.#showMore();
  }

  /** Fade the lower edge of the list while it continues below. */
  #showMore() {
    const { scrollHeight, scrollTop, clientHeight } = this.#list;
    this.#list.classList.toggle("more", scrollHeight - scrollTop - clientHeight > 8);
  }

  /** Return a voice's state as `[word, class of the dot, reason]`. */
  #stateOf({ ready, reason, model }) {
    if (ready) return ["Ready", "good", null];
    const state = this.#modelOf(model);
    if (!state || state.state === "ready") return ["Not ready", "", reason ?? null]; // not downloaded, or the two responses are from different times
    return [...stateOf(state), reasonOf(state) ?? "The voice is available when its model is loaded."];
  }

  #card(voice) {
    const { id, name, description, model } = voice;
    const [word, colour, why] = this.#stateOf(voice);
    const radio = make("input", { type: "radio", name: "voice", value: id, checked: id === this.chosen });
    radio.setAttribute("aria-describedby", `about-${id}`);
    const state = make("span", { className: "ready", title: why ?? "" }, make("span", { className: `dot ${colour}` }), word);
    const head = make("span", { className: "voice-head" }, make("b", {}, name ?? id), state);
    const about = make("div", { id: `about-${id}` }, make("p", {}, [description, model].filter(Boolean).join(" · ")));
    if (why) about.append(make("p", { className: "why" }, why));
    const card = make("div", { className: "voice" }, make("label", {}, radio, head), about);
    card.addEventListener("click", ({ target }) => target.closest("button, label") || radio.click());
    if (voice.uploaded) card.append(this.#deleteButton(voice));
    return card;
  }

  #deleteButton({ id, name }) {
    const button = make("button", { type: "button", className: "small-button" }, "Delete");
    button.setAttribute("aria-label", `Delete the voice ${name ?? id}`);
    button.addEventListener("click", () => {
      this.deleting = { id, name: name ?? id };
      showAlert(byId("delete-error"), null);
      byId("delete-note").textContent = `“${name ?? id}” and its recording will be deleted from the server. This cannot be undone.`;
      byId("delete-dialog").showModal();
    });
    return button;
  }

  #prepareDeleting() {
    const dialog = byId("delete-dialog");
    byId("delete-cancel").addEventListener("click", () => dialog.close());
    byId("delete-go").addEventListener("click", async () => {
      const { id, name } = this.deleting;
      try {
        await call(`v1/audio/voices/${encodeURIComponent(id)}`, { method: "DELETE" });
        dialog.close();
        await this.refresh();
        this.dispatchEvent(new CustomEvent("deleted", { detail: name }));
        byId("add-voice").focus();
      } catch (error) {
        showAlert(byId("delete-error"), error);
      }
    });
  }
}
