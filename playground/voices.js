// The voices: a card each for those that can speak; the others are folded under a line that says why they cannot, and what helps.

import { call, getJson } from "./api.js";
import { byId, make, memory, setText, showAlert } from "./dom.js";
import { restingWords } from "./server_state.js";

const isDefault = ({ aliases }) => aliases?.includes("alloy");
const rank = (voice) => (isDefault(voice) ? 0 : voice.uploaded ? 1 : 2);
const nameOf = (voice) => voice.display_name ?? voice.name ?? voice.id;

export class VoiceList extends EventTarget {
  #list = byId("voices");
  #resting = byId("resting");
  #modelOf;
  #previews;
  #again;
  #shown = "";
  #folded = "";
  #wanted = memory.read("voice"); // the user's own choice

  /** @param modelOf Returns the state of a model by its id, if known. @param previews Makes the preview buttons. @param again Loads failed models again. */
  constructor(modelOf, previews, again) {
    super();
    this.#modelOf = modelOf;
    this.#previews = previews;
    this.#again = again;
    this.voices = [];
    this.#list.addEventListener("change", ({ target }) => this.choose(target.value));
    this.#prepareDeleting();
  }

  /** The chosen voice: the user's choice if it can speak, else the default voice, else the first that can; null if none can. */
  get voice() {
    const ready = this.voices.filter((voice) => voice.ready);
    return ready.find(({ id }) => id === this.#wanted) ?? ready[0] ?? null;
  }

  /** Load the list from the server. */
  async refresh() {
    this.voices = (await getJson("v1/audio/voices")).voices.sort((a, b) => rank(a) - rank(b));
    this.update();
  }

  /** Show the voices with the current states of their models. */
  update() {
    this.#renderReady();
    this.#renderResting();
    this.#showMeanwhile();
    this.dispatchEvent(new Event("change"));
  }

  /** Show that the voices could not be loaded, unless some are shown. @param locked Whether the API key is missing. */
  refuse(locked) {
    const words = locked ? "Enter the API key to see the voices." : "The voices could not be loaded.";
    if (!this.voices.length) this.#list.replaceChildren(make("p", { className: "hint" }, words));
  }

  choose(id) {
    this.#wanted = id;
    memory.write("voice", id);
    this.#check();
    this.#renderResting();
    this.#showMeanwhile();
    this.dispatchEvent(new Event("change"));
  }

  /** Move the keyboard focus to the chosen voice. */
  focus(options) {
    this.#list.querySelector("input:checked")?.focus(options);
  }

  #check() {
    const chosen = this.voice?.id;
    for (const radio of this.#list.querySelectorAll("input")) radio.checked = radio.value === chosen;
  }

  #showMeanwhile() {
    const wanted = this.voices.find(({ id }) => id === this.#wanted);
    const words = wanted && !wanted.ready && this.voice ? `${nameOf(wanted)} cannot speak now. ${nameOf(this.voice)} is selected until it can.` : "";
    byId("meanwhile").hidden = !words;
    setText(byId("meanwhile"), words);
  }

  #renderReady() {
    const ready = this.voices.filter((voice) => voice.ready);
    const now = JSON.stringify(ready);
    if (now !== this.#shown) {
      this.#shown = now;
      const focused = this.#list.contains(document.activeElement) && document.activeElement.closest(".voice")?.dataset.voice;
      this.#list.replaceChildren(...ready.map((voice) => this.#card(voice)));
      if (!ready.length) this.#list.append(make("p", { className: "hint" }, this.voices.length ? "No voice can speak yet." : "The server has no voices. Its presets folder is empty."));
      if (focused) (this.#list.querySelector(`[data-voice="${CSS.escape(focused)}"] input`) ?? this.#list.querySelector("input"))?.focus();
    }
    this.#check();
  }

  #card(voice) {
    const { id, description } = voice;
    const radio = make("input", { type: "radio", name: "voice", value: id });
    radio.setAttribute("aria-describedby", `about-${id}`);
    const about = make("p", { id: `about-${id}` }, description);
    const card = make("div", { className: "voice" }, this.#previews.button(voice), make("label", {}, radio, make("b", {}, nameOf(voice))), about);
    card.dataset.voice = id;
    card.addEventListener("click", ({ target }) => target.closest("button, label") || radio.click());
    if (voice.uploaded) card.append(this.#deleteButton(voice));
    return card;
  }

  // -- Voices that cannot speak ------------------------------------------------------------------------------------------------------------

  #groups() {
    const groups = new Map();
    for (const voice of this.voices.filter(({ ready }) => !ready)) {
      const words = restingWords(this.#modelOf(voice.model), voice);
      const key = `${voice.model} ${words.kind}`;
      if (!groups.has(key)) groups.set(key, { key, words, voices: [] });
      groups.get(key).voices.push(voice);
    }
    return [...groups.values()];
  }

  /** Render the groups, or only update their words: an open group stays open, and the focus stays where it is. */
  #renderResting() {
    const groups = this.#groups();
    const speaker = this.voice;
    const now = JSON.stringify([groups.map(({ key, voices }) => [key, voices.map(({ id }) => id)]), speaker?.id, this.#wanted]);
    if (now !== this.#folded) {
      const open = new Set([...this.#resting.querySelectorAll("details[open]")].flatMap(({ dataset }) => dataset.voices.split(" ")));
      const focused = this.#resting.contains(document.activeElement);
      this.#folded = now;
      this.#resting.replaceChildren(...groups.map((group) => this.#group(group, speaker, group.voices.some(({ id }) => open.has(id)))));
      if (focused) (this.#resting.querySelector("summary") ?? this.#list.querySelector("input:checked"))?.focus();
    }
    for (const [index, { words }] of groups.entries()) {
      const element = this.#resting.children[index];
      for (const name of ["line", "reason"]) {
        const part = element.querySelector(`.${name}`);
        setText(part, words[name]);
      }
    }
  }

  #group({ words, voices }, speaker, open) {
    const names = voices.map(nameOf).join(", ");
    const summary = make("summary", {}, make("span", { className: `dot ${words.dot}` }), make("b", {}, names), make("span", { className: "line" }));
    const items = voices.map((voice) => {
      const item = make("li", {}, make("b", {}, nameOf(voice)), ` ${voice.description}`);
      if (voice.uploaded) item.append(" ", this.#deleteButton(voice));
      return item;
    });
    const helps = make("div", { className: "helps" });
    if (words.again) helps.append(this.#helpButton("Try again now", () => this.#again()));
    if (speaker && voices.some(({ id }) => id === this.#wanted)) helps.append(this.#helpButton(`Use ${nameOf(speaker)} meanwhile`, () => this.#useMeanwhile(speaker.id)));
    const group = make("details", { className: "resting", open }, summary, make("p", { className: "reason" }), make("ul", {}, ...items), helps);
    group.dataset.voices = voices.map(({ id }) => id).join(" ");
    return group;
  }

  #helpButton(words, action) {
    const button = make("button", { type: "button", className: "secondary" }, words);
    button.addEventListener("click", action);
    return button;
  }

  #useMeanwhile(id) {
    this.choose(id);
    this.focus();
  }

  // -- Deleting --------------------------------------------------------------------------------------------------------------------------

  #deleteButton(voice) {
    const button = make("button", { type: "button", className: "small-button" }, "Delete");
    button.setAttribute("aria-label", `Delete the voice ${nameOf(voice)}`);
    button.addEventListener("click", () => {
      this.deleting = voice;
      showAlert(byId("delete-error"), null);
      byId("delete-note").textContent = `“${nameOf(voice)}” and its recording will be deleted from the server. This cannot be undone.`;
      byId("delete-dialog").showModal();
    });
    return button;
  }

  #prepareDeleting() {
    const dialog = byId("delete-dialog");
    byId("delete-cancel").addEventListener("click", () => dialog.close());
    byId("delete-go").addEventListener("click", async () => {
      const { id } = this.deleting;
      try {
        await call(`v1/audio/voices/${encodeURIComponent(id)}`, { method: "DELETE" });
        dialog.close();
        await this.refresh();
        this.dispatchEvent(new CustomEvent("deleted", { detail: nameOf(this.deleting) }));
        byId("add-voice").focus();
      } catch (error) {
        showAlert(byId("delete-error"), error);
      }
    });
  }
}
