import { GRAPH, MODEL, readTensor } from "./onnx";
import { delimited, fields, join } from "./protobuf";

/** A graph for onnxruntime-web and the files that hold its weights. */
export interface OpenedGraph {
  model: Uint8Array;
  externalFiles: string[];
}

/**
 * An exported graph whose ports are plain inputs.
 *
 * In an exported folder a port is a graph input with a default, an initializer of the same name. onnxruntime-web
 * refuses values for such inputs, so the defaults of `ports` are left out of the model here; every run must then feed
 * them.
 *
 * Raises ReftEdgeError if the bytes are not an ONNX model.
 */
export function openPorts(model: Uint8Array, ports: Iterable<string>): OpenedGraph {
  const opened = new Set(ports);
  const files = new Set<string>();
  const kept: Uint8Array[] = [];
  for (const field of fields(model)) {
    if (field.number !== MODEL.graph || field.content === undefined) {
      kept.push(field.whole);
      continue;
    }
    const graph: Uint8Array[] = [];
    for (const part of fields(field.content)) {
      if (part.number === GRAPH.initializer && part.content !== undefined) {
        const { name, external } = readTensor(part.content);
        if (opened.has(name)) continue;
        const file = external.get("location");
        if (file !== undefined) files.add(file);
      }
      graph.push(part.whole);
    }
    kept.push(delimited(MODEL.graph, join(graph)));
  }
  return { model: join(kept), externalFiles: [...files] };
}
