// The dialog for a new voice: record or choose a file, listen, enter name, words and consent, upload, hear the new voice.

import { ApiError, getJson } from "./api.js";
import { byId, clock, lasting, showAlert } from "./dom.js";
import { record, whyNoMicrophone } from "./microphone.js";
import { decoded, paceFault, trimmed, wavFile } from "./recording.js";
import { SAMPLE_RATE } from "./take.js";

const LARGEST = 10 * 1024 * 1024;
const SHORTEST = 1; // seconds; the server's limit

// A text to read aloud: about fifteen seconds, with most sounds of English.
const SCRIPT =
  "Every evening the old ferry crosses the bay, and I like to watch it from the window. " +
  "Some people wave, a dog barks at the gulls, and then it is quiet again. " +
  "Why does such a small thing make the whole day feel finished?";

const LABELS = {
  record: ["Read this aloud", "Or write your own text, and read that."],
  upload: ["Exact words of the recording", "Leave this empty if the server has a speech recogniser."],
};

export class VoiceDialog {
  #dialog = byId("voice-dialog");
  #previews;
  #ready;
  #saved;
  #tabs = [byId("tab-record"), byId("tab-upload")];
  #recording = null;
  #sample = null; // {file, seconds}; the seconds are null if this browser cannot decode the file
  #voice = null;

  /** @param previews Plays previews. @param ready Returns whether CSM can speak now. @param saved Called with the new voice after the server has stored it. */
  constructor(previews, ready, saved) {
    this.#previews = previews;
    this.#ready = ready;
    this.#saved = saved;
    byId("record").addEventListener("click", () => this.#toggleRecording());
    byId("voice-file").addEventListener("change", ({ target }) => this.#choose(target));
    byId("voice-words").addEventListener("input", () => showAlert(byId("voice-error"), null));
    for (const id of ["voice-cancel", "saved-done"]) byId(id).addEventListener("click", () => this.#dialog.close());
    byId("saved-preview").addEventListener("click", () => this.#previews.toggle(this.#voice));
    byId("voice-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#save();
    });
    for (const tab of this.#tabs) {
      tab.addEventListener("click", () => this.#select(tab));
      tab.addEventListener("keydown", (event) => this.#tabKey(event));
    }
    this.#dialog.addEventListener("close", () => this.#clear());
  }

  /** @param note A note to show in the dialog, or "". */
  open(note) {
    const silent = whyNoMicrophone();
    const notes = [note, silent].filter(Boolean).join(" ");
    byId("voice-note").textContent = notes;
    byId("voice-note").hidden = !notes;
    byId("record").disabled = silent !== null;
    this.#select(this.#tabs[silent ? 1 : 0]);
    this.#dialog.showModal();
  }

  get #recordingTab() {
    return this.#tabs[0].ariaSelected === "true";
  }

  #select(chosen) {
    for (const tab of this.#tabs) {
      tab.ariaSelected = String(tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    const [label, hint] = this.#recordingTab ? LABELS.record : LABELS.upload;
    byId("words-label").textContent = label;
    byId("words-hint").textContent = hint;
    const words = byId("voice-words");
    if (this.#recordingTab && !words.value) words.value = SCRIPT;
    if (!this.#recordingTab && words.value === SCRIPT) words.value = "";
    if (!this.#recordingTab) this.#recording?.stop();
  }

  #tabKey({ key, target }) {
    if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(key)) return;
    const other = key === "Home" ? this.#tabs[0] : key === "End" ? this.#tabs[1] : this.#tabs.find((tab) => tab !== target);
    this.#select(other);
    other.focus();
  }

  async #toggleRecording() {
    if (this.#recording) return this.#recording.stop();
    showAlert(byId("voice-error"), null);
    try {
      this.#recording = await record((seconds, loudness) => {
        byId("level").value = loudness;
        byId("record-time").textContent = clock(seconds);
      });
    } catch (error) {
      return showAlert(byId("voice-error"), error);
    }
    this.#showRecording(true);
    const file = await this.#recording.done;
    this.#recording = null;
    this.#showRecording(false);
    if (this.#dialog.open) await this.#take(file, "");
  }

  #showRecording(on) {
    byId("record").classList.toggle("active", on);
    byId("record-word").textContent = on ? "Stop" : "Record again";
    byId("level").value = 0;
    byId("sample").hidden = on || !this.#sample;
  }

  async #choose(input) {
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    if (!file) return;
    const objection = objectionTo(file);
    if (objection) showAlert(byId("voice-error"), { message: objection });
    else await this.#take(file, file.name);
  }

  /** Use a recording: without the silence around it, if this browser can decode it. */
  async #take(file, name) {
    const samples = await decoded(file);
    const speech = samples && trimmed(samples);
    const seconds = speech && speech.length / SAMPLE_RATE;
    this.#sample = { file: speech ? wavFile(speech, "recording.wav") : file, seconds };
    URL.revokeObjectURL(byId("sample-audio").src);
    byId("sample-audio").src = URL.createObjectURL(this.#sample.file);
    const removed = speech ? (samples.length - speech.length) / SAMPLE_RATE : 0;
    const length = speech ? `${lasting(seconds)}${removed >= 0.1 ? `, ${lasting(removed)} of silence removed` : ""}` : "";
    byId("sample-name").textContent = [name, length].filter(Boolean).join(": ");
    byId("sample").hidden = false;
    const fault = this.#paceFault();
    showAlert(byId("voice-error"), fault && { message: fault });
  }

  /** Why the recording and the words do not fit together, or null. */
  #paceFault() {
    const seconds = this.#sample?.seconds ?? null;
    if (seconds === null) return null;
    if (seconds < SHORTEST) return `The recording has ${seconds.toFixed(1)} s of speech. At least ${SHORTEST} s is needed, better ten.`;
    return paceFault(byId("voice-words").value, seconds);
  }

  /** Return the first missing input as `[element, message]`, or null. */
  #missing() {
    const source = this.#recordingTab ? byId("record") : byId("voice-file");
    if (!this.#sample) return [source, this.#recordingTab ? "Record your voice, or upload a file." : "Choose a file."];
    const fault = this.#paceFault();
    if (fault) return [byId("voice-words"), fault];
    if (!byId("voice-name").value.trim()) return [byId("voice-name"), "Enter a name for the voice."];
    if (!byId("voice-consent").checked) return [byId("voice-consent"), "A voice may be used only with the speaker's consent. Tick the box if you have it."];
    return null;
  }

  async #save() {
    const missing = this.#missing();
    if (missing) {
      showAlert(byId("voice-error"), { message: missing[1] });
      return missing[0].focus();
    }
    const body = new FormData();
    body.set("name", byId("voice-name").value.trim());
    body.set("audio_sample", this.#sample.file, this.#sample.file.name);
    body.set("consent", "true");
    const words = byId("voice-words").value.trim();
    if (words) body.set("ref_text", words); // without words the server transcribes the recording, or answers that it cannot
    const button = byId("voice-save");
    button.disabled = true;
    button.textContent = "Saving…";
    try {
      this.#voice = await getJson("v1/audio/voices", { method: "POST", body });
      await this.#saved(this.#voice);
      this.#showSaved(this.#voice);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      showAlert(byId("voice-error"), error);
    } finally {
      button.disabled = false;
      button.textContent = "Save voice";
    }
  }

  #showSaved({ id, name }) {
    const ready = this.#ready();
    byId("voice-form").hidden = true;
    byId("voice-saved").hidden = false;
    byId("saved-title").textContent = `${name} is saved`;
    byId("saved-note").textContent = ready ? "The new voice is selected. Hear how it sounds." : "It can speak when CSM-1B is ready. Until then it is listed below the other voices.";
    const preview = byId("saved-preview");
    preview.hidden = !ready;
    preview.dataset.preview = id;
    preview.dataset.name = name;
    preview.textContent = "Hear the new voice";
    byId("saved-title").focus();
  }

  #clear() {
    this.#recording?.stop();
    if (this.#voice) this.#previews.stop();
    this.#voice = null;
    delete byId("saved-preview").dataset.preview;
    URL.revokeObjectURL(byId("sample-audio").src);
    byId("sample-audio").removeAttribute("src");
    this.#sample = null;
    byId("voice-form").reset();
    byId("voice-form").hidden = false;
    byId("voice-saved").hidden = true;
    byId("sample").hidden = true;
    byId("record-word").textContent = "Record";
    byId("record-time").textContent = clock(0);
    showAlert(byId("voice-error"), null);
  }
}

/** Return why a file cannot be a voice, as far as the browser can tell, or null. */
function objectionTo({ name, type, size }) {
  // Recorders on phones also use video types. If the browser does not know the type, the server decides.
  if (type && !/^(audio|video)\/|^application\/ogg$/.test(type)) return `“${name}” is not an audio file. Choose a recording, for example WAV, MP3 or M4A.`;
  return size > LARGEST ? "The file is larger than 10 MiB. One minute of speech is enough." : null;
}
