// Runs a WebAssembly program: node tests/run_wasi.mjs program.wasm [arguments]
import { readFile } from "node:fs/promises";
import { argv, exit } from "node:process";
import { WASI } from "node:wasi";

const wasi = new WASI({ version: "preview1", args: argv.slice(2), returnOnExit: true });
const module = await WebAssembly.compile(await readFile(argv[2]));
// What emscripten wants beside WASI: to be told that memory grew.
const env = { emscripten_notify_memory_growth: () => {} };
const instance = await WebAssembly.instantiate(module, { ...wasi.getImportObject(), env });
exit(wasi.start(instance));
