import { ReftEdgeError } from "./errors";
import { type Folder, readText } from "./folder";
import { isObject } from "./json";

/** What `reft_edge.json` says of an exported folder, as far as this loader needs it. */
export interface Manifest {
  base_name: string;
  base_fingerprint: string;
  precision: string;
  hidden_size: number;
  head_size: number;
  /** Tokens. */
  context_length: number;
  eos_token_ids: number[];
  /** Port inputs of the graph and their shapes; names stand for any size. */
  ports: Record<string, (string | number)[]>;
  float_type: "fp32" | "fp16";
  graph: string;
}

const NAME = "reft_edge.json";
const VERSION = 1;

/** Read a folder's manifest. Raises ReftEdgeError unless it is of a decoder that a browser can run. */
export async function loadManifest(folder: Folder): Promise<Manifest> {
  let fields: unknown;
  try {
    fields = JSON.parse(await readText(folder, NAME));
  } catch (error) {
    if (error instanceof ReftEdgeError) {
      throw new ReftEdgeError(
        `${folder.name} is not an exported model (${error.message}); make one with \`reft-edge export\``,
      );
    }
    throw new ReftEdgeError(`${NAME} is not valid JSON; export the model again`);
  }
  if (!isObject(fields) || fields.version !== VERSION) {
    const found = isObject(fields) ? String(fields.version) : "none";
    throw new ReftEdgeError(`${NAME} has version ${found}; this loader reads ${VERSION}: export the model again`);
  }
  const manifest = { float_type: "fp32", kind: "decoder", cache: "shared", graph: "model.onnx", ...fields };
  if (!isManifest(manifest)) throw new ReftEdgeError(`${NAME} is malformed; export the model again`);
  if (manifest.kind !== "decoder") {
    throw new ReftEdgeError(`${manifest.base_name} is not a model that continues text, but of kind ${manifest.kind}`);
  }
  if (manifest.cache === "none") {
    throw new ReftEdgeError(
      `the graph of ${manifest.base_name} has no KV cache; export it with past_key_values inputs`,
    );
  }
  if (!["fp32", "fp16"].includes(manifest.float_type)) {
    throw new ReftEdgeError(
      `${manifest.base_name} is in ${manifest.float_type}, which browsers cannot compute; ` +
        "export with --precision int4, int8, fp16 or fp32",
    );
  }
  return manifest;
}

function isManifest(fields: Record<string, unknown>): fields is Record<string, unknown> & Manifest & {
  kind: string;
  cache: string;
} {
  const isWhole = (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 0;
  const { ports, eos_token_ids: ends } = fields;
  return (
    ["base_name", "base_fingerprint", "precision", "float_type", "kind", "cache", "graph"].every(
      (name) => typeof fields[name] === "string",
    ) &&
    ["hidden_size", "head_size", "context_length"].every((name) => isWhole(fields[name])) &&
    Array.isArray(ends) &&
    ends.every(isWhole) &&
    isObject(ports) &&
    Object.values(ports).every(
      (shape) => Array.isArray(shape) && shape.every((size) => typeof size === "string" || isWhole(size)),
    )
  );
}
