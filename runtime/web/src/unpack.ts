import { ENTRY, EXTERNAL, FLOAT, GRAPH, MODEL, NODE, type Node, readNode, readTensor, TENSOR, type Tensor, UINT8 } from "./onnx";
import { delimited, fields, join, wholeNumber } from "./protobuf";

/** A graph, and the external file that it has its unpacked weights in. */
export interface Unpacked {
  model: Uint8Array;
  path: string;
  data: Uint8Array;
}

/** A product with packed weights: `[width, blocks, bytes of a block]`, and a scale and a zero point for each block. */
interface Packed {
  depth: number;
  width: number;
  bits: 4 | 8;
  blockSize: number;
  weights: Uint8Array;
  scales: Float32Array;
  zeroPoints: Uint8Array | undefined;
}

const PATH = "reft-edge-unpacked";
/** Bytes of unpacked weights; they stand twice in memory while a session starts, and a WebAssembly memory ends at 4 GiB. */
const LIMIT = 1.5 * 2 ** 30;

/**
 * The graph with plain float32 products in place of its 4- and 8-bit ones (MatMulNBits), as many as `limit` bytes hold.
 *
 * onnxruntime-web has no CPU kernels for packed weights: it unpacks them at every run; this does it once. `files` are the
 * graph's external ones. Products of other kinds (float16 scales, a bias, permuted groups) stay as they are, and nothing
 * comes back if all do. The operator is described in onnxruntime's docs/ContribOperators.md.
 */
export function unpackWeights(
  model: Uint8Array,
  files: ReadonlyMap<string, Uint8Array>,
  limit = LIMIT,
): Unpacked | undefined {
  const unpacked: Packed[] = [];
  const rewritten = [...fields(model)].map((field) => {
    if (field.number !== MODEL.graph || field.content === undefined) return field.whole;
    const graph = withPlainProducts(field.content, files, limit);
    unpacked.push(...graph.unpacked);
    return delimited(MODEL.graph, graph.content);
  });
  if (unpacked.length === 0) return undefined;
  const data = new Float32Array(unpacked.reduce((sum, { depth, width }) => sum + depth * width, 0));
  let at = 0;
  for (const packed of unpacked) {
    const length = packed.depth * packed.width;
    unpack(packed, data.subarray(at, at + length));
    at += length;
  }
  return { model: join(rewritten), path: PATH, data: new Uint8Array(data.buffer) };
}

/** A graph with plain products, without the packed values that only those used, and what these were. */
function withPlainProducts(
  graph: Uint8Array,
  files: ReadonlyMap<string, Uint8Array>,
  limit: number,
): { content: Uint8Array; unpacked: Packed[] } {
  const parts = [...fields(graph)].map(({ number, content, whole }) => ({
    whole,
    tensor: number === GRAPH.initializer && content ? readTensor(content) : undefined,
    node: number === GRAPH.node && content ? readNode(content) : undefined,
  }));
  const tensors = new Map(parts.map(({ tensor }) => [tensor?.name, tensor]));
  const unpacked: Packed[] = [];
  const added: Uint8Array[] = [];
  const replaced = new Set<string>();
  const used = new Set<string>();
  let size = 0;
  for (const part of parts) {
    const { node } = part;
    if (node === undefined) continue;
    const packed = findPacked(node, (name) => valuesOf(tensors.get(name), files));
    const bytes = packed ? 4 * packed.depth * packed.width : 0;
    if (packed === undefined || size + bytes > limit) {
      for (const name of node.inputs) used.add(name);
      continue;
    }
    const name = `${PATH}.${unpacked.length}`;
    part.whole = delimited(GRAPH.node, plainProduct(node, name));
    added.push(delimited(GRAPH.initializer, externalTensor(name, [packed.depth, packed.width], size, bytes)));
    unpacked.push(packed);
    for (const input of node.inputs.slice(1)) replaced.add(input);
    size += bytes;
  }
  const kept = parts.filter(({ tensor }) => !tensor || used.has(tensor.name) || !replaced.has(tensor.name));
  return { content: join([...kept.map(({ whole }) => whole), ...added]), unpacked };
}

interface Values {
  dtype: number;
  bytes: Uint8Array;
}

function valuesOf(tensor: Tensor | undefined, files: ReadonlyMap<string, Uint8Array>): Values | undefined {
  if (tensor === undefined) return undefined;
  const { dtype, external } = tensor;
  const location = external.get("location");
  if (location === undefined) return tensor.raw && { dtype, bytes: tensor.raw };
  const offset = Number(external.get("offset") ?? 0);
  const bytes = files.get(location)?.subarray(offset, offset + Number(external.get("length")));
  return bytes && { dtype, bytes };
}

/** What `unpack` needs, if the node is a product that it knows and its values have the sizes that they should have. */
function findPacked(node: Node, values: (name: string) => Values | undefined): Packed | undefined {
  if (node.operator !== "MatMulNBits" || node.inputs.slice(4).some((name) => name !== "")) return undefined;
  const attribute = (name: string) => node.attributes.get(name) ?? 0;
  const [depth, width, blockSize] = [attribute("K"), attribute("N"), attribute("block_size")];
  const bits = node.attributes.get("bits") ?? 4;
  const [weights, scales, zeroPoints] = node.inputs.slice(1, 4).map(values);
  if ((bits !== 4 && bits !== 8) || depth < 1 || width < 1 || blockSize < 1) return undefined;
  if (node.inputs[3] && zeroPoints?.dtype !== UINT8) return undefined;
  const blocks = Math.ceil(depth / blockSize);
  const fits =
    weights?.dtype === UINT8 &&
    weights.bytes.byteLength === (width * blocks * blockSize * bits) / 8 &&
    scales?.dtype === FLOAT &&
    scales.bytes.byteLength === 4 * width * blocks &&
    (zeroPoints === undefined || zeroPoints.bytes.byteLength === width * Math.ceil((blocks * bits) / 8));
  if (!fits) return undefined;
  return {
    depth,
    width,
    bits,
    blockSize,
    weights: weights.bytes,
    scales: new Float32Array(scales.bytes.slice().buffer),
    zeroPoints: zeroPoints?.bytes,
  };
}

/** Writes the weights into `plain`, `[depth, width]`: (stored number - zero point) x scale. */
function unpack({ depth, width, bits, blockSize, weights, scales, zeroPoints }: Packed, plain: Float32Array): void {
  const blocks = Math.ceil(depth / blockSize);
  const rowBytes = (blocks * blockSize * bits) / 8;
  const zeroBytes = Math.ceil((blocks * bits) / 8);
  const number = bits === 4 ? nibble : (bytes: Uint8Array, row: number, i: number) => bytes[row + i]!;
  for (let block = 0; block < blocks; block++) {
    const end = Math.min(depth, (block + 1) * blockSize);
    for (let column = 0; column < width; column++) {
      const scale = scales[column * blocks + block]!;
      const zero = zeroPoints ? number(zeroPoints, column * zeroBytes, block) : 1 << (bits - 1);
      for (let i = block * blockSize; i < end; i++) {
        plain[i * width + column] = (number(weights, column * rowBytes, i) - zero) * scale;
      }
    }
  }
}

/** Number `i` of those that begin at byte `row`, the lower half of a byte first. */
function nibble(bytes: Uint8Array, row: number, i: number): number {
  return (bytes[row + (i >> 1)]! >> (4 * (i & 1))) & 15;
}

function plainProduct(node: Node, weights: string): Uint8Array {
  return join([
    delimited(NODE.input, node.inputs[0]!),
    delimited(NODE.input, weights),
    delimited(NODE.output, node.outputs[0]!),
    delimited(NODE.name, node.name),
    delimited(NODE.operator, "MatMul"),
  ]);
}

function externalTensor(name: string, shape: number[], offset: number, length: number): Uint8Array {
  const entry = (key: string, value: string) => delimited(TENSOR.externalData, join([delimited(ENTRY.key, key), delimited(ENTRY.value, value)]));
  return join([
    ...shape.map((size) => wholeNumber(TENSOR.dimension, size)),
    wholeNumber(TENSOR.dtype, FLOAT),
    delimited(TENSOR.name, name),
    entry("location", PATH),
    entry("offset", String(offset)),
    entry("length", String(length)),
    wholeNumber(TENSOR.location, EXTERNAL),
  ]);
}
