// The dialog for the API key: enter it, remember it, forget it.

import { apiKey, getJson } from "./api.js";
import { byId, showAlert } from "./dom.js";

export class KeyDialog {
  #dialog = byId("key-dialog");
  #accepted;
  #next = null;

  /** @param accepted Called after a key was accepted or forgotten; returns a promise. */
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
   * @param error The server's error, if it refused a key.
   * @param next The interrupted action; called after a key was accepted, dropped if the dialog is cancelled.
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
    // A header allows no other characters; fetch would fail without a useful message.
    const unusable = key ? /[^\x21-\x7e]/.test(key) && "A key contains only letters, digits and symbols, without spaces." : "Enter the key.";
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
