// Send two requests at once with OpenAI's library for Node, with its default retries, to the server at OPENAI_BASE_URL.
// Usage: node openai_patience.mjs TEXT FOLDER; writes 0.mp3 and 1.mp3.

import { writeFile } from "node:fs/promises";
import path from "node:path";
import OpenAI from "openai";

const [text, folder] = process.argv.slice(2);
const client = new OpenAI();

async function speak(name) {
  const speech = await client.audio.speech.create({ model: "csm-1b", voice: "coral", input: text, seed: 1 });
  await writeFile(path.join(folder, name), Buffer.from(await speech.arrayBuffer()));
}

await Promise.all([speak("0.mp3"), speak("1.mp3")]);
