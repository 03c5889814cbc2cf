// Use OpenClaw's code for speech that its command line cannot produce: telephone calls, voice notes and Talk.
// Usage: node openclaw_channels.mjs CONFIG TEXT FOLDER; writes telephony.pcm, voice-note.opus and talk.mp3, and prints OpenClaw's results.

import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { textToSpeechTelephony } from "openclaw/plugin-sdk/tts-runtime";

const [configPath, text, folder] = process.argv.slice(2);
const cfg = JSON.parse(await readFile(configPath, "utf8"));

// The provider that a gateway loads; the package does not export it.
const packageFolder = path.dirname(path.dirname(path.dirname(new URL(import.meta.resolve("openclaw/plugin-sdk/tts-runtime")).pathname)));
const catalog = await import(path.join(packageFolder, "dist/extensions/openai/capability-catalog.js"));
const provider = catalog.default({}).speechProviders.find((each) => each.id === "openai");

const results = {};

async function keep(name, { audioBuffer, ...details }) {
  if (audioBuffer) await writeFile(path.join(folder, name), audioBuffer);
  results[name] = details;
}

const call = await textToSpeechTelephony({ text, cfg });
await keep("telephony.pcm", call);

const providerConfig = provider.resolveConfig({ cfg, rawConfig: cfg.tts, timeoutMs: 60_000 });
await keep("voice-note.opus", await provider.synthesize({ text, cfg, providerConfig, target: "voice-note", timeoutMs: 60_000 }));

const talkConfig = provider.resolveTalkConfig({
  cfg,
  baseTtsConfig: {},
  talkProviderConfig: cfg.talk.providers.openai,
  timeoutMs: 60_000,
});
await keep("talk.mp3", await provider.synthesize({ text, cfg, providerConfig: talkConfig, target: "audio-file", timeoutMs: 60_000 }));

console.log(JSON.stringify(results));
process.exit(0); // OpenClaw keeps timers running
