// Asks for the API key when the server refuses without one, and lets the user forget it again.

import { apiKey, getJson } from "./api.js";
import { byId, showAlert } from "./dom.js";

export class KeyDialog {
  #dialog = byId("key-dialog");
  #accepted;
  #next = null;

  /** @param accepted Called when a key was accepted, or forgotten; returns a promise. */
  constructor(accepted) {
    this.#accepted = accepted;
    byId("key-button").addEventListener("click", () => this.open());
    byId("key-cancel").addEventListener("click", () => this.#dialog.close());
    byId("key-forget").addEventListener("click", () => this.#forget());
    this.#dialog.addEventListener("close", () => (this.#next = null));
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#try();
    });
  }

  /**
   * @param error Why it is asked, if the server has refused a key.
   * @param next What the user was about to do: done once a key is accepted, forgotten when the dialog is cancelled.
   */
  open(error = null, next = null) {
    this.#next = next ?? this.#next;
    byId("key-forget").hidden = !apiKey.value;
    byId("key-keep").checked = apiKey.kept;
    showAlert(byId("key-error"), apiKey.value ? error : null);
    if (!this.#dialog.open) this.#dialog.showModal();
    byId("key").focus();
  }

  async #try() {
    const before = apiKey.value;
    const key = byId("key").value.trim();
    // A header holds no other characters; fetch would fail on them without saying why.
    const unusable = key ? /[^\x21-\x7e]/.test(key) && "A key holds only letters, digits and signs, without spaces." : "Type the key first.";
    if (unusable) return showAlert(byId("key-error"), { message: unusable });
    apiKey.value = key;
    try {
      await getJson("v1/audio/voices");
    } catch (error) {
      apiKey.value = before;
      return showAlert(byId("key-error"), error);
    }
    apiKey.set(key, byId("key-keep").checked);
    byId("key").value = "";
    const next = this.#next;
    this.#dialog.close();
    await this.#accepted();
    next?.();
  }

  #forget() {
    apiKey.set("", false);
    byId("key").value = "";
    this.#dialog.close();
    this.#accepted();
  }
}
