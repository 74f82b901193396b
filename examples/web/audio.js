// From sound to the input of a model, as the metadata of its file describe it: what
// lutra.preprocess.audio does in Python, in double precision.

const MEL = 1127;
const QUIETEST = 1 / 32768;

// The power spectrum of `frame` samples, padded to 2^k points.
class Spectrum {
  constructor(points) {
    this.points = points;
    const bits = Math.log2(points);
    if (!Number.isInteger(bits)) throw new Error(`an FFT of ${points} points is not supported`);
    this.order = Uint32Array.from({ length: points }, (_, i) => {
      let reversed = 0;
      for (let b = 0; b < bits; ++b) reversed |= ((i >> b) & 1) << (bits - 1 - b);
      return reversed;
    });
    this.cos = Float64Array.from({ length: points / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / points));
    this.sin = Float64Array.from({ length: points / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / points));
    this.re = new Float64Array(points);
    this.im = new Float64Array(points);
  }

  power(frame) {
    const { points, re, im } = this;
    for (let i = 0; i < points; ++i) re[i] = frame[this.order[i]] ?? 0;
    im.fill(0);
    for (let half = 1; half < points; half *= 2) {
      const step = points / (2 * half);
      for (let start = 0; start < points; start += 2 * half) {
        for (let i = 0; i < half; ++i) {
          const c = this.cos[i * step], s = this.sin[i * step];
          const a = start + i, b = a + half;
          const x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
          re[b] = re[a] - x;
          im[b] = im[a] - y;
          re[a] += x;
          im[a] += y;
        }
      }
    }
    return Float64Array.from({ length: points / 2 + 1 }, (_, i) => re[i] ** 2 + im[i] ** 2);
  }
}

/** Log-mel features or MFCCs of clips. */
export class AudioPreprocess {
  constructor(entry) {
    if (entry?.kind !== "audio") throw new Error("the model does not say how sound becomes its input");
    Object.assign(this, entry);
    this.frames = Math.floor((this.samples - this.frame) / this.hop) + 1;
    this.width = this.coefficients || this.bands;
    this.spectra = new Spectrum(this.fft);
    this.window = Float64Array.from({ length: this.frame },
      (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / this.frame));
    this.triangles = this.#triangles();
    this.cosines = Float64Array.from({ length: this.bands * this.coefficients }, (_, at) => {
      const i = at % this.coefficients, band = Math.floor(at / this.coefficients);
      return Math.sqrt(2 / this.bands) * Math.cos(Math.PI * i * ((band + 0.5) / this.bands));
    });
  }

  #triangles() {
    const mel = (f) => MEL * Math.log1p(f / 700);
    const [low, high] = this.frequencies.map(mel);
    let corners = Array.from({ length: this.bands + 2 }, (_, i) => low + ((high - low) * i) / (this.bands + 1));
    const inMel = this.triangles === "mel";
    if (!inMel) corners = corners.map((m) => 700 * Math.expm1(m / MEL));
    return Array.from({ length: this.bands }, (_, band) => {
      const [start, middle, end] = corners.slice(band, band + 3);
      const weights = [];
      for (let bin = 0; bin <= this.fft / 2; ++bin) {
        const hertz = (bin * this.rate) / this.fft, place = inMel ? mel(hertz) : hertz;
        const height = Math.min((place - start) / (middle - start), (end - place) / (end - middle));
        if (height > 0) weights.push([bin, height]);
      }
      return weights;
    });
  }

  /** The input of the model: Float32Array of `frames * width` values of at most `samples` samples. */
  apply(sound) {
    const clip = new Float32Array(this.samples);
    clip.set(sound.subarray(0, this.samples));
    let gain = 1;
    if (this.gain === "peak") {
      const peak = clip.reduce((most, x) => Math.max(most, x), -Infinity);
      if (peak >= QUIETEST) gain = 1 / peak;
    }
    const power = this.spectrum === "power", factor = power ? gain * gain : gain;
    const result = new Float32Array(this.frames * this.width);
    for (let t = 0; t < this.frames; ++t) {
      const frame = this.window.map((w, i) => w * clip[t * this.hop + i]);
      const spectrum = this.spectra.power(frame);
      const logs = this.triangles.map((weights) => {
        const sum = weights.reduce((s, [bin, w]) => s + w * (power ? spectrum[bin] : Math.sqrt(spectrum[bin])), 0);
        return Math.log(sum * factor + this.floor);
      });
      for (let i = 0; i < this.width; ++i) result[t * this.width + i] = this.#value(this.#feature(logs, i));
    }
    return result;
  }

  #feature(logs, i) {
    if (!this.coefficients) return logs[i];
    return logs.reduce((sum, x, band) => sum + x * this.cosines[band * this.coefficients + i], 0);
  }

  #value(feature) {
    let value = feature;
    if (this.levels) {
      const { step, zero, low, high, rounding } = this.levels;
      const at = feature / step + zero;
      const level = rounding === "nearest" ? Math.floor(at + 0.5) : Math.trunc(at);
      value = Math.fround(Math.fround(Math.min(Math.max(level, low), high) - zero) * Math.fround(step));
    }
    return Math.fround(Math.fround(value - this.mean) / Math.fround(this.std));
  }
}

/** The samples of a sound file at a rate, one channel. */
export async function decode(bytes, rate) {
  const context = new OfflineAudioContext(1, 1, rate); // decodes to its own rate
  const sound = await context.decodeAudioData(bytes);
  const mono = new Float32Array(sound.length);
  for (let c = 0; c < sound.numberOfChannels; ++c) {
    const channel = sound.getChannelData(c);
    for (let i = 0; i < mono.length; ++i) mono[i] += channel[i] / sound.numberOfChannels;
  }
  return mono;
}

/** Calls heard(samples of the last `seconds`) every `every` seconds; returns a function that stops. */
export async function listen(rate, seconds, every, heard) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const context = new AudioContext({ sampleRate: rate });
  const code = `registerProcessor("tap", class extends AudioWorkletProcessor {
    process([input]) { if (input[0]) this.port.postMessage(input[0].slice()); return true; } });`;
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const tap = new AudioWorkletNode(context, "tap", { numberOfOutputs: 0 });
  context.createMediaStreamSource(stream).connect(tap);
  const last = new Float32Array(rate * seconds);
  let due = rate * every;
  tap.port.onmessage = ({ data }) => {
    last.copyWithin(0, data.length);
    last.set(data, last.length - data.length);
    due -= data.length;
    if (due > 0) return;
    due += rate * every;
    heard(last);
  };
  return () => {
    stream.getTracks().forEach((track) => track.stop());
    context.close();
  };
}
