import { ReftEdgeError } from "./errors";
import { isObject, type JsonObject, parseStrictly } from "./json";
import { parsePositions, type Span } from "./positions";
import { dataBytes, type Declared, declared, decode, storeOf } from "./storage";

/** What an adapter is and which base model it belongs to: the description in an adapter file's header. */
export interface AdapterConfig {
  intervention: string;
  base_name: string;
  base_fingerprint: string;
  hidden_size: number;
  /** Layers of the base model. */
  num_layers: number;
  /** Layers that the adapter edits, ascending. */
  layers: number[];
  rank: number;
  positions: string;
  tied: boolean;
  act_fn: string;
  add_bias: boolean;
  prompt_format: "chat" | "raw";
  training: JsonObject;
  labels: string[];
  pooling: string;
  component: string;
}

/** An adapter's description and its unfolded parameters, shaped as `tensorShapes` says. */
export interface Adapter {
  config: AdapterConfig;
  tensors: Map<string, Float32Array>;
}

const FORMAT = "reft-edge";
/** Of a file that stores all as float32, and of one that does not. */
const VERSIONS = ["1", "2"];
const MAX_HEADER = 2 ** 20;
const MAX_DATA = 2 ** 30;
const INTERVENTIONS = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "steering", "red"];
const LINEAR_ONLY = ["consreft", "lobireft", "steering", "red"];
const OF_RANK_1: Record<string, string> = { steering: "a steering vector", red: "an adapter of the kind red" };
const COMPONENTS = ["block", "attention", "mlp"];
const DEFAULTS = {
  positions: "f7+l7",
  tied: false,
  act_fn: "linear",
  add_bias: false,
  prompt_format: "chat",
  training: {},
  labels: [],
  pooling: "",
  component: "block",
};
const REQUIRED = [
  "intervention",
  "base_name",
  "base_fingerprint",
  "hidden_size",
  "num_layers",
  "layers",
  "rank",
];
const LIMITS = { hidden_size: 2 ** 20, num_layers: 2 ** 12, rank: 2 ** 12 };

/**
 * Read and check an adapter file (`reft_edge/adapter.py` states the format); `name` stands for it in messages.
 *
 * The header is checked, against itself and against the file's size, before tensor data is copied. Raises
 * ReftEdgeError that says what is wrong with the file.
 */
export function readAdapter(file: Uint8Array, name: string): Adapter {
  try {
    return parseFile(file);
  } catch (error) {
    if (!(error instanceof ReftEdgeError)) throw error;
    throw new ReftEdgeError(`${name} is not a usable adapter: ${error.message}`);
  }
}

/** Name and shape of every tensor of an adapter. */
export function tensorShapes(config: AdapterConfig): Map<string, number[]> {
  const groups = [config.layers.length, adapterSpans(config).length];
  const vector = [...groups, config.rank];
  const matrix = [...vector, config.hidden_size];
  const shapes = new Map<string, number[]>();
  switch (config.intervention) {
    case "loreft":
    case "direft":
      shapes.set("R", matrix).set("W", matrix).set("b", vector);
      break;
    case "noreft":
    case "nodireft":
      shapes.set("W1", matrix).set("W2", matrix).set("b", vector);
      if (config.add_bias) shapes.set("b2", vector);
      break;
    case "steering":
      shapes.set("v", matrix).set("alpha", vector);
      break;
    case "red":
      shapes.set("s", matrix).set("v", matrix);
      break;
    default:
      shapes.set("R", matrix).set("b", vector);
  }
  if (config.labels.length > 0) {
    shapes.set("head.weight", [config.labels.length, config.hidden_size]);
    shapes.set("head.bias", [config.labels.length]);
  }
  return shapes;
}

/** One gate a position group. */
export function adapterSpans(config: AdapterConfig): Span[] {
  return parsePositions(config.positions, config.tied);
}

function parseFile(file: Uint8Array): Adapter {
  if (file.byteLength < 8) {
    throw new ReftEdgeError(
      "it is shorter than a safetensors header; the file is truncated or of another kind",
    );
  }
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = view.getBigUint64(0, true);
  if (length > MAX_HEADER || length > file.byteLength - 8) {
    throw new ReftEdgeError(
      `its header claims ${length} bytes of a file of ${file.byteLength} (at most ${MAX_HEADER} are accepted); ` +
        "the file is truncated or not a safetensors file",
    );
  }
  const start = 8 + Number(length);
  const { __metadata__: metadata, ...entries } = parseStrictly(decodeText(file.subarray(8, start)), "header");
  const { config, version } = parseMetadata(metadata);
  const layout = checkLayout(entries, config, version, file.byteLength - start);
  const stored = new Map(
    [...layout].map(([name, { begin, end, ...tensor }]) => {
      return [name, { ...tensor, bytes: file.subarray(start + begin, start + end) }];
    }),
  );
  return { config, tensors: decode(stored) };
}

function decodeText(header: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(header);
  } catch {
    throw new ReftEdgeError("its header is not UTF-8");
  }
}

function parseMetadata(metadata: unknown): { config: AdapterConfig; version: string } {
  if (!isObject(metadata) || metadata.format !== FORMAT) {
    throw new ReftEdgeError(
      `its metadata does not say format '${FORMAT}'; train one with \`reft-edge train\``,
    );
  }
  const { version } = metadata;
  if (typeof version !== "string" || !VERSIONS.includes(version)) {
    throw new ReftEdgeError(
      `it has version '${String(version)}' of the format; this loader reads versions ${VERSIONS.join(" and ")}: ` +
        "use a newer one, or train the adapter again",
    );
  }
  if (typeof metadata.adapter !== "string") {
    throw new ReftEdgeError("its metadata has no `adapter` description");
  }
  const fields = parseStrictly(metadata.adapter, "adapter description");
  const unknown = Object.keys(fields).filter((name) => !REQUIRED.includes(name) && !Object.hasOwn(DEFAULTS, name));
  if (unknown.length > 0) {
    throw new ReftEdgeError(`its description has unknown fields ${unknown.sort().slice(0, 8).join(", ")}`);
  }
  const missing = REQUIRED.filter((name) => !Object.hasOwn(fields, name));
  if (missing.length > 0) throw new ReftEdgeError(`its description lacks ${missing.join(", ")}`);
  const config = { ...DEFAULTS, ...fields };
  checkConfig(config);
  return { config, version };
}

function checkConfig(config: JsonObject): asserts config is JsonObject & AdapterConfig {
  const expect = (name: string, fits: boolean, expected: string) => {
    if (!fits) {
      const found = String(JSON.stringify(config[name])).slice(0, 200);
      throw new ReftEdgeError(`${name} is ${found}; expected ${expected}`);
    }
  };
  const isWhole = (value: unknown, least: number, most: number): value is number =>
    Number.isInteger(value) && (value as number) >= least && (value as number) <= most;

  for (const name of ["base_name", "base_fingerprint"]) {
    expect(name, isPlainText(config[name], 0, 200), "plain text of at most 200 characters");
  }
  for (const name of ["tied", "add_bias"]) {
    expect(name, typeof config[name] === "boolean", "true or false");
  }
  for (const [name, most] of Object.entries(LIMITS)) {
    expect(name, isWhole(config[name], 1, most), `a whole number from 1 to ${most}`);
  }
  const { intervention, layers, act_fn, labels } = config;
  const numLayers = config.num_layers as number;
  const rank = config.rank as number;
  expect("intervention", INTERVENTIONS.includes(intervention as string), `one of ${INTERVENTIONS.join(", ")}`);
  const ofRank1 = Object.hasOwn(OF_RANK_1, intervention as string) ? OF_RANK_1[intervention as string] : undefined;
  expect("rank", ofRank1 === undefined || rank === 1, `1, the rank of ${ofRank1}`);
  expect("rank", rank <= (config.hidden_size as number), "no more than the hidden size");
  expect(
    "layers",
    Array.isArray(layers) &&
      layers.length > 0 &&
      layers.every((layer, i) => isWhole(layer, i === 0 ? 0 : layers[i - 1] + 1, numLayers - 1)),
    `layers from 0 to ${numLayers - 1}, ascending without repeats`,
  );
  expect("act_fn", typeof act_fn === "string" && /^[a-z][a-z0-9_]{0,31}$/.test(act_fn), "an activation's name");
  expect("act_fn", !LINEAR_ONLY.includes(intervention as string) || act_fn === "linear", "linear");
  expect("component", COMPONENTS.includes(config.component as string), `one of ${COMPONENTS.join(", ")}`);
  expect("add_bias", !config.add_bias || intervention === "noreft", "false, except for noreft");
  expect("prompt_format", ["chat", "raw"].includes(config.prompt_format as string), "chat or raw");
  expect("training", isObject(config.training), "a JSON object");
  expect(
    "labels",
    Array.isArray(labels) &&
      labels.length !== 1 &&
      labels.length <= 1000 &&
      new Set(labels).size === labels.length &&
      labels.every((label) => isPlainText(label, 1, 200)),
    "2 to 1000 unlike texts of at most 200 characters, or none",
  );
  const poolings = (labels as string[]).length > 0 ? ["cls", "mean"] : [""];
  expect("pooling", poolings.includes(config.pooling as string), poolings.join(" or ") || "no pooling without labels");
  expect("positions", typeof config.positions === "string", "text");
  const spans = parsePositions(config.positions as string, config.tied as boolean);
  expect("positions", isPlainText(config.positions, 0, Infinity), "plain text");
  const triggers = spans.filter(({ trigger }) => trigger !== null);
  expect("positions", triggers.every(({ trigger }) => trigger!.ids.length > 0), "token ids behind each text of a trigger");
}

function isPlainText(value: unknown, least: number, most: number): boolean {
  if (typeof value !== "string" || /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u.test(value)) return false;
  const length = [...value].length;
  return length >= least && length <= most;
}

interface Place extends Declared {
  begin: number;
  end: number;
}

/** The stored tensors and where in the data each lies, in bytes. They fill the data without gaps or overlaps. */
function checkLayout(entries: JsonObject, config: AdapterConfig, version: string, size: number): Map<string, Place> {
  const shapes = tensorShapes(config);
  const expected = declared(shapes, version === "1" ? "fp32" : storeOf(entries));
  const missing = [...expected.keys()].filter((name) => !Object.hasOwn(entries, name));
  const unexpected = Object.keys(entries).filter((name) => !expected.has(name));
  if (missing.length > 0 || unexpected.length > 0) {
    throw new ReftEdgeError(
      `a ${config.intervention} adapter has tensors ${[...expected.keys()].join(", ")}; ` +
        `missing: ${missing.join(", ") || "none"}, unexpected: ${unexpected.sort().slice(0, 8).join(", ") || "none"}`,
    );
  }
  const total = (tensors: Map<string, Declared>) =>
    [...tensors.values()].reduce((sum, tensor) => sum + dataBytes(tensor), 0);
  const needed = total(expected);
  if (needed !== size) {
    throw new ReftEdgeError(
      `its description needs ${needed} bytes of tensors, the file holds ${size}; ` +
        "the file is truncated or its description is wrong",
    );
  }
  const taken = total(declared(shapes, "fp32"));
  if (taken > MAX_DATA) {
    throw new ReftEdgeError(`it takes ${taken} bytes as float32; at most ${MAX_DATA} are accepted`);
  }
  const places = new Map<string, Place>();
  for (const [name, tensor] of expected) {
    const entry = entries[name];
    const wanted = `${tensor.dtype} ${JSON.stringify(tensor.shape)}`;
    const found = isObject(entry) ? `${String(entry.dtype)} ${JSON.stringify(entry.shape)}` : "no tensor";
    if (found !== wanted) throw new ReftEdgeError(`tensor ${name} is declared as ${found}; expected ${wanted}`);
    const place = (entry as JsonObject).data_offsets;
    if (!isRange(place) || place[1] - place[0] !== dataBytes(tensor)) {
      throw new ReftEdgeError(`tensor ${name} lies at ${JSON.stringify(place)}; expected ${dataBytes(tensor)} bytes`);
    }
    places.set(name, { ...tensor, begin: place[0], end: place[1] });
  }
  let filled = 0;
  for (const [name, { begin, end }] of [...places].sort(([, a], [, b]) => a.begin - b.begin)) {
    if (begin !== filled) throw new ReftEdgeError(`tensor ${name} does not begin where the one before it ends`);
    filled = end;
  }
  return places;
}

function isRange(value: unknown): value is [number, number] {
  return Array.isArray(value) && value.length === 2 && value.every(Number.isSafeInteger) && value[0] >= 0;
}
