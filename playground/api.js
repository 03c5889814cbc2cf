// Calls the server: JSON, files, and speech as an event stream. Every failure becomes an ApiError with a message.

import { memory } from "./dom.js";

const UNREACHABLE = "The server cannot be reached. Is it running, and is this the right address?";

/** The error `code` for an unreachable server. */
export const GONE = "unreachable";

/** A failed call, with the server's message if there is one. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", requestId = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId });
  }
}

/** The API key: stored for this tab and, if the user chooses, for this browser. It is sent in a header, never in a URL. */
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

/** The absolute URL of an API path, for requests and for the code examples. */
export const address = (path) => new URL(path, document.baseURI).href;

/** `fetch` with the key; responses other than 2xx become ApiErrors. */
export async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey.value) headers.set("Authorization", `Bearer ${apiKey.value}`);
  const response = await translated(fetch(address(path), { cache: "no-store", ...options, headers }));
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The parsed body of a JSON response. */
export async function getJson(path, options) {
  const response = await call(path, options);
  return translated(response.json());
}

/** Turn the TypeError of a broken stream or an unreachable server, which has no useful message, into an ApiError. */
async function translated(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(UNREACHABLE, { code: GONE });
  }
}

/** The page's own message for status 401: the server's message is about headers. */
const keyMessage = () => (apiKey.value ? "The API key is wrong." : "This server requires an API key.");

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const given = body?.error;
  if (given?.code === "invalid_api_key") return new ApiError(keyMessage(), { status: response.status, code: given.code });
  const message = given?.message ?? `The server answered ${response.status} ${response.statusText}.`.replace(" .", ".");
  return new ApiError(message, { status: response.status, code: given?.code ?? "", requestId: response.headers.get("X-Request-Id") ?? "" });
}

const asJson = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** Remove fields without a value. */
export const withoutEmpty = (request) => Object.fromEntries(Object.entries(request).filter(([, value]) => value !== null));

/** Request streamed speech. Returns `{headers, events}`, the server's events in order. Aborting `signal` also stops the server. */
export async function speakStreamed(request, signal) {
  const body = { ...withoutEmpty(request), response_format: "pcm", stream_format: "sse", timestamps: "word" };
  const response = await call("v1/audio/speech", asJson(body, signal));
  return { headers: response.headers, events: serverEvents(response) };
}

/** Request speech as one complete file. */
export async function speakFile(request, signal) {
  const response = await call("v1/audio/speech", asJson(withoutEmpty(request), signal));
  return translated(response.blob());
}

async function* serverEvents(response) {
  const requestId = response.headers.get("X-Request-Id") ?? "";
  let finished = false;
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") continue;
    const event = JSON.parse(data);
    if (event.type === "speech.audio.error" || event.error) {
      throw new ApiError(event.error?.message ?? "The server stopped before the speech was complete.", { code: event.error?.code ?? "", requestId });
    }
    finished ||= event.type === "speech.audio.done";
    yield event;
  }
  if (!finished) throw new ApiError("The response ended before the speech was complete.", { requestId });
}

/** Yield the `data` of each server-sent event in a byte stream. */
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
