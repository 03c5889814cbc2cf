// A button that opens a menu or a panel. Escape and a click elsewhere close it; the focus returns to the button.

import { make } from "./dom.js";

export class Popup {
  constructor(button, panel) {
    this.button = button;
    this.panel = panel;
    button.addEventListener("click", () => (panel.hidden ? this.open() : this.close(true)));
    document.addEventListener("pointerdown", ({ target }) => panel.contains(target) || button.contains(target) || this.close(false));
    panel.addEventListener("focusout", ({ relatedTarget }) => relatedTarget && !panel.contains(relatedTarget) && relatedTarget !== button && this.close(false));
    for (const element of [button, panel]) {
      element.addEventListener("keydown", (event) => {
        if (event.key !== "Escape" || panel.hidden) return;
        event.stopPropagation(); // Escape also stops the playback
        this.close(true);
      });
    }
  }

  open() {
    this.panel.hidden = false;
    this.button.setAttribute("aria-expanded", "true");
  }

  /** @param refocus Whether the focus goes back to the button. */
  close(refocus) {
    if (this.panel.hidden) return;
    this.panel.hidden = true;
    this.button.setAttribute("aria-expanded", "false");
    if (refocus) this.button.focus();
  }
}

export class Menu extends Popup {
  /** @param items `[[value, label, hint]]`; null is a line between two groups. @param choose Called with the value. */
  constructor(button, panel, items, choose) {
    super(button, panel);
    panel.replaceChildren(...items.map((item) => (item ? this.#item(item, choose) : make("hr", {}))));
    panel.addEventListener("keydown", (event) => this.#key(event));
    button.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
      event.preventDefault();
      this.open();
    });
  }

  open() {
    super.open();
    this.#items[0].focus();
  }

  get #items() {
    return [...this.panel.querySelectorAll("[role=menuitem]")];
  }

  #item([value, label, hint], choose) {
    const item = make("button", { type: "button", tabIndex: -1 }, make("b", {}, label), make("small", {}, hint));
    item.setAttribute("role", "menuitem");
    item.dataset.value = value;
    item.addEventListener("click", () => {
      this.close(true);
      choose(value);
    });
    return item;
  }

  #key(event) {
    const items = this.#items;
    const here = items.indexOf(document.activeElement);
    const next = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: -1 }[event.key];
    if (event.key === "Tab") this.close(true);
    if (next === undefined) return;
    event.preventDefault();
    items.at(next % items.length).focus();
  }
}
