// The request on the screen as code that can be pasted and run: a curl line, and OpenAI's Python client.

import { address, apiKey } from "./api.js";

// The key itself is never put into text that people paste into chats and tickets.
const KEY_VARIABLE = "SESAME_API_KEY";
const EXPORT = `# export ${KEY_VARIABLE}=...`;

/** For a POSIX shell: everything between single quotes stands for itself. */
const shellQuoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

/** JSON's strings are Python's too, once the characters that end a line are written out. */
const pythonQuoted = (text) => JSON.stringify(text).replace(/[\u007f-\u009f\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

const withoutEmpty = (request) => Object.fromEntries(Object.entries(request).filter(([, value]) => value !== null));

/** The request as a curl command. */
export function curlCode(request) {
  // Comments without quotes or brackets: an interactive zsh reads them as commands, and must get past them.
  const notes = [`# If curl ends with error 22, speech.${request.response_format} holds the reason as text.`];
  if (apiKey.value) notes.unshift(EXPORT);
  const lines = [`curl ${shellQuoted(address("v1/audio/speech"))}`];
  if (apiKey.value) lines.push(`  -H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push("  -H 'Content-Type: application/json'", `  -d ${shellQuoted(JSON.stringify(withoutEmpty(request)))}`);
  lines.push(`  --fail-with-body -o speech.${request.response_format}`);
  return [...notes, lines.join(" \\\n")].join("\n");
}

/** The request through the openai package. */
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
