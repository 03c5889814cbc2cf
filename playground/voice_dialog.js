// The dialog for a new voice: record or choose a file, listen, enter name, words and consent, upload.

import { ApiError, getJson } from "./api.js";
import { byId, clock, showAlert } from "./dom.js";
import { record, whyNoMicrophone } from "./microphone.js";

const LARGEST = 10 * 1024 * 1024;

// A text to read aloud: about fifteen seconds, with most sounds of English.
const SCRIPT =
  "Every evening the old ferry crosses the bay, and I like to watch it from the window. " +
  "Some people wave, a dog barks at the gulls, and then it is quiet again. " +
  "Why does such a small thing make the whole day feel finished?";

export class VoiceDialog {
  #dialog = byId("voice-dialog");
  #recording = null;
  #sample = null;
  #saved;

  /** @param saved Called with the new voice after the server has stored it. */
  constructor(saved) {
    this.#saved = saved;
    byId("record").addEventListener("click", () => this.#toggleRecording());
    byId("voice-file").addEventListener("change", ({ target }) => this.#choose(target));
    byId("voice-cancel").addEventListener("click", () => this.#dialog.close());
    byId("voice-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#save();
    });
    this.#dialog.addEventListener("close", () => this.#clear());
  }

  /** @param note A note to show in the dialog, or "". */
  open(note) {
    const notes = [note, whyNoMicrophone()].filter(Boolean).join(" ");
    byId("voice-note").textContent = notes;
    byId("voice-note").hidden = !notes;
    byId("record").disabled = whyNoMicrophone() !== null;
    byId("voice-words").value = SCRIPT;
    this.#dialog.showModal();
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
    if (this.#dialog.open) this.#take(file, false);
  }

  #showRecording(on) {
    byId("record").classList.toggle("active", on);
    byId("record-word").textContent = on ? "Stop recording" : "Record again";
    byId("level").hidden = !on;
    byId("record-time").hidden = !on;
    byId("sample").hidden = on || !this.#sample;
  }

  #choose(input) {
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    if (!file) return;
    const objection = objectionTo(file);
    if (objection) showAlert(byId("voice-error"), { message: objection });
    else this.#take(file, true);
  }

  #take(file, chosen) {
    URL.revokeObjectURL(byId("sample-audio").src);
    this.#sample = file;
    byId("sample-audio").src = URL.createObjectURL(file);
    byId("sample-name").textContent = chosen ? file.name : "Your recording. Listen to it before you save it.";
    byId("sample").hidden = false;
    if (chosen && byId("voice-words").value === SCRIPT) byId("voice-words").value = "";
    showAlert(byId("voice-error"), null);
  }

  /** Return the first missing input as `[element, message]`, or null. */
  #missing() {
    if (!this.#sample) return [byId("record").disabled ? byId("voice-file") : byId("record"), "Record your voice or choose a file."];
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
    body.set("audio_sample", this.#sample, this.#sample.name);
    body.set("consent", "true");
    const words = byId("voice-words").value.trim();
    if (words) body.set("ref_text", words); // without words the server transcribes the recording, or answers that it cannot
    const button = byId("voice-save");
    button.disabled = true;
    button.textContent = "Saving…";
    try {
      const voice = await getJson("v1/audio/voices", { method: "POST", body });
      this.#dialog.close();
      this.#saved(voice);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      showAlert(byId("voice-error"), error);
    } finally {
      button.disabled = false;
      button.textContent = "Save voice";
    }
  }

  #clear() {
    this.#recording?.stop();
    URL.revokeObjectURL(byId("sample-audio").src);
    byId("sample-audio").removeAttribute("src");
    this.#sample = null;
    byId("voice-form").reset();
    byId("sample").hidden = true;
    byId("record-word").textContent = "Record";
    showAlert(byId("voice-error"), null);
  }
}

/** Return why a file cannot be a voice, as far as the browser can tell, or null. */
function objectionTo({ name, type, size }) {
  // Recorders on phones also use video types. If the browser does not know the type, the server decides.
  if (type && !/^(audio|video)\/|^application\/ogg$/.test(type)) return `“${name}” is not an audio file. Choose a recording, for example WAV, MP3 or M4A.`;
  return size > LARGEST ? "The file is larger than 10 MiB. One minute of speech is enough." : null;
}
