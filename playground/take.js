// A take: one utterance as it arrives, with its samples, peaks for the waveform, sentences and figures.

export const SAMPLE_RATE = 24000;
const PEAK_SAMPLES = 240; // one peak per 10 ms

// The built-in voice speaks about 15 characters of English per second at speed 1. Used only to estimate the length for the waveform.
const CHARACTERS_A_SECOND = 15;

export class Take {
  /**
   * @param request The request, seed included, so that it can be repeated for a file.
   * @param voiceName The displayed name of the voice.
   */
  constructor(request, voiceName) {
    this.request = request;
    this.voiceName = voiceName;
    this.pieces = [];
    this.length = 0;
    this.peaks = [];
    this.sentences = [];
    this.state = "arriving"; // then "complete", "stopped" or "failed"
    this.asked = performance.now();
    this.firstAudio = null; // milliseconds from the request
    this.queued = 0; // seconds
    this.spent = null; // seconds from the request to the last sample
    this.odd = new Uint8Array(0);
    this.loudest = 0;
    this.window = 0;
  }

  get duration() {
    return this.length / SAMPLE_RATE;
  }

  /** The final duration in seconds, or an estimate while the take arrives. */
  get expected() {
    if (this.state !== "arriving") return this.duration;
    const guess = this.request.input.length / CHARACTERS_A_SECOND / this.request.speed;
    return Math.max(1, guess, this.duration * 1.04);
  }

  /** Generation time divided by duration, without the time in the queue. */
  get realTimeFactor() {
    return this.spent === null || !this.length ? null : Math.max(0, this.spent - this.queued) / this.duration;
  }

  /** Append base64 of s16le samples and return them as float32. An event may end within a sample. */
  append(base64) {
    this.firstAudio ??= performance.now() - this.asked;
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const joined = new Uint8Array(this.odd.length + bytes.length);
    joined.set(this.odd);
    joined.set(bytes, this.odd.length);
    this.odd = joined.slice(joined.length - (joined.length % 2));
    const view = new DataView(joined.buffer);
    const samples = new Float32Array(joined.length >> 1);
    for (let i = 0; i < samples.length; i += 1) samples[i] = view.getInt16(2 * i, true) / 32768;
    this.#measure(samples);
    this.pieces.push(samples);
    this.length += samples.length;
    return samples;
  }

  /** Set the final state. */
  end(state) {
    this.state = state;
    this.spent = (performance.now() - this.asked) / 1000;
  }

  /** Return all samples from `start` on. */
  from(start) {
    const samples = new Float32Array(Math.max(0, this.length - start));
    let position = 0;
    for (const piece of this.pieces) {
      if (position + piece.length > start) {
        const skipped = Math.max(0, start - position);
        samples.set(piece.subarray(skipped), position + skipped - start);
      }
      position += piece.length;
    }
    return samples;
  }

  /** Return the index of the sentence at `seconds`, or -1 before the first. */
  sentenceAt(seconds) {
    let found = -1;
    for (const [index, { start }] of this.sentences.entries()) if (seconds >= start) found = index;
    return found;
  }

  #measure(samples) {
    for (const sample of samples) {
      this.loudest = Math.max(this.loudest, Math.abs(sample));
      this.window += 1;
      if (this.window === PEAK_SAMPLES) {
        this.peaks.push(this.loudest);
        this.loudest = 0;
        this.window = 0;
      }
    }
  }

  /** Return the peak between two times, 0 to 1. */
  peak(from, to) {
    const first = Math.floor((from * SAMPLE_RATE) / PEAK_SAMPLES);
    const last = Math.max(first + 1, Math.ceil((to * SAMPLE_RATE) / PEAK_SAMPLES));
    let loudest = 0;
    for (let i = first; i < last && i < this.peaks.length; i += 1) loudest = Math.max(loudest, this.peaks[i]);
    return loudest;
  }
}
