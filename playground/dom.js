// Small things every part of the page needs: finding elements, making them, and saying numbers.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element: `make("p", {className: "hint"}, "text", child)`. Text is always set as text, never read as HTML. */
export function make(tag, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An icon: paths in a 16 by 16 box, as `[path, className]`. */
export function icon(...paths) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  for (const [d, className = ""] of paths) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", className);
    svg.append(path);
  }
  return svg;
}

/** Seconds as m:ss. */
export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** How long something lasts: 6.7 s, and from a minute on 1:58. */
export const lasting = (seconds) => (seconds < 59.95 ? `${seconds.toFixed(1)} s` : clock(seconds));

/** Words that were written to follow a colon, as a sentence of their own. */
export const sentence = (words) => words.charAt(0).toUpperCase() + words.slice(1);

/** A number with about three digits that matter: 0.0042, 0.31, 12.4. */
export const brief = (value) => (value >= 10 ? value.toFixed(1) : value >= 0.1 ? value.toFixed(2) : value.toPrecision(2));

/** Show `message` in an alert element, or hide it when there is none. */
export function showAlert(element, error) {
  element.replaceChildren();
  element.hidden = !error;
  if (!error) return;
  element.append(error.message);
  if (error.requestId) element.append(make("small", {}, `Request ${error.requestId}`));
}

/** What is kept in this browser between visits; a browser that keeps nothing (private windows) is no error. */
export const memory = {
  read(name, store = localStorage) {
    try {
      return store.getItem(`sesame.${name}`);
    } catch {
      return null;
    }
  },
  write(name, value, store = localStorage) {
    try {
      if (value === null) store.removeItem(`sesame.${name}`);
      else store.setItem(`sesame.${name}`, value);
    } catch {
      // Nothing depends on it being kept.
    }
  },
};
