import type * as ort from "onnxruntime-common";

import { ReftEdgeError } from "./errors";
import { type Folder, type Progress, readFile } from "./folder";
import { openPorts } from "./graph";
import { toFloat16, toFloat32 } from "./half";
import type { Manifest } from "./manifest";
import { int64, type PortInputs, type PortValue } from "./ports";
import { unpackWeights } from "./unpack";

/** An ONNX Runtime of JavaScript: the module `onnxruntime-web`, one of its parts, or `onnxruntime-node`. */
export type Runtime = Pick<typeof ort, "InferenceSession" | "Tensor">;

/** Keys and values of one conversation, by the names of the graph's inputs, for `length` tokens. */
export interface KVCache {
  values: Record<string, ort.Tensor>;
  length: number;
}

/** Port inputs as tensors that any number of runs can take. */
export type BoundPorts = Record<string, ort.Tensor>;

const PAST = "past_key_values.";
const PREFILL_CHUNK = 512;

/** An exported graph, ready to prefill and decode one row of tokens. */
export class GraphSession {
  private constructor(
    private readonly runtime: Runtime,
    private readonly session: ort.InferenceSession,
    private readonly manifest: Manifest,
    /** Rank of ports at which nothing acts: 1, with zeros, on WebGPU, which has no empty buffers. */
    readonly emptyRank: 0 | 1,
  ) {}

  /**
   * `unpack`: turn 4- and 8-bit weights to float32 first, as far as memory allows.
   *
   * Raises ReftEdgeError if files are missing or ONNX Runtime cannot load the graph.
   */
  static async open(
    runtime: Runtime,
    folder: Folder,
    manifest: Manifest,
    options: ort.InferenceSession.SessionOptions,
    unpack: boolean,
    progress?: Progress,
  ): Promise<GraphSession> {
    const { model, externalFiles } = openPorts(await readFile(folder, manifest.graph), Object.keys(manifest.ports));
    const files = new Map<string, Uint8Array>();
    for (const path of externalFiles) files.set(path, await readFile(folder, path, progress));
    const unpacked = unpack ? unpackWeights(model, files) : undefined;
    if (unpacked) files.set(unpacked.path, unpacked.data);
    const externalData = [...files].map(([path, data]) => ({ path, data }));
    try {
      const session = await runtime.InferenceSession.create(unpacked?.model ?? model, { ...options, externalData });
      const providers = (options.executionProviders ?? []).map((given) => (typeof given === "string" ? given : given.name));
      return new GraphSession(runtime, session, manifest, providers.includes("webgpu") ? 1 : 0);
    } catch (error) {
      throw new ReftEdgeError(`ONNX Runtime cannot load ${folder.name}: ${firstLine(error)}`);
    }
  }

  emptyCache(): KVCache {
    const values: Record<string, ort.Tensor> = {};
    for (const input of this.session.inputMetadata) {
      if (!input.name.startsWith(PAST) || !input.isTensor) continue;
      const shape = [1, Number(input.shape[1]), 0, this.manifest.head_size];
      values[input.name] =
        input.type === "float16"
          ? new this.runtime.Tensor("float16", new Uint16Array(), shape)
          : new this.runtime.Tensor("float32", new Float32Array(), shape);
    }
    return { values, length: 0 };
  }

  /** Port inputs in the graph's float type. */
  bind(ports: PortInputs): BoundPorts {
    const bound: BoundPorts = {};
    for (const [name, value] of ports) bound[name] = this.tensor(value);
    return bound;
  }

  /** Logits of the last of `ids`, which follow what the cache holds; the cache then holds them too. Raises ReftEdgeError. */
  async run(ids: number[], cache: KVCache, ports: BoundPorts, promptLength: number): Promise<Float32Array> {
    let logits: ort.Tensor | undefined;
    for (let start = 0; start < ids.length; start += PREFILL_CHUNK) {
      logits = await this.step(ids.slice(start, start + PREFILL_CHUNK), cache, ports, promptLength);
    }
    if (logits === undefined) throw new ReftEdgeError("there are no tokens to run; give at least one");
    const vocabulary = logits.dims[2]!;
    const all = logits.data as Float32Array | Uint16Array;
    const last = all.subarray(all.length - vocabulary);
    return logits.type === "float16" ? toFloat32(last) : (last as Float32Array);
  }

  async release(): Promise<void> {
    await this.session.release();
  }

  private async step(
    ids: number[],
    cache: KVCache,
    ports: BoundPorts,
    promptLength: number,
  ): Promise<ort.Tensor> {
    const total = cache.length + ids.length;
    const given: Record<string, () => PortValue> = {
      input_ids: () => ({ data: int64(ids), shape: [1, ids.length] }),
      attention_mask: () => ({ data: new BigInt64Array(total).fill(1n), shape: [1, total] }),
      position_ids: () => ({ data: int64(ids.map((_, i) => cache.length + i)), shape: [1, ids.length] }),
      num_logits_to_keep: () => ({ data: int64([1]), shape: this.shapeOfOnes("num_logits_to_keep") }),
      "reft.prompt_len": () => ({ data: int64([promptLength]), shape: [1] }),
      "reft.logits_to_keep": () => ({ data: int64([1]), shape: [] }),
    };
    const feeds: Record<string, ort.Tensor> = { ...ports, ...cache.values };
    for (const name of this.session.inputNames) {
      const value = given[name];
      if (value !== undefined) feeds[name] = this.tensor(value());
    }
    let outputs: ort.InferenceSession.OnnxValueMapType;
    try {
      outputs = await this.session.run(feeds);
    } catch (error) {
      throw new ReftEdgeError(`ONNX Runtime failed: ${firstLine(error)}`);
    }
    for (const name of Object.keys(cache.values)) {
      cache.values[name]!.dispose();
      cache.values[name] = outputs[name.replace("past_key_values", "present")] as ort.Tensor;
    }
    cache.length = total;
    return outputs.logits as ort.Tensor;
  }

  private tensor({ data, shape }: PortValue): ort.Tensor {
    if (data instanceof BigInt64Array) return new this.runtime.Tensor("int64", data, shape);
    return this.manifest.float_type === "fp16"
      ? new this.runtime.Tensor("float16", toFloat16(data), shape)
      : new this.runtime.Tensor("float32", data, shape);
  }

  private shapeOfOnes(name: string): number[] {
    const input = this.session.inputMetadata.find((value) => value.name === name);
    return input?.isTensor ? input.shape.map(() => 1) : [];
  }
}

function firstLine(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).split("\n")[0]!;
}
