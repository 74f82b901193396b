// Times models of lutra and of ONNX Runtime Web in turns. For Node and for browsers alike.

const median = (times) => times.toSorted((a, b) => a - b)[Math.floor(times.length / 2)];
const spread = (times) => {
  const sorted = times.toSorted((a, b) => a - b);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return { median: median(times), low: at(0.1), high: at(0.9) };
};

// Numbers that are the same everywhere.
function input(size) {
  let state = 1;
  return Float32Array.from({ length: size }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  });
}

/**
 * @param cases What models.json lists.
 * @param bytesOf (file) => Promise<Uint8Array>
 * @param lutra The module js/lutra.js.
 * @param ort The module onnxruntime-web.
 * @param options `turns`: how often each model has its turn; it runs for about `milliseconds` in
 *   each, by the `clock`.
 */
export async function measure(cases, bytesOf, lutra, ort, options = {}) {
  const { turns = 15, milliseconds = 40, clock = () => performance.now() } = options;
  const results = [];
  for (const { name, shape, lutra: ours, onnx } of cases) {
    const x = input(shape.reduce((a, b) => a * b, 1));
    const runs = {}, bytes = {}, start = {};
    for (const [label, file] of Object.entries(ours)) {
      const model = await bytesOf(file);
      const began = performance.now();
      const session = await lutra.load(model);
      start[label] = performance.now() - began;
      bytes[label] = model.length;
      runs[label] = async () => session.runSync(x);
    }
    for (const [precision, file] of Object.entries(onnx)) {
      const model = await bytesOf(file), label = `onnxruntime-web ${precision}`;
      const began = performance.now();
      const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
      start[label] = performance.now() - began;
      bytes[label] = model.length;
      const feeds = { [session.inputNames[0]]: new ort.Tensor("float32", x, shape) };
      runs[label] = () => session.run(feeds);
    }
    const times = {};
    for (const [label, run] of Object.entries(runs)) {
      times[label] = [];
      for (const end = performance.now() + 500; performance.now() < end;) await run(); // compiled
    }
    for (let turn = 0; turn < turns; ++turn) {
      for (const [label, run] of Object.entries(runs)) {
        let count = 0;
        const began = clock();
        do {
          await run();
          ++count;
        } while (clock() - began < milliseconds);
        times[label].push((clock() - began) / count);
      }
    }
    const ms = Object.fromEntries(Object.entries(times).map(([label, all]) => [label, spread(all)]));
    const ratio = Object.fromEntries(Object.keys(ours).map((label) => [label,
      Object.fromEntries(Object.keys(onnx).map((precision) => [precision,
        ms[`onnxruntime-web ${precision}`].median / ms[label].median]))]));
    results.push({ name, ms, bytes, start, ratio });
  }
  return results;
}

export function table(results) {
  const lines = [];
  for (const { name, ms, bytes, ratio } of results) {
    for (const [label, { median: middle, low, high }] of Object.entries(ms)) {
      const beside = Object.entries(ratio[label] ?? {})
        .map(([precision, times]) => `${times.toFixed(2)} x ${precision}`).join(", ");
      lines.push(`${name.padEnd(18)} ${label.padEnd(34)} ${middle.toFixed(3)} ms ` +
        `(${low.toFixed(3)}..${high.toFixed(3)}) ${(bytes[label] / 1024).toFixed(0)} KiB  ${beside}`);
    }
  }
  return lines.join("\n");
}
