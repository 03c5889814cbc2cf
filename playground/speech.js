// Speaks a text: one streamed request, or several one after another for a text over the server's limit.

import { speakStreamed } from "./api.js";
import { Take } from "./take.js";

/** Cut a text into parts of at most `limit` characters, at the ends of paragraphs, sentences or words. Returns `[{input, start}]`. */
export function partsOf(text, limit) {
  const parts = [];
  let start = 0;
  while (start < text.length) {
    const end = [...text.slice(start, start + 2 * limit)].length <= limit ? text.length : start + cutOf(text.slice(start, start + limit));
    if (text.slice(start, end).trim()) parts.push({ input: text.slice(start, end), start });
    start = end;
  }
  return parts;
}

/** Return where to cut a text that is too long: after the last paragraph, line, sentence or word of its second half. */
function cutOf(text) {
  for (const boundary of [/\n\s*\n/g, /\n/g, /[.!?…。！？]["'”’»)\]]*\s/g, /\s/g]) {
    const last = [...text.matchAll(boundary)].at(-1);
    if (last && last.index > text.length / 2) return last.index + last[0].length;
  }
  return /[\ud800-\udbff]$/.test(text) ? text.length - 1 : text.length; // not within a character of two units
}

export class Speech {
  #player;
  #controller = null;

  /** @param player Plays the takes. */
  constructor(player) {
    this.#player = player;
  }

  get busy() {
    return this.#controller !== null;
  }

  /** Stop the request, which frees the server's queue. */
  stop() {
    this.#controller?.abort();
    this.#controller = null;
  }

  /**
   * Create a take for a request, and start it.
   *
   * @param hooks `{begun(take), heard(take, voice), ended(take, error)}`: the take exists; its first audio is here; it has ended.
   */
  async start(request, voiceName, limit, hooks) {
    this.stop();
    const take = new Take(request, voiceName, partsOf(request.input, limit));
    const controller = new AbortController();
    this.#controller = controller;
    hooks.begun(take);
    let fault = null;
    try {
      for (const part of take.parts) await this.#receive(take, part, controller.signal, hooks);
      take.end("complete");
    } catch (error) {
      take.end(controller.signal.aborted ? "stopped" : "failed");
      if (take.state === "failed") fault = error;
    }
    if (this.#controller === controller) this.#controller = null;
    hooks.ended(take, fault);
  }

  async #receive(take, part, signal, hooks) {
    const { headers, events } = await speakStreamed({ ...take.request, input: part.input }, signal);
    take.queued += Number(headers.get("X-Queue-Time")) || 0;
    take.beginPart();
    for await (const event of events) {
      if (event.type === "speech.audio.delta") {
        take.append(event.audio);
        if (take.firstAudio !== null && take.pieces.length === 1) hooks.heard(take, headers.get("X-Voice"));
        this.#player.more(take);
      } else if (event.type === "speech.audio.timestamps") {
        take.addTimes(event, part);
      }
    }
  }
}
