import { readFileSync } from "node:fs";
import { join } from "node:path";

import * as ort from "onnxruntime-web";
import { beforeAll, describe, expect, test } from "vitest";

import { readAdapter } from "../src/adapter";
import { fold } from "../src/algebra";
import { ReftEdgeError } from "../src/errors";
import type { Folder } from "../src/folder";
import { openPorts } from "../src/graph";
import { toFloat16, toFloat32 } from "../src/half";
import { loadManifest, type Manifest } from "../src/manifest";
import { SteeredModel } from "../src/model";
import { parseStrictly } from "../src/json";
import { GRAPH, MODEL, readNode } from "../src/onnx";
import { portInputs } from "../src/ports";
import { inPrompt, parsePositions } from "../src/positions";
import { fields } from "../src/protobuf";
import { unpackWeights } from "../src/unpack";
import { EXPORT, folderOnDisk, readJson, VECTORS, type Vectors } from "./vectors";

const vectors = readJson<Vectors>(join(VECTORS, "vectors.json"));
const folder = folderOnDisk(EXPORT);
const file = (name: string) => new Uint8Array(readFileSync(join(VECTORS, `${name}.safetensors`)));

/** -0 as 0. */
const plain = (value: number | bigint) => Number(value) + 0;

describe("adapter files", () => {
  let manifest: Manifest;
  let model: SteeredModel;
  beforeAll(async () => {
    ort.env.wasm.numThreads = 1;
    manifest = await loadManifest(folder);
    model = await SteeredModel.open(ort, folder);
  });

  test.each(Object.keys(vectors.adapters))("%s gives reft_edge's port inputs, bit for bit", (name) => {
    const inputs = portInputs(fold(readAdapter(file(name), name)), manifest);
    for (const [port, { shape, data }] of Object.entries(vectors.adapters[name]!)) {
      expect(inputs.get(port)?.shape).toEqual(shape);
      expect(Array.from<number | bigint, number>(inputs.get(port)!.data, plain)).toEqual(data.map(plain));
    }
  });

  test.each(Object.entries(vectors.refused))("%s is refused: %s", (name, because) => {
    const error = refusal(() => model.loadAdapter(file(name), `${name}.safetensors`));
    expect(error).toContain(because);
    expect(error.length).toBeLessThan(600);
    expect(model.adapters.has(`${name}.safetensors`)).toBe(false);
  });

  test("a refused file leaves the adapter of its name as it was", () => {
    const config = model.loadAdapter(file("loreft-fp32"), "task");
    refusal(() => model.loadAdapter(file("bad-relu6"), "task"));
    expect(model.adapters.get("task")).toEqual(config);
  });

  test("tensor bytes need no alignment", () => {
    for (const name of ["direft-fp32", "direft-fp16", "direft-int8"]) {
      const shifted = new Uint8Array(file(name).byteLength + 1);
      shifted.set(file(name), 1);
      expect(readAdapter(shifted.subarray(1), "a").tensors).toEqual(readAdapter(file(name), "b").tensors);
    }
  });
});

test.each(vectors.positions)("positions '$spec', tied: $tied", ({ spec, tied, spans, error }) => {
  if (error === undefined) expect(parsePositions(spec, tied)).toEqual(spans);
  else expect(refusal(() => parsePositions(spec, tied))).toContain("positions");
});

test.each(vectors.prompts)("$spec in a prompt of $prompt", ({ spec, prompt, spans }) => {
  expect(parsePositions(spec, false).map((span) => inPrompt(span, prompt))).toEqual(spans);
});

test("half precision", () => {
  const numbers = Float32Array.from(vectors.halves, ([number]) => number);
  const halves = vectors.halves.map(([, half]) => half);
  expect([...toFloat16(numbers)]).toEqual(halves);
  const all = Uint16Array.from({ length: 2 ** 16 }, (_, bits) => bits);
  const numeric = all.filter((bits) => ((bits >> 10) & 31) !== 31);
  expect(toFloat16(toFloat32(numeric))).toEqual(numeric);
});

test("JSON with names that repeat in other objects is fine", () => {
  expect(parseStrictly('{"a": {"b": 1, "a": [{"b": 2}, {"b": 3}]}, "b": 1e3}', "text")).toEqual({
    a: { b: 1, a: [{ b: 2 }, { b: 3 }] },
    b: 1000,
  });
});

describe("the graph", () => {
  const model = new Uint8Array(readFileSync(join(EXPORT, "model.onnx")));

  test("without ports stays as it is", () => {
    const opened = openPorts(model, []);
    expect(Buffer.compare(opened.model, model)).toBe(0);
    expect(opened.externalFiles).toEqual(["model.onnx.data"]);
  });

  test("loses the defaults of its ports, and nothing else", async () => {
    const names = Object.keys((await loadManifest(folder)).ports);
    const opened = openPorts(model, names).model;
    expect(openPorts(opened, names).model).toEqual(opened);
    expect(model.byteLength - opened.byteLength).toBeGreaterThan(20 * names.length);
    expect(model.byteLength - opened.byteLength).toBeLessThan(100 * names.length);
  });

  test.each([0, 1, 100, model.byteLength - 1])("cut off after %i bytes is refused or empty", (size) => {
    if (size === 0) expect(openPorts(model.subarray(0, 0), []).externalFiles).toEqual([]);
    else expect(refusal(() => openPorts(model.subarray(0, size), []))).toContain("not an ONNX model");
  });
});

describe("packed weights", () => {
  const packed = new Uint8Array(readFileSync(join(VECTORS, "products.onnx")));
  const names = Object.keys(vectors.products);

  test("give the same products unpacked", async () => {
    const unpacked = unpackWeights(packed, new Map())!;
    expect(operators(unpacked.model)).toEqual(names.map(() => "MatMul"));
    const session = await ort.InferenceSession.create(unpacked.model, { externalData: [unpacked] });
    const feeds: Record<string, ort.Tensor> = {};
    for (const [name, { x }] of Object.entries(vectors.products)) {
      feeds[`${name}.x`] = new ort.Tensor("float32", Float32Array.from(x), [1, 3, x.length / 3]);
    }
    const found = await session.run(feeds);
    for (const [name, { y }] of Object.entries(vectors.products)) {
      const values = found[`${name}.y`]!.data as Float32Array;
      expect(values.length).toBe(y.length);
      expect(Math.max(...y.map((value, i) => Math.abs(value - values[i]!)))).toBeLessThan(1e-4);
    }
  });

  test("stay packed where their sizes are wrong, where they do not fit, or where there are none", () => {
    const { data } = unpackWeights(packed, new Map())!;
    const first = 4 * 64 * 24;
    const partly = unpackWeights(packed, new Map(), first)!;
    expect(partly.data).toEqual(data.subarray(0, first));
    expect(operators(partly.model)).toEqual(names.map((_, i) => (i === 0 ? "MatMul" : "MatMulNBits")));
    expect(unpackWeights(packed, new Map(), 1000)).toBeUndefined();
    expect(unpackWeights(new Uint8Array(readFileSync(join(EXPORT, "model.onnx"))), new Map())).toBeUndefined();
  });
});

describe("a folder is refused", () => {
  const changed = (changes: Record<string, unknown>): Folder =>
    withFile("reft_edge.json", async () => ({
      ...JSON.parse(readFileSync(join(EXPORT, "reft_edge.json"), "utf-8")),
      ...changes,
    }));
  const withFile = (name: string, content: () => Promise<unknown>): Folder => ({
    name: "folder",
    read: async (asked) =>
      asked === name ? new TextEncoder().encode(JSON.stringify(await content())) : folder.read(asked),
  });

  test.each([
    ["a later version", changed({ version: 2 }), "version 2"],
    ["an encoder", changed({ kind: "encoder" }), "continues text"],
    ["no cache", changed({ cache: "none" }), "no KV cache"],
    ["bf16", changed({ float_type: "bf16" }), "bf16"],
    ["a graph elsewhere", changed({ graph: "../model.onnx" }), "outside itself"],
    ["no graph", changed({ graph: "other.onnx" }), "has no other.onnx"],
    ["malformed ports", changed({ ports: { "reft.first": 3 } }), "malformed"],
    ["malformed ends", changed({ eos_token_ids: ["2"] }), "malformed"],
    ["no manifest", { name: "folder", read: async () => undefined }, "not an exported model"],
    ["a list as tokenizer", withFile("tokenizer.json", async () => []), "not a JSON object"],
    ["an empty tokenizer", withFile("tokenizer.json", async () => ({})), "cannot read the tokenizer"],
  ] satisfies [string, Folder, string][])("with %s", async (_, refused, because) => {
    await expect(SteeredModel.open(ort, refused)).rejects.toThrow(because);
    await expect(SteeredModel.open(ort, refused)).rejects.toBeInstanceOf(ReftEdgeError);
  });

  test("with weights cut off", async () => {
    const cut: Folder = {
      name: "folder",
      read: async (name) => (await folder.read(name))?.slice(0, name.endsWith(".data") ? 100 : undefined),
    };
    await expect(SteeredModel.open(ort, cut)).rejects.toThrow("ONNX Runtime cannot load folder");
  });
});

/** Of a model's nodes. */
function operators(model: Uint8Array): string[] {
  const graph = [...fields(model)].find(({ number }) => number === MODEL.graph)!.content!;
  return [...fields(graph)].filter(({ number }) => number === GRAPH.node).map(({ content }) => readNode(content!).operator);
}

function refusal(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(ReftEdgeError);
    return (error as Error).message;
  }
  throw new Error("it was not refused");
}
