// lutra in WebAssembly: runs compiled models (`lutra compile model.lutra`) in browsers and in Node.
// docs/web.md explains it; lutra.d.ts has the types.

/** What went wrong, in the engine's sentence. `code` is the name of a status of lutra.h. */
export class LutraError extends Error {
  constructor(code, message) {
    super(message);
    this.name = "LutraError";
    this.code = code;
  }
}

const CODES = ["ok", "argument", "file", "format", "cpu", "input", "memory", "internal"];
const DTYPES = { 0: ["float32", Float32Array], 1: ["int32", Int32Array] };
const VALUE_BYTES = 80; // of a lutra_value: name, dtype, rank, 4 unused, 8 sizes of 64 bits
const OPTION_BYTES = 24; // of lutra_options: isa, threads, allow_nonfinite, 4 unused, max_memory
const DEFAULT_MEMORY = 2 ** 30;

// A function of one i16x8.relaxed_dot_i8x16_i7x16_s: may engines run lutra_dot.wasm?
const DOT = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0,
  10, 16, 1, 14, 0, 65, 0, 253, 15, 65, 0, 253, 15, 253, 146, 2, 26, 11,
);

// The module beside this file that is the fastest here.
function bestModule() {
  const name = WebAssembly.validate(DOT) ? "lutra_dot.wasm" : "lutra.wasm";
  return new URL(name, import.meta.url);
}

const isNode = typeof process !== "undefined" && process.versions?.node !== undefined;
const modules = new Map(); // compiled once for each place

function cannot(what, place, error) {
  throw new LutraError("file", `cannot ${what} '${place}': ${error.message}`);
}

async function bytesOf(source) {
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (ArrayBuffer.isView(source)) {
    return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  }
  const place = String(source);
  if (isNode && !/^(https?|data|blob):/.test(place)) {
    const { readFile } = await import("node:fs/promises");
    const file = place.startsWith("file:") ? new URL(place) : place;
    return new Uint8Array(await readFile(file).catch((error) => cannot("read", place, error)));
  }
  const answer = await fetch(place).catch((error) => cannot("fetch", place, error));
  if (!answer.ok) {
    throw new LutraError("file", `cannot fetch '${place}': ${answer.status} ${answer.statusText}`);
  }
  return new Uint8Array(await answer.arrayBuffer());
}

function compiled(source) {
  if (source instanceof WebAssembly.Module) return Promise.resolve(source);
  if (source instanceof ArrayBuffer || ArrayBuffer.isView(source)) return WebAssembly.compile(source);
  const key = String(source);
  if (!modules.has(key)) {
    const module = bytesOf(source).then((bytes) => WebAssembly.compile(bytes));
    module.catch(() => modules.delete(key)); // the next call tries again
    modules.set(key, module);
  }
  return modules.get(key);
}

// What the module wants from its surroundings: a clock, and an end that nobody should see.
function surroundings(memory) {
  const end = (code) => {
    throw new WebAssembly.RuntimeError(`the engine ended with ${code}`);
  };
  return {
    env: { emscripten_notify_memory_growth: () => {} },
    wasi_snapshot_preview1: {
      proc_exit: end,
      clock_time_get: (_clock, _precision, to) => {
        const time = BigInt(Math.round(performance.now() * 1e6));
        new DataView(memory().buffer).setBigUint64(to, time, true);
        return 0;
      },
    },
  };
}

// The functions of lutra.h in a memory of their own: a model that fails harms no other one.
class Engine {
  static async start(source) {
    const module = await compiled(source);
    const engine = new Engine();
    const instance = await WebAssembly.instantiate(
      module,
      surroundings(() => engine.c.memory),
    );
    engine.c = instance.exports;
    engine.c._initialize();
    return engine;
  }

  get view() {
    return new DataView(this.c.memory.buffer);
  }

  // Calls f; a trap is an error too, after which nothing of the engine may be used.
  guard(f) {
    if (!this.c) throw new LutraError("argument", "the session has been freed");
    try {
      return f(this.c);
    } catch (error) {
      if (!(error instanceof WebAssembly.RuntimeError || error instanceof RangeError)) throw error;
      this.c = null;
      throw new LutraError(
        "internal",
        `the engine stopped (${error.message}); the model file may be damaged, load it again`,
      );
    }
  }

  check(status) {
    if (status === 0) return;
    throw new LutraError(CODES[status] ?? "internal", this.text(this.c.lutra_last_error()));
  }

  text(at) {
    const bytes = new Uint8Array(this.c.memory.buffer, at);
    return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)));
  }

  allocate(size) {
    const at = this.c.malloc(Math.max(size, 1));
    if (at === 0) throw new LutraError("memory", `there is no memory for ${size} bytes`);
    return at;
  }

  // f(place of `size` bytes)
  with(size, f) {
    const at = this.allocate(size);
    try {
      return f(at);
    } finally {
      this.c?.free(at);
    }
  }

  pointer(f) {
    return this.with(4, (at) => {
      this.check(f(at));
      return this.view.getUint32(at, true);
    });
  }

  values(model, kind) {
    return this.with(VALUE_BYTES, (at) =>
      Array.from({ length: this.c[`lutra_${kind}_count`](model) }, (_, index) => {
        this.check(this.c[`lutra_${kind}`](model, index, at));
        const view = this.view;
        const rank = view.getUint32(at + 8, true);
        const sizes = Array.from({ length: rank }, (_, i) =>
          Number(view.getBigInt64(at + 16 + 8 * i, true)),
        );
        return Object.freeze({
          name: this.text(view.getUint32(at, true)),
          dtype: DTYPES[view.getUint32(at + 4, true)][0],
          shape: Object.freeze(sizes.map((size) => (size < 0 ? null : size))),
        });
      }),
    );
  }
}

const arrayOf = (dtype) => (dtype === "int32" ? Int32Array : Float32Array);
const count = (shape) => shape.reduce((product, size) => product * size, 1);
const shapeText = (shape) => `(${shape.map((size) => size ?? "any").join(", ")})`;

// The data and the shape of what was given for an input.
function inputOf(value, given) {
  const { data, shape } = ArrayBuffer.isView(given) || Array.isArray(given) ? { data: given } : (given ?? {});
  const wrong = (what) => {
    throw new LutraError("argument", `input '${value.name}' ${what}`);
  };
  const Type = arrayOf(value.dtype);
  if (data === undefined) wrong("is missing");
  if (!(data instanceof Type) && !Array.isArray(data)) {
    wrong(`is a ${data.constructor?.name ?? typeof data}, and the model takes a ${Type.name}`);
  }
  if (shape !== undefined) {
    const fits = shape.length === value.shape.length &&
      shape.every((size, i) => Number.isInteger(size) && size > 0 && (value.shape[i] ?? size) === size);
    if (!fits) wrong(`has the shape ${shapeText(shape)}, and the model takes ${shapeText(value.shape)}`);
    if (count(shape) !== data.length) {
      wrong(`has ${data.length} values, and the shape ${shapeText(shape)} has ${count(shape)}`);
    }
    return { data, shape };
  }
  const open = value.shape.flatMap((size, i) => (size === null ? [i] : []));
  const known = count(value.shape.map((size) => size ?? 1));
  const rest = data.length / known;
  if (open.length > 1) wrong("has several open sizes: give { data, shape }");
  if (!(open.length === 1 ? Number.isInteger(rest) && rest > 0 : rest === 1)) {
    wrong(`has ${data.length} values, which do not fill the shape ${shapeText(value.shape)}`);
  }
  return { data, shape: value.shape.map((size) => size ?? rest) };
}

function metadataOf(text) {
  try {
    return JSON.parse(text || "{}");
  } catch (error) {
    throw new LutraError("format", `the model's metadata are no JSON: ${error.message}`);
  }
}

/** A model that is ready to run. */
export class Session {
  #engine;
  #model;
  #session;
  #room = []; // of inputs: { at, bytes }

  /** @private Use load(). */
  constructor(engine, model) {
    this.#engine = engine;
    this.#model = model;
    this.inputs = Object.freeze(engine.values(model, "input"));
    this.outputs = Object.freeze(engine.values(model, "output"));
    this.metadata = metadataOf(engine.text(engine.c.lutra_metadata(model)));
    this.isa = engine.text(engine.c.lutra_isa(model));
    this.#session = engine.pointer((at) => engine.c.lutra_session_new(model, at));
  }

  /**
   * Runs the model.
   *
   * With the values of the only input it gives those of the only output; with an object of inputs
   * by name, each an array or { data, shape }, an object of { data, shape } by name.
   */
  async run(x) {
    return this.runSync(x);
  }

  /** The same, at once. */
  runSync(x) {
    const single = ArrayBuffer.isView(x) || Array.isArray(x);
    if (single && (this.inputs.length !== 1 || this.outputs.length !== 1)) {
      const names = this.inputs.map((value) => `'${value.name}'`).join(", ");
      throw new LutraError("argument", `give an object of inputs by name: ${names}`);
    }
    const given = single ? { [this.inputs[0].name]: x } : (x ?? {});
    for (const name of Object.keys(given)) {
      if (!this.inputs.some((value) => value.name === name)) {
        const names = this.inputs.map((value) => `'${value.name}'`).join(", ");
        throw new LutraError("argument", `there is no input '${name}'; the model has ${names}`);
      }
    }
    const feeds = this.inputs.map((value) => inputOf(value, given[value.name]));
    return this.#engine.guard((c) => {
      feeds.forEach((feed, index) => this.#set(c, index, feed));
      this.#engine.check(c.lutra_run(this.#session));
      const made = this.outputs.map((value, index) => this.#output(c, value, index));
      if (single) return made[0].data;
      return Object.fromEntries(this.outputs.map((value, index) => [value.name, made[index]]));
    });
  }

  /** Gives the memory back. Nothing can be run afterwards. */
  free() {
    this.#engine.c = null; // the instance and its memory go with it
  }

  #set(c, index, { data, shape }) {
    const bytes = 4 * data.length;
    if (!this.#room[index] || this.#room[index].bytes < bytes) {
      if (this.#room[index]) c.free(this.#room[index].at);
      this.#room[index] = undefined;
      this.#room[index] = { at: this.#engine.allocate(bytes), bytes };
    }
    const { at } = this.#room[index];
    new (arrayOf(this.inputs[index].dtype))(c.memory.buffer, at, data.length).set(data);
    this.#engine.with(8 * shape.length, (sizes) => {
      const view = this.#engine.view;
      shape.forEach((size, i) => view.setBigInt64(sizes + 8 * i, BigInt(size), true));
      this.#engine.check(c.lutra_set_input(this.#session, index, at, sizes));
    });
  }

  #output(c, value, index) {
    return this.#engine.with(8, (at) => {
      this.#engine.check(c.lutra_get_output(this.#session, index, at, at + 4));
      const view = this.#engine.view;
      const data = view.getUint32(at, true), sizes = view.getUint32(at + 4, true);
      const shape = value.shape.map((_, i) => Number(view.getBigInt64(sizes + 8 * i, true)));
      return { data: new Float32Array(c.memory.buffer, data, count(shape)).slice(), shape };
    });
  }
}

/**
 * Loads a compiled model: a URL or a path (Node), an ArrayBuffer, or a typed array.
 *
 * Options: `wasm`, where the module is (lutra_dot.wasm or lutra.wasm beside this file), `maxMemory`, the bytes that a run may
 * take (2^30), and `allowNonfinite`, to let NaN and infinity in.
 */
export async function load(model, options = {}) {
  const [engine, bytes] = await Promise.all([
    Engine.start(options.wasm ?? bestModule()),
    bytesOf(model),
  ]);
  return engine.guard((c) =>
    engine.with(bytes.length, (data) => {
      new Uint8Array(c.memory.buffer, data, bytes.length).set(bytes);
      const place = engine.with(OPTION_BYTES, (at) => {
        new Uint8Array(c.memory.buffer, at, OPTION_BYTES).fill(0);
        const view = engine.view;
        view.setUint32(at + 4, 1, true);
        view.setUint32(at + 8, options.allowNonfinite ? 1 : 0, true);
        view.setBigUint64(at + 16, BigInt(options.maxMemory ?? DEFAULT_MEMORY), true);
        return engine.pointer((to) => c.lutra_open_memory(data, bytes.length, at, to));
      });
      return new Session(engine, place);
    }),
  );
}

/** The version of lutra. */
export async function version(options = {}) {
  const engine = await Engine.start(options.wasm ?? bestModule());
  return engine.text(engine.c.lutra_version());
}
