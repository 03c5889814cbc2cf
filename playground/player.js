// Plays a take through Web Audio, while it arrives or later, from any position.

import { SAMPLE_RATE } from "./take.js";

const LEAD = 0.06; // seconds; starts slightly in the future, so that the first buffer is never late
const AHEAD = 20; // seconds that are scheduled in advance: browsers call timers of hidden pages once a second
const REST = 2000; // milliseconds of silence after which the sound device is released: it takes power and keeps a laptop awake
const CHUNK = 5 * SAMPLE_RATE; // the longest buffer

export class Player extends EventTarget {
  #context = null;
  #sources = new Set();
  #spans = []; // scheduled pieces: {at, from, length}; a late arrival leaves silence between them
  #next = 0;
  #sent = 0; // samples up to here are scheduled
  #place = 0; // position in samples while not playing
  #timer = 0;
  #resting = 0;

  take = null;
  playing = false;
  /** An AnalyserNode that receives everything that is played. */
  analyser = null;

  /** Start the audio context. Browsers allow this only after a user action. */
  wake() {
    if (!this.#context) {
      // The context uses the voice's sample rate, so there are no resampling clicks between pieces.
      this.#context = new AudioContext({ sampleRate: SAMPLE_RATE });
      this.analyser = new AnalyserNode(this.#context, { fftSize: 2048 });
      this.analyser.connect(this.#context.destination);
    }
    clearTimeout(this.#resting);
    this.#context.resume();
  }

  /** Suspend the audio context soon, unless something starts. */
  rest() {
    clearTimeout(this.#resting);
    if (this.#context && !this.playing) this.#resting = setTimeout(() => this.#context.suspend(), REST);
  }

  /** Play a take from `seconds`; call `more` when it has got further samples. */
  start(take, seconds = 0) {
    this.#silence();
    this.wake();
    this.take = take;
    this.playing = true;
    this.#sent = Math.round(seconds * SAMPLE_RATE);
    this.#place = this.#sent;
    this.#fill();
    this.#timer = setInterval(() => this.#fill(), 500);
    this.#notify();
    this.arrived(take);
  }

  /** Play what a take has got. */
  more(take) {
    if (take === this.take) this.#fill();
  }

  /** Finish if the take is complete and all of it was played. */
  arrived(take) {
    if (take !== this.take || !this.playing || take.state === "arriving") return;
    if (this.#sources.size === 0 && this.#sent >= take.length) this.#finish();
  }

  pause() {
    if (!this.playing) return;
    this.#place = Math.round(this.position * SAMPLE_RATE);
    this.playing = false;
    this.#silence();
    this.#notify();
  }

  /** Show a take without playing it. */
  show(take) {
    this.pause();
    this.take = take;
    this.#place = 0;
    this.#notify();
  }

  toggle() {
    if (this.playing) this.pause();
    else if (this.take) this.start(this.take, this.position >= this.take.duration - 0.05 ? 0 : this.position);
  }

  /** Move to a time, within what has arrived. */
  seek(seconds) {
    if (!this.take) return;
    const target = Math.min(Math.max(0, seconds), this.take.duration);
    if (this.playing) return this.start(this.take, target);
    this.#place = Math.round(target * SAMPLE_RATE);
    this.#notify();
  }

  /** Play an encoded sound beside the take; returns a function that ends it. @param ended Called at its end. */
  async clip(encoded, ended) {
    const buffer = await this.#context.decodeAudioData(encoded);
    const source = new AudioBufferSourceNode(this.#context, { buffer });
    source.connect(this.analyser);
    source.onended = ended;
    source.start();
    return () => {
      source.onended = null;
      source.stop();
    };
  }

  /** The playback position in seconds. */
  get position() {
    if (!this.playing) return this.#place / SAMPLE_RATE;
    const now = this.#context.currentTime - (this.#context.outputLatency || 0);
    let place = this.#spans[0]?.from ?? this.#place;
    for (const { at, from, length } of this.#spans) {
      if (now >= at) place = from + Math.min(length, (now - at) * SAMPLE_RATE);
    }
    return place / SAMPLE_RATE;
  }

  #fill() {
    if (!this.playing) return;
    while (this.#sent < this.take.length && this.#next < this.#context.currentTime + AHEAD) {
      const end = Math.min(this.take.length, this.#sent + CHUNK);
      this.#schedule(this.#sent, this.take.slice(this.#sent, end));
      this.#sent = end;
    }
  }

  #schedule(from, samples) {
    const buffer = this.#context.createBuffer(1, samples.length, SAMPLE_RATE);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.#context, { buffer });
    source.connect(this.analyser);
    const now = this.#context.currentTime;
    const at = Math.max(this.#next, now + LEAD);
    source.start(at);
    this.#next = at + samples.length / SAMPLE_RATE;
    this.#spans = [...this.#spans.filter((span, i, all) => i === all.length - 1 || span.at + span.length / SAMPLE_RATE > now - 1), { at, from, length: samples.length }];
    this.#sources.add(source);
    source.onended = () => {
      this.#sources.delete(source);
      this.#fill();
      this.arrived(this.take);
    };
  }

  #finish() {
    this.#place = this.take.length;
    this.playing = false;
    this.#silence();
    this.#notify();
    this.dispatchEvent(new Event("over"));
  }

  #silence() {
    clearInterval(this.#timer);
    this.rest();
    for (const source of this.#sources) {
      source.onended = null;
      source.stop();
      source.disconnect();
    }
    this.#sources.clear();
    this.#spans = [];
    this.#next = 0;
  }

  #notify() {
    this.dispatchEvent(new Event("change"));
  }
}
