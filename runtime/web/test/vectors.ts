import { readFileSync } from "node:fs";
import { basename, join } from "node:path";

import type { Folder } from "../src/folder";

/** What `test/vectors.py` writes. */
export interface Vectors {
  /** Port inputs by adapter. */
  adapters: Record<string, Record<string, { shape: number[]; data: number[] }>>;
  /** What the refusal of a file says. */
  refused: Record<string, string>;
  prompts: { spec: string; prompt: number[]; spans: object[] }[];
  positions: { spec: string; tied: boolean; spans?: object[]; error?: string }[];
  /** float32 numbers and their binary16 bits. */
  halves: [number, number][];
  /** Inputs and outputs of the products of packed weights in `products.onnx`, 3 rows each. */
  products: Record<string, { x: number[]; y: number[] }>;
}

/** What `test/answers.py` writes. */
export interface Answers {
  max_tokens: number;
  answers: {
    adapters: Record<string, number>;
    prompt: string;
    ids: number[];
    tokens: number[];
    text: string;
    reason: string;
    logits: number[];
  }[];
  encoded: { text: string; raw: number[]; chat: number[] }[];
}

/** Where `test.sh` put the exported folder, the vectors, the answers, and the adapters that these name. */
export const EXPORT = required("REFT_WEB_EXPORT");
export const VECTORS = required("REFT_WEB_VECTORS");
export const ANSWERS = required("REFT_WEB_ANSWERS");
export const ADAPTERS = required("REFT_WEB_ADAPTERS").split(" ");

export function readJson<T>(path: string): T {
  return JSON.parse(readFileSync(path, "utf-8")) as T;
}

/** A folder on this machine's disk. */
export function folderOnDisk(path: string): Folder {
  return {
    name: path,
    read: async (file) => {
      try {
        return new Uint8Array(readFileSync(join(path, file)));
      } catch {
        return undefined;
      }
    },
  };
}

export function stem(path: string): string {
  return basename(path, ".safetensors");
}

function required(name: string): string {
  const value = process.env[name];
  if (value === undefined) throw new Error(`${name} is not set; run runtime/web/test.sh`);
  return value;
}
