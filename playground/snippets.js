// The current request as code: a curl command, and OpenAI's Python client.

import { address, apiKey } from "./api.js";

// The code never contains the key, because people paste code into chats and tickets.
const KEY_VARIABLE = "SESAME_API_KEY";
const EXPORT = `# export ${KEY_VARIABLE}=...`;

/** Quote for a POSIX shell. */
const shellQuoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

/** Quote for Python: JSON's syntax works once line separators are escaped. */
const pythonQuoted = (text) => JSON.stringify(text).replace(/[\u007f-\u009f\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

const withoutEmpty = (request) => Object.fromEntries(Object.entries(request).filter(([, value]) => value !== null));

/** Return the request as a curl command. */
export function curlCode(request) {
  // No quotes or brackets in comments: an interactive zsh runs comments as commands, and these must not break the lines after them.
  const notes = [`# If curl ends with error 22, speech.${request.response_format} contains the error message.`];
  if (apiKey.value) notes.unshift(EXPORT);
  const lines = [`curl ${shellQuoted(address("v1/audio/speech"))}`];
  if (apiKey.value) lines.push(`  -H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push("  -H 'Content-Type: application/json'", `  -d ${shellQuoted(JSON.stringify(withoutEmpty(request)))}`);
  lines.push(`  --fail-with-body -o speech.${request.response_format}`);
  return [...notes, lines.join(" \\\n")].join("\n");
}

/** Return the request as code for the openai package. */
export function pythonCode({ model, input, voice, response_format: format, speed, seed }) {
  return [
    ...(apiKey.value ? [EXPORT, "import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonQuoted(address("v1"))}, api_key=${apiKey.value ? `os.environ["${KEY_VARIABLE}"]` : '"none"'})`,
    "with client.audio.speech.with_streaming_response.create(",
    `    model=${pythonQuoted(model)},`,
    `    voice=${pythonQuoted(voice)},`,
    `    input=${pythonQuoted(input)},`,
    `    response_format=${pythonQuoted(format)},`,
    `    speed=${speed},`,
    ...(seed === null ? [] : [`    extra_body={"seed": ${seed}},`]),
    ") as response:",
    `    response.stream_to_file("speech.${format}")`,
  ].join("\n");
}
