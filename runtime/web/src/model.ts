import type * as ort from "onnxruntime-common";

import { type AdapterConfig, readAdapter } from "./adapter";
import { concat, type Edit, editInPrompt, fold, hasTrigger, onGenerated, scale } from "./algebra";
import { ReftEdgeError } from "./errors";
import type { Folder, Progress } from "./folder";
import { loadManifest, type Manifest } from "./manifest";
import { emptyPorts, portInputs } from "./ports";
import { type Message, Prompts } from "./prompts";
import { type BoundPorts, GraphSession, type Runtime } from "./session";
import { TextStream } from "./text";

export interface OpenOptions {
  /** Passed on to ONNX Runtime; `{ executionProviders: ["webgpu"] }`, for example. */
  session?: ort.InferenceSession.SessionOptions;
  /**
   * Turn 4- and 8-bit weights to float32 when the model is opened; by default they stay packed. For onnxruntime-web on a
   * CPU, which unpacks them for every token otherwise. It takes 4 bytes a weight; what is over 1.5 GiB stays packed.
   */
  unpack?: boolean;
  /** Called while the weights are read. */
  progress?: Progress;
}

export interface StreamOptions {
  /** Adapters by name and their scales; none by default. */
  adapters?: Record<string, number>;
  /**
   * Whether the prompt goes to the model as it stands. By default what the adapters were trained with; without
   * an adapter, the chat template if there is one.
   */
  raw?: boolean;
  /** At most that many new tokens. */
  maxTokens?: number;
  /** Ends the answer early. */
  signal?: AbortSignal;
}

/** What is known when an answer has ended. */
export interface Finished {
  /** Generated tokens, the end-of-sequence token left out. */
  tokens: number[];
  promptTokens: number;
  /** `stop`: the model ended it; `length`: it reached maxTokens or the context's end; `aborted`: by the signal. */
  reason: "stop" | "length" | "aborted";
  /** Of the prompt's pass, until the first token is known. */
  prefillSeconds: number;
  decodeSeconds: number;
}

/** A piece of an answer as it comes: text that is complete, and the token that completed it. */
export type Generation = AsyncGenerator<string, Finished, void>;

interface Loaded {
  config: AdapterConfig;
  edit: Edit;
}

interface Bound {
  prompt: BoundPorts;
  decode: BoundPorts;
}

/** An exported folder in one ONNX Runtime session; adapters are loaded by name and chosen per answer. */
export class SteeredModel {
  private readonly loaded = new Map<string, Loaded>();
  private readonly nothing: BoundPorts;
  private lastBound: { key: string; bound: Bound } | undefined;
  private running: Promise<unknown> = Promise.resolve();

  private constructor(
    readonly manifest: Manifest,
    private readonly prompts: Prompts,
    private readonly graph: GraphSession,
  ) {
    this.nothing = graph.bind(emptyPorts(manifest, graph.emptyRank));
  }

  /**
   * `runtime`: the module `onnxruntime-web` (or `onnxruntime-node`), loaded and set up by the caller.
   *
   * Raises ReftEdgeError if the folder is not an exported decoder or cannot be loaded.
   */
  static async open(runtime: Runtime, folder: Folder, options: OpenOptions = {}): Promise<SteeredModel> {
    const manifest = await loadManifest(folder);
    const prompts = await Prompts.load(folder);
    const { session = {}, unpack = false, progress } = options;
    const graph = await GraphSession.open(runtime, folder, manifest, session, unpack, progress);
    return new SteeredModel(manifest, prompts, graph);
  }

  /** Descriptions of the loaded adapters by name. */
  get adapters(): ReadonlyMap<string, AdapterConfig> {
    return new Map([...this.loaded].map(([name, { config }]) => [name, config]));
  }

  /**
   * Read, check and fold an adapter file; a name that is loaded already is replaced.
   *
   * Raises ReftEdgeError for a malformed file, another base model, a layer without a port, an act_fn that no port
   * carries, or a classification head.
   */
  loadAdapter(file: Uint8Array, name: string): AdapterConfig {
    const adapter = readAdapter(file, name);
    const { config } = adapter;
    if (config.base_fingerprint !== this.manifest.base_fingerprint) {
      throw new ReftEdgeError(
        `${name} was trained on another base model: on ${config.base_name} with fingerprint ` +
          `${config.base_fingerprint}, while this folder holds ${this.manifest.base_name} with fingerprint ` +
          `${this.manifest.base_fingerprint}; export that base, or train the adapter on this one`,
      );
    }
    if (config.labels.length > 0) {
      throw new ReftEdgeError(`${name} classifies texts with a head of its own; this model continues text`);
    }
    const edit = fold(adapter);
    portInputs(edit, this.manifest);
    this.unloadAdapter(name);
    this.loaded.set(name, { config, edit });
    return config;
  }

  /** Forget an adapter; nothing happens if there is none of that name. */
  unloadAdapter(name: string): void {
    this.loaded.delete(name);
    this.lastBound = undefined;
  }

  /** A prompt's tokens, as `stream` makes them. Raises ReftEdgeError as `stream` does. */
  encode(prompt: string | Message[], options: Pick<StreamOptions, "adapters" | "raw"> = {}): number[] {
    const names = Object.keys(options.adapters ?? {});
    const raw = options.raw ?? this.choosesRaw(names);
    if (typeof prompt !== "string") {
      if (raw) throw new ReftEdgeError("a list of messages needs the chat template; give raw prompts as one string");
      return this.prompts.encodeChat(prompt);
    }
    return raw ? this.prompts.encodeRaw(prompt) : this.prompts.encodeChat([{ role: "user", content: prompt }]);
  }

  /**
   * The likeliest answer, piece by piece. Answers may be read side by side: their runs take turns.
   *
   * Raises ReftEdgeError for an unknown adapter, or a prompt that is empty or leaves no room in the context.
   */
  async *stream(prompt: string | Message[], options: StreamOptions = {}): Generation {
    const ids = this.encode(prompt, options);
    const bound = this.bind(options.adapters ?? {}, ids);
    const room = this.manifest.context_length - ids.length;
    if (ids.length === 0) throw new ReftEdgeError("the prompt is empty; give at least one token");
    if (room < 1) {
      throw new ReftEdgeError(
        `the prompt has ${ids.length} tokens, which leaves no room in this model's context of ` +
          `${this.manifest.context_length}`,
      );
    }
    const limit = Math.min(options.maxTokens ?? 256, room);
    const cache = this.graph.emptyCache();
    const text = new TextStream(this.prompts);
    const finished: Finished = {
      tokens: [],
      promptTokens: ids.length,
      reason: "stop",
      prefillSeconds: 0,
      decodeSeconds: 0,
    };
    const next = async (given: number[], ports: BoundPorts): Promise<[number, number]> => {
      const run = this.running.then(async () => {
        const started = performance.now();
        const logits = await this.graph.run(given, cache, ports, ids.length);
        const seconds = (performance.now() - started) / 1000;
        await otherTasks();
        return [likeliest(logits), seconds] as [number, number];
      });
      this.running = run.catch(() => undefined);
      return run;
    };

    if (options.signal?.aborted) return { ...finished, reason: "aborted" };
    let [token, seconds] = await next(ids, bound.prompt);
    finished.prefillSeconds = seconds;
    while (!this.manifest.eos_token_ids.includes(token)) {
      finished.tokens.push(token);
      const piece = text.push(token);
      if (piece !== "") yield piece;
      if (options.signal?.aborted) {
        finished.reason = "aborted";
        break;
      }
      if (finished.tokens.length >= limit) {
        finished.reason = "length";
        break;
      }
      [token, seconds] = await next([token], bound.decode);
      finished.decodeSeconds += seconds;
    }
    const rest = text.flush();
    if (rest !== "") yield rest;
    return finished;
  }

  /** The whole answer. */
  async generate(prompt: string | Message[], options: StreamOptions = {}): Promise<string> {
    let answer = "";
    for await (const piece of this.stream(prompt, options)) answer += piece;
    return answer;
  }

  /** Logits `[vocabulary]` after a row of tokens, all of them prompt. */
  async logits(ids: number[], adapters: Record<string, number> = {}): Promise<Float32Array> {
    return this.graph.run(ids, this.graph.emptyCache(), this.bind(adapters, ids).prompt, ids.length);
  }

  /** Give the session's memory back; the model cannot be used any more. */
  async release(): Promise<void> {
    await this.running;
    await this.graph.release();
  }

  private choosesRaw(names: string[]): boolean {
    const formats = new Set(names.map((name) => this.find(name).config.prompt_format));
    if (formats.size > 1) {
      throw new ReftEdgeError(
        "the adapters were trained on different prompts, some raw, some through the chat template; say which to use",
      );
    }
    const [format] = formats;
    return format === undefined ? !this.prompts.hasTemplate : format === "raw";
  }

  private bind(adapters: Record<string, number>, ids: number[]): Bound {
    const acting = Object.entries(adapters).filter(([name, factor]) => {
      this.find(name);
      if (!Number.isFinite(factor)) {
        throw new ReftEdgeError(`the scale of adapter '${name}' is ${factor}; expected a finite number`);
      }
      return factor !== 0;
    });
    if (acting.length === 0) return { prompt: this.nothing, decode: this.nothing };
    const triggered = acting.some(([name]) => hasTrigger(this.find(name).edit));
    const key = JSON.stringify(triggered ? [acting, ids] : acting);
    if (this.lastBound?.key !== key) {
      const together = concat(acting.map(([name, factor]) => scale(this.find(name).edit, factor)));
      const edit = editInPrompt(together, ids);
      const prompt = this.graph.bind(portInputs(edit, this.manifest, this.graph.emptyRank));
      this.lastBound = { key, bound: { prompt, decode: onGenerated(edit) ? prompt : this.nothing } };
    }
    return this.lastBound.bound;
  }

  private find(name: string): Loaded {
    const found = this.loaded.get(name);
    if (found === undefined) {
      const names = [...this.loaded.keys()].join(", ") || "none";
      throw new ReftEdgeError(`no adapter '${name}' is loaded; loaded: ${names}`);
    }
    return found;
  }
}

function likeliest(logits: Float32Array): number {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i]! > logits[best]!) best = i;
  return best;
}

/** Let waiting events, a click on a stop button among them, be handled: WebAssembly runs give no time to them. */
function otherTasks(): Promise<void> {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
