// A take as files: audio in each format, from the server, and captions.

import { speakFile } from "./api.js";
import { make } from "./dom.js";

/** The entries of the download menu. */
export const FILES = [
  ["mp3", "MP3", "for everything"],
  ["wav", "WAV", "uncompressed"],
  ["opus", "Opus", "smallest"],
  ["aac", "AAC", "for Apple devices"],
  ["flac", "FLAC", "lossless, compressed"],
  ["pcm", "PCM", "raw, 16 bit, 24 kHz"],
  null,
  ["vtt", "Captions (VTT)", "for web video"],
  ["srt", "Captions (SRT)", "for editing"],
];

/**
 * Return a take as `[[name, Blob]]`.
 *
 * Audio is requested again, with the same seed, as a complete file: the same samples, with the exact header and tags of a file. A text over
 * the server's limit becomes one WAV or PCM file; files of the other formats cannot be joined, so there is one for each part.
 */
export async function filesOf(take, kind) {
  if (kind === "vtt" || kind === "srt") return [[`speech.${kind}`, new Blob([captionsOf(take, kind)], { type: "text/plain" })]];
  const blobs = [];
  for (const { input } of take.parts) blobs.push(await speakFile({ ...take.request, input, response_format: kind }));
  if (blobs.length === 1) return [[`speech.${kind}`, blobs[0]]];
  if (kind === "pcm") return [[`speech.${kind}`, new Blob(blobs)]];
  if (kind === "wav") return [[`speech.${kind}`, await joinedWav(blobs)]];
  return blobs.map((blob, index) => [`speech-${index + 1}.${kind}`, blob]);
}

/** Let the browser save a file. */
export function save(name, blob) {
  const address = URL.createObjectURL(blob);
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Join WAV files of the same format: the header and tags of the first, the samples of all. */
async function joinedWav(blobs) {
  const found = await Promise.all(blobs.map(async (blob) => ({ blob, ...dataOf(new DataView(await blob.arrayBuffer())) })));
  const head = await found[0].blob.slice(0, found[0].start).arrayBuffer();
  const size = found.reduce((sum, { length }) => sum + length, 0);
  new DataView(head).setUint32(4, head.byteLength - 8 + size, true);
  new DataView(head).setUint32(head.byteLength - 4, size, true);
  return new Blob([head, ...found.map(({ blob, start, length }) => blob.slice(start, start + length))], { type: "audio/wav" });
}

/** Return where the samples of a WAV file are. */
function dataOf(view) {
  let place = 12;
  while (view.getUint32(place) !== 0x64617461) place += 8 + view.getUint32(place + 4, true) + (view.getUint32(place + 4, true) % 2); // "data"
  return { start: place + 8, length: Math.min(view.getUint32(place + 4, true), view.byteLength - place - 8) };
}

/** Return the sentences with their times as a caption file. */
export function captionsOf(take, kind) {
  const separator = kind === "vtt" ? "." : ",";
  const shown = (text) => (kind === "vtt" ? text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;") : text);
  const cues = take.sentences.map(({ text, start, end }, index) => {
    const number = kind === "srt" ? `${index + 1}\n` : "";
    return `${number}${stamp(start, separator)} --> ${stamp(end, separator)}\n${shown(text)}\n`;
  });
  return [...(kind === "vtt" ? ["WEBVTT\n"] : []), ...cues].join("\n");
}

function stamp(seconds, separator) {
  const whole = Math.round(seconds * 1000);
  const part = (size, limit = Infinity) => String(Math.floor(whole / size) % limit).padStart(2, "0");
  return `${part(3_600_000)}:${part(60_000, 60)}:${part(1000, 60)}${separator}${String(whole % 1000).padStart(3, "0")}`;
}
