// The current request as code: a curl command, OpenAI's Python client, JavaScript, OpenClaw's configuration; and as a link to this page.

import { address, apiKey, withoutEmpty } from "./api.js";

// The code never contains the key, because people paste code into chats and tickets.
const KEY_VARIABLE = "SESAME_API_KEY";
const EXPORT = `# export ${KEY_VARIABLE}=...`;

/** Return the fields that differ from the server's defaults. */
const needed = ({ speed, ...request }) => withoutEmpty(speed === 1 ? request : { ...request, speed });

/** Quote for a POSIX shell. */
const shellQuoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

/** Quote for Python and JavaScript: JSON's syntax works once line separators are escaped. */
const quoted = (value, indent) => JSON.stringify(value, null, indent).replace(/[\u007f-\u009f\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** Return the request as a curl command. */
export function curlCode(request) {
  // No quotes or brackets in comments: an interactive zsh runs comments as commands, and these must not break the lines after them.
  const notes = [`# If curl ends with error 22, speech.${request.response_format} contains the error message.`];
  if (apiKey.value) notes.unshift(EXPORT);
  const lines = [`curl ${shellQuoted(address("v1/audio/speech"))}`];
  if (apiKey.value) lines.push(`  -H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push("  -H 'Content-Type: application/json'", `  -d ${shellQuoted(JSON.stringify(needed(request)))}`);
  lines.push(`  --fail-with-body -o speech.${request.response_format}`);
  return [...notes, lines.join(" \\\n")].join("\n");
}

/** Return the request as code for the openai package. */
export function pythonCode({ model, input, voice, response_format: format, speed, ...more }) {
  const extra = Object.entries(withoutEmpty(more)).map(([name, value]) => `"${name}": ${value}`);
  return [
    ...(apiKey.value ? [EXPORT, "import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${quoted(address("v1"))}, api_key=${apiKey.value ? `os.environ["${KEY_VARIABLE}"]` : '"local"'})`,
    "with client.audio.speech.with_streaming_response.create(",
    `    model=${quoted(model)},`,
    `    voice=${quoted(voice)},`,
    `    input=${quoted(input)},`,
    `    response_format=${quoted(format)},`,
    ...(speed === 1 ? [] : [`    speed=${speed},`]),
    ...(extra.length ? [`    extra_body={${extra.join(", ")}},`] : []),
    ") as response:",
    `    response.stream_to_file("speech.${format}")`,
  ].join("\n");
}

/** Return the request as JavaScript for Node 18 or later, without packages. */
export function javascriptCode(request) {
  const key = apiKey.value ? `, Authorization: \`Bearer \${process.env.${KEY_VARIABLE}}\`` : "";
  return [
    ...(apiKey.value ? [`// export ${KEY_VARIABLE}=...`] : []),
    'import { writeFile } from "node:fs/promises";',
    "",
    `const response = await fetch(${quoted(address("v1/audio/speech"))}, {`,
    '  method: "POST",',
    `  headers: { "Content-Type": "application/json"${key} },`,
    `  body: JSON.stringify(${quoted(needed(request), 2).replaceAll("\n", "\n  ")}),`,
    "});",
    "if (!response.ok) throw new Error(await response.text());",
    `await writeFile("speech.${request.response_format}", Buffer.from(await response.arrayBuffer()));`,
  ].join("\n");
}

/** Return the command that makes OpenClaw speak with the chosen voice. */
export function openclawCode({ model, voice }) {
  const openai = { apiKey: apiKey.value ? "YOUR-KEY" : "local", baseUrl: address("v1"), model, speakerVoice: voice };
  const settings = { auto: "always", provider: "openai", timeoutMs: 120000, providers: { openai } };
  return `openclaw config set tts ${shellQuoted(JSON.stringify(settings))} --strict-json --merge`;
}

/** Return a link that opens this page with the text, the voice and the speed. They are in the fragment, which browsers send to no server. */
export function linkCode({ input, voice, speed }) {
  return `${address("")}#${new URLSearchParams({ text: input, voice, speed })}`;
}

/** Return what a link holds, or null if this is none. */
export function requestOf(fragment) {
  const fields = new URLSearchParams(fragment.slice(1));
  return fields.get("text") ? { input: fields.get("text"), voice: fields.get("voice"), speed: Number(fields.get("speed")) || 1 } : null;
}

/** The forms of the request: code, and a note for people. */
export const FORMS = {
  curl: [curlCode, "Saves the speech to a file in the current folder."],
  python: [pythonCode, "Needs the package openai."],
  javascript: [javascriptCode, "Save it as speak.mjs and run it with Node 18 or later."],
  openclaw: [openclawCode, "Run it once in a terminal. OpenClaw then speaks with this voice."],
  link: [linkCode, "Opens this page with this text and voice, for everybody who can reach this server."],
};
