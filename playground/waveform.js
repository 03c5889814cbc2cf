// Draws a take: bars for the audio that has arrived, the played part in the accent colour, dots for the expected rest.

import { clock } from "./dom.js";

const BAR = 3;
const GAP = 2;

export class Waveform {
  #canvas;
  #frame;
  #colours = null;
  #shown = 0; // seconds across the whole width, animated towards the expected duration
  #painted = ""; // what the picture on the canvas depends on
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  /** @param frame The slider around the canvas. @param seek Called with a time in seconds. */
  constructor(frame, canvas, seek) {
    this.#frame = frame;
    this.#canvas = canvas;
    this.take = null;
    this.seek = seek;
    frame.addEventListener("pointerdown", (event) => this.#point(event));
    frame.addEventListener("keydown", (event) => this.#key(event));
    const redraw = () => {
      this.#colours = null;
      this.#painted = "";
      this.draw(this.take, this.position ?? 0, true);
    };
    new ResizeObserver(redraw).observe(frame);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  }

  /** Draw `take` at playback position `position` in seconds. Returns whether the animation continues. */
  draw(take, position, atOnce = false) {
    const expected = take?.expected ?? 0;
    if (take !== this.take || atOnce || this.#still.matches || Math.abs(expected - this.#shown) < 0.01) this.#shown = expected;
    else this.#shown += (expected - this.#shown) * 0.33;
    if (take !== this.take) this.#painted = "";
    this.take = take;
    this.position = position;
    this.#paint();
    this.#describe();
    return this.#shown !== expected;
  }

  /** Paint the canvas, if the picture is another one: most frames change nothing, and each painted one takes milliseconds. */
  #paint() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const scale = devicePixelRatio;
    const bars = Math.max(1, Math.floor((width + GAP) / (BAR + GAP)));
    const played = this.#shown > 0 ? Math.ceil((this.position / this.#shown) * bars) : 0;
    const wanted = `${width} ${height} ${scale} ${this.#shown} ${this.take?.length} ${played}`;
    if (wanted === this.#painted) return;
    this.#painted = wanted;
    if (this.#canvas.width !== Math.round(width * scale)) this.#canvas.width = Math.round(width * scale);
    if (this.#canvas.height !== Math.round(height * scale)) this.#canvas.height = Math.round(height * scale);
    const pen = this.#canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    for (let bar = 0; bar < bars; bar += 1) this.#bar(pen, bar, bars, height);
  }

  #bar(pen, bar, bars, height) {
    const colours = this.#readColours();
    const from = (bar / bars) * this.#shown;
    const to = ((bar + 1) / bars) * this.#shown;
    const here = this.take && this.#shown > 0 && from < this.take.duration;
    // The square root makes quiet syllables visible. Speech rarely exceeds half of full scale, so that level fills the height.
    const tall = here ? Math.max(BAR, Math.sqrt(Math.min(1, 2 * this.take.peak(from, to))) * (height - 4)) : BAR;
    pen.fillStyle = !here ? colours.line : from < this.position ? colours.accent : colours.rest;
    pen.beginPath();
    pen.roundRect(bar * (BAR + GAP), (height - tall) / 2, BAR, tall, BAR / 2);
    pen.fill();
  }

  #readColours() {
    if (!this.#colours) {
      const style = getComputedStyle(this.#frame);
      const named = (name) => style.getPropertyValue(name).trim();
      this.#colours = { accent: named("--accent"), rest: named("--wave-rest"), line: named("--line") };
    }
    return this.#colours;
  }

  #describe() {
    const length = this.take?.duration ?? 0;
    const set = (name, value) => {
      if (this.#frame.getAttribute(name) !== value) this.#frame.setAttribute(name, value);
    };
    set("aria-disabled", String(length === 0));
    set("aria-valuemax", String(Math.round(length)));
    set("aria-valuenow", String(Math.round(Math.min(this.position ?? 0, length))));
    set("aria-valuetext", length ? `${clock(this.position)} of ${clock(length)}` : "No audio yet");
  }

  #point(event) {
    if (!this.take?.length || event.button !== 0) return;
    const move = ({ clientX }) => {
      const box = this.#frame.getBoundingClientRect();
      this.seek(((clientX - box.left) / box.width) * this.#shown);
    };
    move(event);
    this.#frame.setPointerCapture(event.pointerId);
    this.#frame.addEventListener("pointermove", move);
    const end = () => this.#frame.removeEventListener("pointermove", move);
    this.#frame.addEventListener("pointerup", end, { once: true });
    this.#frame.addEventListener("pointercancel", end, { once: true });
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -5, PageUp: 5 }[event.key];
    const target = event.key === "Home" ? 0 : event.key === "End" ? this.take?.duration : step && this.position + step;
    if (target === undefined || !this.take?.length) return;
    event.preventDefault();
    this.seek(target);
  }
}
