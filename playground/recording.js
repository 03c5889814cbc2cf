// A recording as samples: decodes it, removes the silence around the speech, compares its length with the words, and makes a WAV file of it.

import { SAMPLE_RATE } from "./take.js";

const FRAME = SAMPLE_RATE / 50;
const QUIET = 0.06; // of the loudest frame: breath and room noise are below, soft consonants above
const MARGIN = 0.2; // seconds that are kept around the speech
const MOST_LETTERS_A_SECOND = 35; // the server's limit
const LEAST_LETTERS_A_SECOND = 2; // slow reading with long pauses has four

/** Return the samples of a file, mono, 24 kHz, or null if this browser cannot decode it. */
export async function decoded(file) {
  try {
    const buffer = await new OfflineAudioContext(1, 1, SAMPLE_RATE).decodeAudioData(await file.arrayBuffer());
    const samples = new Float32Array(buffer.length);
    for (let channel = 0; channel < buffer.numberOfChannels; channel += 1) {
      const data = buffer.getChannelData(channel);
      for (let i = 0; i < samples.length; i += 1) samples[i] += data[i] / buffer.numberOfChannels;
    }
    return samples;
  } catch {
    return null;
  }
}

/** Return the samples without the silence before and after the speech. */
export function trimmed(samples) {
  const levels = [];
  for (let start = 0; start + FRAME <= samples.length; start += FRAME) {
    let sum = 0;
    for (let i = start; i < start + FRAME; i += 1) sum += samples[i] ** 2;
    levels.push(Math.sqrt(sum / FRAME));
  }
  const limit = QUIET * levels.reduce((most, level) => Math.max(most, level), 0);
  const first = levels.findIndex((level) => level > limit);
  if (first < 0) return samples;
  const last = levels.findLastIndex((level) => level > limit);
  const margin = MARGIN * SAMPLE_RATE;
  return samples.slice(Math.max(0, first * FRAME - margin), Math.min(samples.length, (last + 1) * FRAME + margin));
}

/** Return why these words cannot be those of a recording of this length, or null. */
export function paceFault(words, seconds) {
  const letters = words.match(/[\p{L}\p{N}]/gu)?.length ?? 0;
  const count = words.split(/\s+/).filter(Boolean).length;
  const said = `${count} ${count === 1 ? "word" : "words"} in ${seconds.toFixed(1)} s`;
  if (letters > MOST_LETTERS_A_SECOND * seconds) return `${said}: nobody speaks so fast. Record the whole text, or delete the words that are not in the recording.`;
  if (letters && letters < LEAST_LETTERS_A_SECOND * seconds) return `${said}: some words are missing. Enter all that is said in the recording.`;
  return null;
}

/** Return samples as a WAV file, 16 bit. */
export function wavFile(samples, name) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const write = (place, word) => [...word].forEach((letter, i) => view.setUint8(place + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true);
  view.setUint32(24, SAMPLE_RATE, true);
  view.setUint32(28, 2 * SAMPLE_RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
  return new File([view], name, { type: "audio/wav" });
}
