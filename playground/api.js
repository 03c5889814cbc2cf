// The server, as this page sees it: JSON, files, and speech as a stream of events. Every fault becomes an ApiError with a sentence.

import { memory } from "./dom.js";

const UNREACHABLE = "The server cannot be reached. Is it running, and is this the right address?";

/** The `code` of the error of a server that is not there. */
export const GONE = "unreachable";

/** What went wrong, in the server's own words where it gave any. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", requestId = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId });
  }
}

/** The API key: held in this tab's memory and, if the user wishes, in this browser's storage. It is sent as a header, never in an address. */
export const apiKey = {
  value: memory.read("key", sessionStorage) ?? memory.read("key") ?? "",
  set(value, keep) {
    this.value = value;
    memory.write("key", value || null, sessionStorage);
    memory.write("key", keep && value ? value : null);
  },
  get kept() {
    return memory.read("key") !== null;
  },
};

/** The absolute address of an API path, for requests and for the code that people copy. */
export const address = (path) => new URL(path, document.baseURI).href;

/** `fetch` with the key; answers that are not 2xx become ApiErrors. */
export async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey.value) headers.set("Authorization", `Bearer ${apiKey.value}`);
  const response = await translated(fetch(address(path), { cache: "no-store", ...options, headers }));
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The body of a JSON answer. */
export async function getJson(path, options) {
  const response = await call(path, options);
  return translated(response.json());
}

/** A stream that broke and a server that is not there both arrive as a TypeError without a useful message. */
async function translated(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(UNREACHABLE, { code: GONE });
  }
}

/** The server's answer to a wrong key speaks of headers, to programmers. */
const keyWords = () => (apiKey.value ? "That key is not right." : "This server asks for an API key.");

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const told = body?.error;
  if (told?.code === "invalid_api_key") return new ApiError(keyWords(), { status: response.status, code: told.code });
  const message = told?.message ?? `The server answered ${response.status} ${response.statusText}.`.replace(" .", ".");
  return new ApiError(message, { status: response.status, code: told?.code ?? "", requestId: response.headers.get("X-Request-Id") ?? "" });
}

const asJson = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** Speak, as it comes: `{headers, events}`, where events are the server's own objects in order. Aborting `signal` ends the work on the server too. */
export async function speakStreamed(request, signal) {
  const body = { ...request, response_format: "pcm", stream_format: "sse", timestamps: true };
  const response = await call("v1/audio/speech", asJson(body, signal));
  return { headers: response.headers, events: serverEvents(response) };
}

/** Speak into one complete file. */
export async function speakFile(request, signal) {
  const response = await call("v1/audio/speech", asJson(request, signal));
  return translated(response.blob());
}

async function* serverEvents(response) {
  const requestId = response.headers.get("X-Request-Id") ?? "";
  let finished = false;
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") continue;
    const event = JSON.parse(data);
    if (event.type === "speech.audio.error" || event.error) {
      throw new ApiError(event.error?.message ?? "The server stopped in the middle.", { code: event.error?.code ?? "", requestId });
    }
    finished ||= event.type === "speech.audio.done";
    yield event;
  }
  if (!finished) throw new ApiError("The server's answer ended before it was complete.", { requestId });
}

/** The `data` of each server-sent event of a byte stream. */
async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await translated(reader.read());
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
