// node benchmarks/web/node.mjs FOLDER [--json FILE]: the models of make_models.py, in Node.
import { readFile, stat, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { cpus } from "node:os";
import path from "node:path";
import { argv, cpuUsage, versions } from "node:process";
import { gzipSync } from "node:zlib";

import * as lutra from "../../js/lutra.js";
import { measure, table } from "./measure.js";

const folder = argv[2];
const require = createRequire(import.meta.url);
const dist = path.dirname(require.resolve("onnxruntime-web/wasm"));

const began = performance.now();
const first = await lutra.version();
const lutraStart = performance.now() - began;
// The build for browsers: the one for Node of this package runs the same WebAssembly.
const before = performance.now();
const ort = await import(path.join(dist, "ort.wasm.min.mjs"));
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = `file://${dist}/`;
const ortStart = performance.now() - before;

const cases = JSON.parse(await readFile(path.join(folder, "models.json"), "utf8"));
const bytesOf = async (file) => new Uint8Array(await readFile(path.join(folder, file)));
// CPU time of the process: others may be at work on the machine.
const clock = () => {
  const { user, system } = cpuUsage();
  return (user + system) / 1000;
};
const results = await measure(cases, bytesOf, lutra, ort, { clock });
console.log(table(results));

const here = (file) => new URL(`../../js/${file}`, import.meta.url).pathname;
const files = {
  lutra: [here("lutra.js"), here("lutra.wasm")],
  "onnxruntime-web": ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]
    .map((file) => path.join(dist, file)),
};
const download = {};
for (const [name, list] of Object.entries(files)) {
  let bytes = 0, gzip = 0;
  for (const file of list) {
    bytes += (await stat(file)).size;
    gzip += gzipSync(await readFile(file), { level: 9 }).length;
  }
  download[name] = { bytes, gzip };
  console.log(`${name}: ${bytes} bytes to download, ${gzip} by gzip`);
}
for (const { name, start } of results) {
  for (const [label, ms] of Object.entries(start)) {
    console.log(`${name.padEnd(18)} ${label.padEnd(34)} opened in ${ms.toFixed(1)} ms`);
  }
}
const at = argv.indexOf("--json");
if (at > 0) {
  const machine = { cpu: cpus()[0].model, node: versions.node, v8: versions.v8, lutra: first,
    onnxruntime: JSON.parse(await readFile(path.join(dist, "../package.json"), "utf8")).version };
  await writeFile(argv[at + 1],
    JSON.stringify({ results, download, library_ms: { lutra: lutraStart, "onnxruntime-web": ortStart }, machine }, null, 2) + "\n");
}
