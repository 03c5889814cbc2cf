// Keeps recent takes and previews of voices in this browser (IndexedDB). A browser that stores nothing is not an error.

const NAME = "sesame";
const TAKES = "takes"; // what is known of a take
const AUDIO = "audio"; // its samples, by the take's id
const PREVIEWS = "previews"; // by voice
export const MOST_TAKES = 20;
const MOST_SAMPLES = 24000 * 60 * 30; // of all takes together: half an hour, 86 MB
const MOST_PREVIEWS = 60;

let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => [TAKES, AUDIO, PREVIEWS].forEach((name) => request.result.createObjectStore(name));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
  return opening;
}

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Run `work` with the named stores and return its result, or `otherwise` if this browser stores nothing. */
async function within(names, mode, work, otherwise) {
  try {
    const transaction = (await open()).transaction(names, mode);
    return await work(...names.map((name) => transaction.objectStore(name)));
  } catch {
    return otherwise;
  }
}

/** Return the records of the stored takes, newest first. */
export async function storedTakes() {
  const records = await within([TAKES], "readonly", (takes) => result(takes.getAll()), []);
  return records.sort((a, b) => b.made - a.made);
}

/** Store a take; the oldest go when there are too many. Returns whether it is stored. */
export function storeTake(record, pieces) {
  return within([TAKES, AUDIO], "readwrite", async (takes, audio) => {
    const kept = (await result(takes.getAll())).filter(({ id }) => id !== record.id).sort((a, b) => b.made - a.made);
    let samples = record.length;
    for (const [index, old] of kept.entries()) {
      samples += old.length;
      if (index + 1 < MOST_TAKES && samples <= MOST_SAMPLES) continue;
      takes.delete(old.id);
      audio.delete(old.id);
    }
    if (record.length > MOST_SAMPLES) return false;
    takes.put(record, record.id);
    await result(audio.put(new Blob(pieces), record.id));
    return true;
  }, false);
}

/** Return the samples of a stored take, or null. */
export async function storedSamples(id) {
  const blob = await within([AUDIO], "readonly", (audio) => result(audio.get(id)), null);
  return blob ? new Int16Array(await blob.arrayBuffer()) : null;
}

/** Delete one take, or all. */
export const forgetTake = (id) => within([TAKES, AUDIO], "readwrite", (takes, audio) => Promise.all([result(takes.delete(id)), result(audio.delete(id))]));
export const forgetTakes = () => within([TAKES, AUDIO], "readwrite", (takes, audio) => Promise.all([result(takes.clear()), result(audio.clear())]));

/** Return a stored preview as a Blob, or null. */
export const storedPreview = async (key) => (await within([PREVIEWS], "readonly", (previews) => result(previews.get(key)), null)) ?? null;

export function storePreview(key, blob) {
  return within([PREVIEWS], "readwrite", async (previews) => {
    if ((await result(previews.count())) >= MOST_PREVIEWS) previews.clear();
    await result(previews.put(blob, key));
  });
}
