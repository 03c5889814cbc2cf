// One request with OpenAI's library for Node and its own retries, against the server named by OPENAI_BASE_URL.
// Usage: node openai_patience.mjs TEXT FILE

import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const [text, file] = process.argv.slice(2);
const speech = await new OpenAI().audio.speech.create({ model: "csm-1b", voice: "coral", input: text });
await writeFile(file, Buffer.from(await speech.arrayBuffer()));
