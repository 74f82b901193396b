// Runs lutra in WebAssembly for tests/test_wasm.py: a request for each line of the standard input.
//   {"model": file, "feeds": {name: [file, dtype, shape]}, "output": prefix} -> outputs as files;
//   "feeds": "any" runs the model on some numbers, and gives nothing
// and for each an answer: {"inputs", "outputs", "isa", "metadata"} or {"error": [code, sentence]}.
// A trap, or anything but a LutraError, ends the program.
import { readFileSync, writeFileSync } from "node:fs";
import { argv, stdin, stdout } from "node:process";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const lutra = await import(pathToFileURL(argv[2]).href);
const ARRAYS = { float32: Float32Array, int32: Int32Array };

function arrayOf([file, dtype, shape]) {
  const bytes = readFileSync(file);
  const Type = ARRAYS[dtype];
  return { data: new Type(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)), shape };
}

function anyNumbers(session) {
  return Object.fromEntries(session.inputs.map(({ name, dtype, shape }) => {
    const sizes = shape.map((size, axis) => size ?? (axis === 0 ? 2 : 5));
    const count = sizes.reduce((a, b) => a * b, 1);
    if (count > 2 ** 24) throw new lutra.LutraError("argument", "too many numbers for a test");
    const data = ARRAYS[dtype].from({ length: count }, (_, i) => (dtype === "int32" ? i % 2 : Math.sin(i)));
    return [name, { data, shape: sizes }];
  }));
}

async function answer({ model, feeds, output, times = 1 }) {
  const session = await lutra.load(model, { wasm: argv[3], maxMemory: 2 ** 26 });
  try {
    if (feeds === "any") {
      await session.run(anyNumbers(session));
      return {};
    }
    const given = Object.fromEntries(Object.entries(feeds ?? {}).map(([name, array]) => [name, arrayOf(array)]));
    for (let i = 0; i < (feeds ? times : 0); ++i) {
      const made = await session.run(given);
      for (const [index, value] of session.outputs.entries()) {
        writeFileSync(`${output}${index}`, made[value.name].data);
        writeFileSync(`${output}${index}.shape`, JSON.stringify(made[value.name].shape));
      }
    }
    const { inputs, outputs, isa, metadata } = session;
    return { inputs, outputs, isa, metadata };
  } finally {
    session.free();
  }
}

for await (const line of createInterface({ input: stdin })) {
  const result = await answer(JSON.parse(line)).catch((error) => {
    if (!(error instanceof lutra.LutraError)) throw error;
    return { error: [error.code, error.message] };
  });
  stdout.write(`${JSON.stringify(result)}\n`);
}
