import { ReftEdgeError } from "./errors";

/** A graph for onnxruntime-web and the files that hold its weights. */
export interface OpenedGraph {
  model: Uint8Array;
  externalFiles: string[];
}

const MODEL_GRAPH = 7;
const GRAPH_INITIALIZER = 5;
const TENSOR_NAME = 8;
const TENSOR_EXTERNAL_DATA = 13;
const ENTRY_KEY = 1;
const ENTRY_VALUE = 2;
const LENGTH_DELIMITED = 2;

/**
 * An exported graph whose ports are plain inputs.
 *
 * In an exported folder a port is a graph input with a default, an initializer of the same name. onnxruntime-web
 * refuses values for such inputs, so the defaults of `ports` are left out of the model here; every run must then feed
 * them. Fields as in onnx.proto: ModelProto, GraphProto, TensorProto, StringStringEntryProto.
 *
 * Raises ReftEdgeError if the bytes are not an ONNX model.
 */
export function openPorts(model: Uint8Array, ports: Iterable<string>): OpenedGraph {
  const opened = new Set(ports);
  const files = new Set<string>();
  const kept: Uint8Array[] = [];
  for (const field of fields(model)) {
    if (field.number !== MODEL_GRAPH || field.content === undefined) {
      kept.push(field.whole);
      continue;
    }
    const graph: Uint8Array[] = [];
    for (const part of fields(field.content)) {
      if (part.number === GRAPH_INITIALIZER && part.content !== undefined) {
        const { name, file } = describeTensor(part.content);
        if (opened.has(name)) continue;
        if (file !== undefined) files.add(file);
      }
      graph.push(part.whole);
    }
    const size = graph.reduce((sum, part) => sum + part.byteLength, 0);
    kept.push(Uint8Array.of(...varint(MODEL_GRAPH * 8 + LENGTH_DELIMITED), ...varint(size)), ...graph);
  }
  return { model: join(kept), externalFiles: [...files] };
}

function describeTensor(tensor: Uint8Array): { name: string; file?: string } {
  let name = "";
  let file: string | undefined;
  for (const field of fields(tensor)) {
    if (field.content === undefined) continue;
    if (field.number === TENSOR_NAME) name = text(field.content);
    if (field.number === TENSOR_EXTERNAL_DATA) {
      const entry = new Map<number, string>();
      for (const part of fields(field.content)) {
        if (part.content !== undefined) entry.set(part.number, text(part.content));
      }
      if (entry.get(ENTRY_KEY) === "location") file = entry.get(ENTRY_VALUE);
    }
  }
  return file === undefined ? { name } : { name, file };
}

interface Field {
  number: number;
  /** Tag and content. */
  whole: Uint8Array;
  /** Of a length-delimited field. */
  content?: Uint8Array;
}

/** The fields of one protobuf message, in order (https://protobuf.dev/programming-guides/encoding/). */
function* fields(message: Uint8Array): Generator<Field> {
  let at = 0;
  const number = (): number => {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      const byte = message[at++];
      if (byte === undefined) break;
      value += (byte & 127) * 2 ** shift;
      if (byte < 128) return value;
    }
    throw new ReftEdgeError("the graph is not an ONNX model; export the model again");
  };
  while (at < message.byteLength) {
    const start = at;
    const tag = number();
    let content: Uint8Array | undefined;
    switch (tag % 8) {
      case 0:
        number();
        break;
      case 1:
        at += 8;
        break;
      case LENGTH_DELIMITED: {
        const size = number();
        content = message.subarray(at, at + size);
        at += size;
        break;
      }
      case 5:
        at += 4;
        break;
      default:
        at = Infinity;
    }
    if (at > message.byteLength) {
      throw new ReftEdgeError("the graph is not an ONNX model, or truncated; export the model again");
    }
    const field = { number: Math.floor(tag / 8), whole: message.subarray(start, at) };
    yield content === undefined ? field : { ...field, content };
  }
}

function varint(value: number): number[] {
  const bytes: number[] = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return [...bytes, value];
}

function text(content: Uint8Array): string {
  return new TextDecoder().decode(content);
}

function join(parts: Uint8Array[]): Uint8Array {
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.byteLength;
  }
  return joined;
}
