import * as lutra from "./lutra.js";
import { AudioPreprocess, decode, listen } from "./audio.js";
import { cells, SIZE } from "./digits.js";

const $ = (id) => document.getElementById(id);
const BEST = 5; // answers shown

function softmax(scores) {
  const top = Math.max(...scores), powers = Array.from(scores, (x) => Math.exp(x - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

function show(list, labels, shares) {
  const order = shares.map((share, i) => ({ share, label: labels[i] ?? String(i) }))
    .sort((a, b) => b.share - a.share).slice(0, BEST);
  list.replaceChildren(...order.map(({ share, label }, place) => {
    const line = document.createElement("li");
    line.className = place === 0 ? "best" : "";
    const name = document.createElement("span"), bar = document.createElement("span"), text = document.createElement("span");
    name.textContent = label;
    bar.className = "bar";
    bar.append(document.createElement("i"));
    bar.firstChild.style.width = `${100 * share}%`;
    text.className = "share";
    text.textContent = `${(100 * share).toFixed(0)} %`;
    line.append(name, bar, text);
    return line;
  }));
}

function say(id, text, bad = false) {
  $(id).textContent = text;
  $(id).classList.toggle("bad", bad);
}

// Calls f; what goes wrong is said where the user looks.
const trying = (id, f) => async (...words) => {
  try {
    await f(...words);
  } catch (error) {
    say(id, error.message, true);
  }
};

function timed(session, x) {
  const began = performance.now(), made = session.runSync(x);
  return { made, ms: performance.now() - began };
}

async function digits() {
  const session = await lutra.load(new URL("models/digits.lutrac", import.meta.url));
  const canvas = $("drawing"), pen = canvas.getContext("2d", { willReadFrequently: true });
  const small = $("seen").getContext("2d");
  const labels = session.metadata.classes ?? [...Array(10).keys()].map(String);
  Object.assign(pen, { lineWidth: 30, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
  const answer = () => {
    const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
    const gray = Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i + 3]);
    const x = cells(gray, canvas.width);
    const image = small.createImageData(SIZE, SIZE);
    (x ?? new Float32Array(SIZE * SIZE)).forEach((v, i) => image.data.set([255 * v, 255 * v, 255 * v, 255], 4 * i));
    small.putImageData(image, 0, 0);
    if (!x) {
      show($("digit-scores"), labels, labels.map(() => 0));
      return say("digit-status", "Ready.");
    }
    const { made, ms } = timed(session, x);
    show($("digit-scores"), labels, softmax(made));
    say("digit-status", `Answered in ${ms.toFixed(2)} ms.`);
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect(), factor = canvas.width / box.width;
    return [(event.clientX - box.left) * factor, (event.clientY - box.top) * factor];
  };
  let last = null;
  const draw = trying("digit-status", (event) => {
    if (!last) return;
    const now = place(event);
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...now);
    pen.stroke();
    last = now;
    answer();
  });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    draw(event);
  });
  canvas.addEventListener("pointermove", draw);
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  $("clear").addEventListener("click", () => {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    answer();
  });
  answer();
}

function drawWave(sound) {
  const canvas = $("wave"), pen = canvas.getContext("2d");
  const { width, height } = canvas, most = sound.reduce((m, x) => Math.max(m, Math.abs(x)), 0.01);
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = getComputedStyle(canvas).color;
  for (let x = 0; x < width; ++x) {
    const part = sound.subarray(Math.floor((x * sound.length) / width), Math.floor(((x + 1) * sound.length) / width));
    const peak = part.reduce((m, v) => Math.max(m, Math.abs(v)), 0) / most;
    pen.fillRect(x, (height - peak * (height - 8)) / 2 - 0.5, 1, peak * (height - 8) + 1);
  }
}

async function words() {
  const session = await lutra.load(new URL("models/keywords.lutrac", import.meta.url));
  const front = new AudioPreprocess(session.metadata.preprocess), labels = session.metadata.classes;
  const spoken = labels.filter((label) => !["Silence", "Unknown"].includes(label));
  $("words").textContent = `One of: ${spoken.join(", ").toLowerCase()}.`;
  const answer = (sound) => {
    drawWave(sound);
    const began = performance.now(), x = front.apply(sound), features = performance.now() - began;
    const { made, ms } = timed(session, x);
    show($("word-scores"), labels, softmax(made));
    say("word-status", `Features in ${features.toFixed(1)} ms, network in ${ms.toFixed(2)} ms.`);
  };
  const file = $("file"), microphone = $("microphone");
  file.addEventListener("change", trying("word-status", async () => {
    if (!file.files[0]) return;
    const sound = await decode(await file.files[0].arrayBuffer(), front.rate);
    file.value = "";
    answer(loudest(sound, front.samples));
  }));
  let stop = null;
  microphone.addEventListener("click", trying("word-status", async () => {
    if (stop) {
      stop();
      stop = null;
      microphone.textContent = "Use the microphone";
      return;
    }
    stop = await listen(front.rate, front.samples / front.rate, 0.1, trying("word-status", answer));
    microphone.textContent = "Stop";
  }));
  file.disabled = microphone.disabled = false;
  drawWave(new Float32Array(front.samples));
  show($("word-scores"), labels, labels.map(() => 0));
  say("word-status", "Ready.");
}

// The part of so many samples that holds most of the sound.
function loudest(sound, samples) {
  if (sound.length <= samples) return sound;
  const step = Math.floor(samples / 50);
  let best = 0, most = -1;
  for (let from = 0; from + samples <= sound.length; from += step) {
    let sum = 0;
    for (let i = from; i < from + samples; i += 8) sum += sound[i] * sound[i];
    if (sum > most) [best, most] = [from, sum];
  }
  return sound.subarray(best, best + samples);
}

await Promise.all([trying("digit-status", digits)(), trying("word-status", words)()]);
document.body.dataset.ready = "true";
