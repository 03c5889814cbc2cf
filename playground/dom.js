// Helpers for all parts of the page: find and create elements, format numbers, store values.

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

/** Create an element: `make("p", {className: "hint"}, "text", child)`. Strings become text, never HTML. */
export function make(tag, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** Create an icon from paths in a 16 by 16 box, each as `[path, className]`. */
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

/** Set an element's text if it is another one: each setting costs a layout. */
export function setText(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

/** Format seconds as m:ss. */
export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Format a duration: 6.7 s, or 1 min 58 s. Unlike 1:58, it is not taken for a time of day. */
export function lasting(seconds) {
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** Capitalise the first letter. */
export const sentence = (words) => words.charAt(0).toUpperCase() + words.slice(1);

/** Format a number with two or three significant digits: 0.0042, 0.31, 12.4. */
export const brief = (value) => (value >= 10 ? value.toFixed(1) : value >= 0.1 ? value.toFixed(2) : value.toPrecision(2));

/** Show an error in an alert element, or hide the element if there is none. */
export function showAlert(element, error) {
  element.replaceChildren();
  element.hidden = !error;
  if (!error) return;
  element.append(error.message);
  if (error.requestId) element.append(make("small", {}, `Request ${error.requestId}`));
}

/** Values stored in this browser between visits. A browser that stores nothing (private windows) is not an error. */
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
      // Nothing depends on the stored value.
    }
  },
};
