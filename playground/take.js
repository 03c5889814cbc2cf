// A take: one text as it is spoken, with its samples, peaks for the waveform, times of words and sentences, and figures.

export const SAMPLE_RATE = 24000;
const PEAK_SAMPLES = 240; // one peak per 10 ms
const MOST_PEAKS = 48; // that are compared for one bar of the waveform

// The built-in voice speaks about 15 characters of English per second at speed 1. Used only to estimate the length for the waveform.
const CHARACTERS_A_SECOND = 15;

export class Take {
  /**
   * @param request The request, seed included, so that it can be repeated for a file; `input` is the whole text.
   * @param voiceName The displayed name of the voice.
   * @param parts The parts of the text that are requested one after another, as `{input, start}`.
   */
  constructor(request, voiceName, parts) {
    this.id = crypto.getRandomValues(new Uint32Array(2)).join("-");
    this.request = request;
    this.voiceName = voiceName;
    this.parts = parts;
    this.pieces = []; // Int16Arrays
    this.length = 0;
    this.peaks = [];
    this.words = []; // {start, end, from, to}: seconds, and a place in the text
    this.sentences = []; // the same, with their text; the place is null if it was not found
    this.state = "arriving"; // then "complete", "stopped" or "failed"
    this.made = Date.now();
    this.asked = performance.now();
    this.firstAudio = null; // milliseconds from the request
    this.queued = 0; // seconds
    this.spent = null; // seconds from the request to the last sample
    this.odd = new Uint8Array(0);
    this.loudest = 0;
    this.window = 0;
    this.base = 0; // seconds before the current part
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

  /** Start the next part: the times of its events count from here. */
  beginPart() {
    this.base = this.duration;
    this.odd = new Uint8Array(0);
  }

  /** Append base64 of s16le samples. An event may end within a sample. */
  append(base64) {
    this.firstAudio ??= performance.now() - this.asked;
    const text = atob(base64);
    const joined = new Uint8Array(this.odd.length + text.length);
    joined.set(this.odd);
    for (let i = 0; i < text.length; i += 1) joined[this.odd.length + i] = text.charCodeAt(i); // Uint8Array.from takes 20 times as long
    this.odd = joined.slice(joined.length - (joined.length % 2));
    this.add(new Int16Array(joined.buffer, 0, joined.length >> 1));
  }

  /** Append samples. */
  add(samples) {
    this.#measure(samples);
    this.pieces.push(samples);
    this.length += samples.length;
  }

  /** Forget the samples, which are stored elsewhere, but not the length. */
  release() {
    this.pieces = [];
    this.peaks = [];
  }

  /** Take all samples back. */
  fill(samples) {
    this.release();
    this.length = 0;
    this.add(samples);
  }

  /** Append the times of a spoken segment of a part. */
  addTimes({ text, start, end, words = [] }, part) {
    const place = offsets(part.input);
    const timed = words.map((word) => ({
      start: this.base + word.start,
      end: this.base + word.end,
      from: part.start + place(word.start_char),
      to: part.start + place(word.end_char),
    }));
    const from = Math.max(part.start, this.sentences.findLast((sentence) => sentence.to)?.to ?? 0);
    const found = timed.length ? [timed[0].from, timed.at(-1).to] : placeOf(text, this.request.input, from);
    this.words.push(...timed);
    this.sentences.push({ text, start: this.base + start, end: this.base + end, from: found?.[0] ?? null, to: found?.[1] ?? null });
  }

  /** Set the final state. */
  end(state) {
    this.state = state;
    this.spent = (performance.now() - this.asked) / 1000;
  }

  /** Return the samples from `start` to `end` as float32. */
  slice(start, end = this.length) {
    const samples = new Float32Array(Math.max(0, end - start));
    let position = 0;
    for (const piece of this.pieces) {
      if (position >= end) break;
      const first = Math.max(0, start - position);
      const last = Math.min(piece.length, end - position);
      for (let i = first; i < last; i += 1) samples[position + i - start] = piece[i] / 32768;
      position += piece.length;
    }
    return samples;
  }

  /** Return the word that is heard at `seconds`, or the sentence where the words are not known; null before the first. */
  spokenAt(seconds) {
    const sentence = lastBefore(this.sentences, seconds);
    const word = lastBefore(this.words, seconds);
    const found = word && sentence && word.start >= sentence.start ? word : sentence;
    return found && found.from !== null ? found : null;
  }

  /** Return the word or sentence at a place in the text. */
  at(place) {
    const here = ({ from, to }) => from !== null && place >= from && place <= to;
    return this.words.find(here) ?? this.sentences.find(here) ?? null;
  }

  /** Return what is stored of the take, without its samples. */
  record() {
    const { id, request, voiceName, parts, words, sentences, state, made, firstAudio, queued, spent, length } = this;
    return { id, request, voiceName, parts, words, sentences, state, made, firstAudio, queued, spent, length };
  }

  #measure(samples) {
    for (const sample of samples) {
      this.loudest = Math.max(this.loudest, Math.abs(sample) / 32768);
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
    const last = Math.min(this.peaks.length, Math.max(first + 1, Math.ceil((to * SAMPLE_RATE) / PEAK_SAMPLES)));
    const step = Math.max(1, Math.floor((last - first) / MOST_PEAKS));
    let loudest = 0;
    for (let i = first; i < last; i += step) loudest = Math.max(loudest, this.peaks[i]);
    return loudest;
  }
}

/** Return the last entry that has started at `seconds`, or null. The entries are in order. */
function lastBefore(entries, seconds) {
  let [low, high] = [0, entries.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (entries[middle].start <= seconds) low = middle + 1;
    else high = middle;
  }
  return entries[low - 1] ?? null;
}

/** Return a function from the server's offsets, in code points, to JavaScript's. They differ after an emoji. */
function offsets(text) {
  if (!/[\ud800-\udbff]/.test(text)) return (place) => place;
  const starts = [0];
  for (const character of text) starts.push(starts.at(-1) + character.length);
  return (place) => starts[place] ?? text.length;
}

const WORD = /[\p{L}\p{M}\p{N}]+/gu;
const FURTHEST = 60; // words that are skipped to find the start of a sentence: addresses and marks that are not spoken

/** Return where a spoken sentence is in the source from `start` on, as `[from, to]`, or null. Marks such as Markdown's are not spoken. */
function placeOf(sentence, source, start) {
  const spoken = sentence.match(WORD);
  if (!spoken) return null;
  const there = [...source.slice(start).matchAll(WORD)].slice(0, spoken.length + 2 * FURTHEST);
  const first = there.slice(0, FURTHEST).findIndex(([word]) => word === spoken[0]);
  if (first < 0) return null;
  const ending = there.slice(first + Math.max(0, spoken.length - 1)).find(([word]) => word === spoken.at(-1));
  const last = ending ?? there[Math.min(there.length, first + spoken.length) - 1];
  return [start + there[first].index, start + last.index + last[0].length];
}
