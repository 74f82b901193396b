/** An input or an output of a model. `null` is a size that is open: the batch on axis 0. */
export interface Value {
  readonly name: string;
  readonly dtype: "float32" | "int32";
  readonly shape: readonly (number | null)[];
}

/** What was wrong: an argument, the file, its format, an input, memory; or a mistake of lutra. */
export type ErrorCode = "argument" | "file" | "format" | "cpu" | "input" | "memory" | "internal";

/** An error of the engine, in one sentence. */
export class LutraError extends Error {
  readonly code: ErrorCode;
  constructor(code: ErrorCode, message: string);
}

/** The values of an input. A plain array is converted. */
export type Values = Float32Array | Int32Array | number[];

/** Values and their shape, C-contiguous. */
export interface Tensor<Data = Float32Array> {
  data: Data;
  shape: number[];
}

/** Inputs by name. Without a shape, the number of values tells the one size that is open. */
export type Feeds = Record<string, Values | Tensor<Values>>;

export interface LoadOptions {
  /**
   * Where the module is, its bytes, or the compiled module. Default: beside lutra.js lutra_dot.wasm
   * where there is relaxed SIMD, and else lutra.wasm.
   */
  wasm?: string | URL | ArrayBuffer | Uint8Array | WebAssembly.Module;
  /** Bytes of working memory and outputs that a run may take. Default: 2^30. */
  maxMemory?: number;
  /** Let NaN and infinity in. Default: false. */
  allowNonfinite?: boolean;
}

/** A model that is ready to run. */
export class Session {
  private constructor();
  readonly inputs: readonly Value[];
  readonly outputs: readonly Value[];
  /** What the file says about the model: classes, preprocess, ... */
  readonly metadata: Record<string, unknown>;
  /** The instruction set in use: "wasm" or "wasm_dot". */
  readonly isa: string;
  /** Runs a model of one input and one output. */
  run(x: Values): Promise<Float32Array>;
  /** Runs any model. */
  run(x: Feeds): Promise<Record<string, Tensor>>;
  /** The same, at once. */
  runSync(x: Values): Float32Array;
  runSync(x: Feeds): Record<string, Tensor>;
  /** Gives the memory back. Nothing can be run afterwards. */
  free(): void;
}

/**
 * Loads a compiled model (`lutra compile model.lutra`).
 *
 * @param model URL, path (in Node), or the bytes.
 * @throws LutraError if the file cannot be had, is damaged, or is of another version.
 */
export function load(
  model: string | URL | ArrayBuffer | Uint8Array,
  options?: LoadOptions,
): Promise<Session>;

/** The version of lutra. */
export function version(options?: Pick<LoadOptions, "wasm">): Promise<string>;
