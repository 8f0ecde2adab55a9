import { fields, text } from "./protobuf";

/** Field numbers of onnx.proto's messages, as far as the loader reads and writes them. */
export const MODEL = { graph: 7 };
export const GRAPH = { node: 1, initializer: 5 };
export const NODE = { input: 1, output: 2, name: 3, operator: 4, attribute: 5 };
export const ATTRIBUTE = { name: 1, integer: 3 };
export const TENSOR = { dimension: 1, dtype: 2, name: 8, raw: 9, externalData: 13, location: 14 };
export const ENTRY = { key: 1, value: 2 };
/** TensorProto.DataType. */
export const FLOAT = 1;
export const UINT8 = 2;
/** TensorProto.DataLocation. */
export const EXTERNAL = 1;

/** An initializer's description. */
export interface Tensor {
  name: string;
  dtype: number;
  /** Of values that lie in the model itself. */
  raw: Uint8Array | undefined;
  /** Of values that do not: the keys `location`, `offset` and `length`. */
  external: Map<string, string>;
}

/** Raises ReftEdgeError if the bytes are no protobuf message. */
export function readTensor(message: Uint8Array): Tensor {
  const tensor: Tensor = { name: "", dtype: 0, raw: undefined, external: new Map() };
  for (const { number, content, value } of fields(message)) {
    if (number === TENSOR.dtype && value !== undefined) tensor.dtype = value;
    if (content === undefined) continue;
    if (number === TENSOR.name) tensor.name = text(content);
    if (number === TENSOR.raw) tensor.raw = content;
    if (number === TENSOR.externalData) {
      const entry = new Map<number, string>();
      for (const part of fields(content)) {
        if (part.content !== undefined) entry.set(part.number, text(part.content));
      }
      tensor.external.set(entry.get(ENTRY.key) ?? "", entry.get(ENTRY.value) ?? "");
    }
  }
  return tensor;
}

/** An operator's use. */
export interface Node {
  operator: string;
  name: string;
  inputs: string[];
  outputs: string[];
  /** Attributes that are whole numbers. */
  attributes: Map<string, number>;
}

/** Raises ReftEdgeError if the bytes are no protobuf message. */
export function readNode(message: Uint8Array): Node {
  const node: Node = { operator: "", name: "", inputs: [], outputs: [], attributes: new Map() };
  for (const { number, content } of fields(message)) {
    if (content === undefined) continue;
    if (number === NODE.input) node.inputs.push(text(content));
    if (number === NODE.output) node.outputs.push(text(content));
    if (number === NODE.name) node.name = text(content);
    if (number === NODE.operator) node.operator = text(content);
    if (number === NODE.attribute) {
      let name = "";
      for (const part of fields(content)) {
        if (part.number === ATTRIBUTE.name && part.content) name = text(part.content);
        if (part.number === ATTRIBUTE.integer && part.value !== undefined) node.attributes.set(name, part.value);
      }
    }
  }
  return node;
}
