// What OpenClaw's command line does not reach: speech for telephone calls, for voice notes, and for Talk, through OpenClaw's own code.
// Usage: node openclaw_channels.mjs CONFIG TEXT FOLDER; writes telephony.pcm, voice-note.opus and talk.mp3, prints what OpenClaw says of each.

import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { textToSpeechTelephony } from "openclaw/plugin-sdk/tts-runtime";

const [configPath, text, folder] = process.argv.slice(2);
const cfg = JSON.parse(await readFile(configPath, "utf8"));

// The provider that a gateway would load; the package does not export it by name.
const packageFolder = path.dirname(path.dirname(path.dirname(new URL(import.meta.resolve("openclaw/plugin-sdk/tts-runtime")).pathname)));
const catalog = await import(path.join(packageFolder, "dist/extensions/openai/capability-catalog.js"));
const provider = catalog.default({}).speechProviders.find((each) => each.id === "openai");

const told = {};

async function keep(name, { audioBuffer, ...facts }) {
  if (audioBuffer) await writeFile(path.join(folder, name), audioBuffer);
  told[name] = facts;
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

console.log(JSON.stringify(told));
process.exit(0); // OpenClaw keeps timers running
