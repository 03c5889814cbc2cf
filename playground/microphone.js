// Records from the microphone, with a level meter, until the user stops it or the maximum length is reached.

const LONGEST = 60; // seconds; the server accepts no longer recording

/** Return why this browser cannot record here, or null if it can. */
export function whyNoMicrophone() {
  if (!isSecureContext) return "Browsers allow recording only on https pages and on localhost. Choose a file instead, or open this page on the server's own machine.";
  if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) return "This browser cannot record. Choose a file instead.";
  return null;
}

/** Start recording. `onLevel(seconds, loudness)` is called about 30 times per second. Returns `{stop, done}`: a function, and a promise of a File. */
export async function record(onLevel) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } }).catch((error) => {
    const refused = error.name === "NotAllowedError";
    throw new Error(refused ? "The browser denied access to the microphone." : "No microphone was found.");
  });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.addEventListener("dataavailable", ({ data }) => pieces.push(data));
  const meter = watch(stream, (seconds, loudness) => {
    onLevel(seconds, loudness);
    if (seconds >= LONGEST) stop();
  });
  const stop = () => recorder.state === "inactive" || recorder.stop();
  const done = new Promise((resolve) => {
    recorder.addEventListener("stop", () => {
      meter.end();
      for (const track of stream.getTracks()) track.stop();
      const type = recorder.mimeType.split(";")[0] || "audio/webm";
      resolve(new File(pieces, `recording.${type.split("/")[1]}`, { type }));
    });
  });
  recorder.start();
  return { stop, done };
}

function watch(stream, onLevel) {
  const context = new AudioContext();
  const analyser = new AnalyserNode(context, { fftSize: 1024 });
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const started = performance.now();
  const timer = setInterval(() => {
    analyser.getFloatTimeDomainData(samples);
    const loudest = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
    onLevel((performance.now() - started) / 1000, loudest);
  }, 33);
  return {
    end() {
      clearInterval(timer);
      context.close();
    },
  };
}
