// Use the main functions of OpenAI's library for Node with the server at OPENAI_BASE_URL and print the results as JSON.
// Usage: node openai_essentials.mjs TEXT FOLDER; writes one file for each format, and streamed.pcm.

import { writeFile } from "node:fs/promises";
import path from "node:path";
import OpenAI from "openai";

const [text, folder] = process.argv.slice(2);
const client = new OpenAI();
const formats = ["mp3", "opus", "aac", "flac", "wav", "pcm"];
const seed = 1; // the server's own field: the same sound for all formats

async function save(name, response) {
  await writeFile(path.join(folder, name), Buffer.from(await response.arrayBuffer()));
}

for (const format of formats) {
  await save(`speech.${format}`, await client.audio.speech.create({ model: "csm-1b", voice: "coral", input: text, response_format: format, seed }));
}

await save("by-id.mp3", await client.audio.speech.create({ model: "csm-1b", voice: { id: "heart" }, input: text, seed }));

const events = await client.audio.speech.create({
  model: "gpt-4o-mini-tts",
  voice: "alloy",
  input: text,
  response_format: "pcm",
  stream_format: "sse",
  seed,
});
const pieces = [];
let buffered = "";
let usage = null;
for await (const chunk of events.body.pipeThrough(new TextDecoderStream())) {
  buffered += chunk;
  const complete = buffered.split("\n\n");
  buffered = complete.pop();
  for (const block of complete) {
    const event = JSON.parse(block.replace(/^data: /, ""));
    if (event.type === "speech.audio.delta") pieces.push(Buffer.from(event.audio, "base64"));
    if (event.type === "speech.audio.done") usage = event.usage;
  }
}
await writeFile(path.join(folder, "streamed.pcm"), Buffer.concat(pieces));

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return { class: error.constructor.name, status: error.status, code: error.code, param: error.param, requestID: error.requestID };
  }
  return null;
}

const speak = (voice) => client.audio.speech.create({ model: "csm-1b", voice, input: text }, { maxRetries: 0 });
const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(
  JSON.stringify({
    deltas: pieces.length,
    usage,
    models,
    invalidVoice: await refusal(() => speak("nobody")),
    notReady: await refusal(() => speak("conversational")),
    unknownModel: await refusal(() => client.models.retrieve("gpt-4")),
  }),
);
