// Speak one text with each of several configurations through OpenClaw's interface for plugins, in one process.
// Usage: node openclaw_speech.mjs TEXT CONFIG...; prints OpenClaw's result for each configuration as a line of JSON.

import { readFile } from "node:fs/promises";
import { textToSpeech } from "openclaw/plugin-sdk/tts-runtime";

const [text, ...configs] = process.argv.slice(2);
for (const path of configs) {
  const cfg = JSON.parse(await readFile(path, "utf8"));
  console.log(JSON.stringify(await textToSpeech({ text, cfg })));
}
process.exit(0); // OpenClaw keeps timers running
