import { ReftEdgeError } from "./errors";
import { toFloat32 } from "./half";
import { isObject, type JsonObject } from "./json";

/** How a file stores its tensors (`reft_edge/storage.py` states it): whole, in half precision, or in eight bits with a scale a row. */
export type Store = "fp32" | "fp16" | "int8";

/** A tensor as a file declares it, by its safetensors dtype. */
export interface Declared {
  dtype: "F32" | "F16" | "I8";
  shape: number[];
}

/** Tensors whose rows are of the hidden size. The rest are F32 in every file. */
const ROWS = ["R", "W", "W1", "W2", "v", "s", "head.weight"];
const SCALE = ".scale";
const BYTES = { F32: 4, F16: 2, I8: 1 };

/** The first row tensor's dtype in a file's header tells how the file is stored. */
export function storeOf(entries: JsonObject): Store {
  const first = ROWS.map((name) => entries[name]).find(isObject);
  return first?.dtype === "F16" ? "fp16" : first?.dtype === "I8" ? "int8" : "fp32";
}

/** What a file that stores tensors of these shapes declares. */
export function declared(shapes: Map<string, number[]>, store: Store): Map<string, Declared> {
  const found = new Map<string, Declared>();
  for (const [name, shape] of shapes) {
    if (store === "fp32" || !ROWS.includes(name)) {
      found.set(name, { dtype: "F32", shape });
    } else if (store === "fp16") {
      found.set(name, { dtype: "F16", shape });
    } else {
      found.set(name, { dtype: "I8", shape });
      found.set(name + SCALE, { dtype: "F32", shape: shape.slice(0, -1) });
    }
  }
  return found;
}

/** Bytes of a tensor's data. */
export function dataBytes({ dtype, shape }: Declared): number {
  return BYTES[dtype] * shape.reduce((product, length) => product * length, 1);
}

/**
 * Tensors in float32 from their bytes, which need no alignment.
 *
 * Raises ReftEdgeError for a scale that is negative or not finite, and for a value that is not finite.
 */
export function decode(stored: Map<string, Declared & { bytes: Uint8Array }>): Map<string, Float32Array> {
  const found = new Map<string, Float32Array>();
  for (const [name, { dtype, shape, bytes }] of stored) {
    if (name.endsWith(SCALE)) continue;
    let values: Float32Array;
    if (dtype === "F32") {
      values = new Float32Array(bytes.slice().buffer);
    } else if (dtype === "F16") {
      values = toFloat32(new Uint16Array(bytes.slice().buffer));
    } else {
      const scales = new Float32Array(stored.get(name + SCALE)!.bytes.slice().buffer);
      if (!scales.every((scale) => Number.isFinite(scale) && scale >= 0)) {
        throw new ReftEdgeError(`tensor ${name}${SCALE} holds what is no scale: NaN, infinity or less than 0`);
      }
      const width = shape[shape.length - 1]!;
      values = Float32Array.from(new Int8Array(bytes.slice().buffer), (step, i) => step * scales[Math.floor(i / width)]!);
    }
    if (!values.every(Number.isFinite)) {
      throw new ReftEdgeError(`tensor ${name} holds NaN or infinity; train the adapter again`);
    }
    found.set(name, values);
  }
  return found;
}
