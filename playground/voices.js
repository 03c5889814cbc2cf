// The list of voices: one radio button each, with its description, its model and whether it can speak now; own voices can be deleted.

import { call, getJson } from "./api.js";
import { byId, make, memory, showAlert } from "./dom.js";
import { reasonOf, stateOf } from "./server_state.js";

// Who can speak now comes first; among equals the server's default voice, which OpenAI's names reach.
const rank = ({ ready, aliases }) => (ready ? 0 : 2) + (aliases?.includes("alloy") ? 0 : 1);

export class VoiceList extends EventTarget {
  #list;
  #modelOf;
  #shown = "";

  /** @param modelOf Gives the server's facts about the model of this id, where they are known. */
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

  /** Ask the server again. */
  async refresh() {
    this.voices = (await getJson("v1/audio/voices")).voices.sort((a, b) => rank(a) - rank(b));
    if (!this.voice) this.chosen = this.voices[0]?.id ?? null;
    this.#render();
    this.dispatchEvent(new Event("change"));
  }

  /** The server did not list its voices: say so in their place, unless some are shown already. @param locked Whether a key would help. */
  refuse(locked) {
    const words = locked ? "The server lists its voices once it has your key." : "The server has not listed its voices.";
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
    if (now === this.#shown) return; // leaves the keyboard's focus where it is
    this.#shown = now;
    const focused = this.#list.contains(document.activeElement);
    this.#list.replaceChildren(...this.voices.map((voice) => this.#card(voice)));
    if (!this.voices.length) this.#list.append(make("p", { className: "empty" }, "The server has no voice. Its presets folder is empty."));
    if (focused) this.#list.querySelector("input:checked")?.focus();
    this.#showMore();
  }

  /** The list fades out at its lower edge while there is more below. */
  #showMore() {
    const { scrollHeight, scrollTop, clientHeight } = this.#list;
    this.#list.classList.toggle("more", scrollHeight - scrollTop - clientHeight > 8);
  }

  /** Whether a voice can speak, as `[word, class of the dot, why not]`. */
  #stateOf({ ready, model }) {
    if (ready) return ["Ready", "good", null];
    const facts = this.#modelOf(model);
    if (!facts || facts.state === "ready") return ["Not ready", "", null]; // one of the two answers is older than the other
    return [...stateOf(facts), reasonOf(facts) ?? "It can speak once its model is loaded."];
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
      byId("delete-note").textContent = `“${name ?? id}” and its recording are removed from the server. This cannot be undone.`;
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
