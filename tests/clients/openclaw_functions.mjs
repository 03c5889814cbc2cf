// Call OpenClaw's own functions, one after the other, in one process: its command line takes four seconds of processor time for each start.
// Usage: node openclaw_functions.mjs; reads {"function": NAME, …} a line from standard input, and writes a line of JSON for each.

import { readdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";
import { listSpeechVoices, textToSpeech, textToSpeechTelephony } from "openclaw/plugin-sdk/tts-runtime";

const dist = path.dirname(path.dirname(new URL(import.meta.resolve("openclaw/plugin-sdk/tts-runtime")).pathname));
const timeoutMs = 60_000;

// Modules that the package does not export. The second one's name ends with a hash.
async function internal(name) {
  return await import(pathToFileURL(path.join(dist, name)));
}

const { validateConfigObjectWithPlugins } = await internal("config/config.js");
const migration = (await readdir(dist)).find((name) => name.startsWith("legacy-config-migrate-"));
const migrateLegacyConfig = Object.values(await internal(migration)).find((each) => each.name === "migrateLegacyConfig");

// The provider that a gateway loads.
const provider = (await internal("extensions/openai/capability-catalog.js")).default({}).speechProviders.find((each) => each.id === "openai");

async function keep({ audioBuffer, ...details }, file) {
  if (audioBuffer) await writeFile(file, audioBuffer);
  return details;
}

const functions = {
  // What `openclaw infer tts convert` calls.
  speech: ({ text, cfg }) => textToSpeech({ text, cfg }),
  call: async ({ text, cfg, file }) => keep(await textToSpeechTelephony({ text, cfg }), file),
  voiceNote: async ({ text, cfg, file }) => {
    const providerConfig = provider.resolveConfig({ cfg, rawConfig: cfg.tts, timeoutMs });
    return keep(await provider.synthesize({ text, cfg, providerConfig, target: "voice-note", timeoutMs }), file);
  },
  talk: async ({ text, cfg, file }) => {
    const talkProviderConfig = cfg.talk.providers.openai;
    const providerConfig = provider.resolveTalkConfig({ cfg, baseTtsConfig: {}, talkProviderConfig, timeoutMs });
    return keep(await provider.synthesize({ text, cfg, providerConfig, target: "audio-file", timeoutMs }), file);
  },
  // What every command checks a configuration with, and what `openclaw doctor --fix` converts it with.
  validation: ({ cfg }) => validateConfigObjectWithPlugins(cfg),
  migration: ({ cfg }) => migrateLegacyConfig(cfg, {}),
};

await listSpeechVoices({ provider: "openai", cfg: {} }); // loads the plugin, so that the first speech is requested at once
for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  console.log(JSON.stringify(await functions[request.function](request)));
}
process.exit(0); // OpenClaw keeps timers running
