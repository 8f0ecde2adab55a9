import { ACTS, type Edit, hasTrigger } from "./algebra";
import { ReftEdgeError } from "./errors";
import type { Manifest } from "./manifest";
import { inPrompt } from "./positions";

/** A value for a graph's input, row-major. */
export interface PortValue {
  data: Float32Array | BigInt64Array;
  shape: number[];
}

export type PortInputs = Map<string, PortValue>;

/**
 * Every port's value under which the graph computes what it did without ports: of rank 0, or with `rank` closed columns
 * of zeros, for kernels that cannot do with empty tensors.
 */
export function emptyPorts(manifest: Manifest, rank = 0): PortInputs {
  const inputs: PortInputs = new Map();
  for (const [name, shape] of Object.entries(manifest.ports)) {
    if (!isEdit(name)) continue;
    const sizes = shape.map((size) => (typeof size === "number" ? size : size === "adapter_batch" ? 1 : rank));
    const count = sizes.reduce((product, size) => product * size, 1);
    const data = isFloat(name) ? new Float32Array(count) : new BigInt64Array(count);
    inputs.set(name, { data, shape: sizes });
  }
  return inputs;
}

/**
 * Every port's value under an edit, with adapter_batch 1 (`reft_edge/runtime/binding.py`); `emptyRank` is that of
 * places where nothing acts. Gates with triggers are shut: `editInPrompt` opens them.
 *
 * Raises ReftEdgeError if the edit is for another hidden size, a place without a port of its kind, or positions that the graph does not
 * know.
 */
export function portInputs(edit: Edit, manifest: Manifest, emptyRank = 0): PortInputs {
  const d = manifest.hidden_size;
  if (edit.hiddenSize !== d) {
    throw new ReftEdgeError(
      `the adapter edits hidden states of size ${edit.hiddenSize}; this model's have ${d}`,
    );
  }
  const unported = [...edit.places.keys()].filter((place) => !Object.hasOwn(manifest.ports, `${place}.A`));
  if (unported.length > 0) {
    throw new ReftEdgeError(
      `the adapter edits ${unported.join(", ")}, which have no port in this folder; ` +
        "export the model again with --layers and --components that cover them",
    );
  }
  checkKinds(edit, manifest);
  const inputs = emptyPorts(manifest, emptyRank);
  const perGate = [1, 1, edit.gates.length];
  const spans = edit.gates.map(({ span }) => (span.trigger === null ? span : inPrompt(span, [])));
  for (const name of ["first", "last", "after"] as const) {
    inputs.set(`reft.${name}`, { data: int64(spans.map((span) => span[name])), shape: perGate });
  }
  for (const name of ["skip_first", "skip_last"] as const) {
    const counts = spans.map((span) => span[name]);
    if (Object.hasOwn(manifest.ports, `reft.${name}`)) {
      inputs.set(`reft.${name}`, { data: int64(counts), shape: perGate });
    } else if (counts.some((count) => count > 0) || hasTrigger(edit)) {
      throw new ReftEdgeError(
        "the adapter leaves out tokens of the prompt (positions such as all-f1, or those of a trigger), for which this folder " +
          `has no reft.${name}; ` +
          "export the model again",
      );
    }
  }
  inputs.set("reft.scale", { data: Float32Array.from(edit.gates, (gate) => gate.scale), shape: perGate });
  for (const [place, part] of edit.places) {
    const r = part.b.length;
    inputs.set(`${place}.A`, { data: part.A, shape: [1, d, r] });
    inputs.set(`${place}.b`, { data: part.b, shape: [1, 1, r] });
    inputs.set(`${place}.B`, { data: part.B, shape: [1, r, d] });
    inputs.set(`${place}.columns`, { data: int64(part.gates), shape: [r] });
    if (Object.hasOwn(manifest.ports, `${place}.acts`)) {
      inputs.set(`${place}.acts`, { data: int64(part.acts.map((act, column) => act * r + column)), shape: [r] });
    }
    const rows = part.sGates.length;
    if (rows > 0) {
      inputs.set(`${place}.s`, { data: part.s, shape: [1, rows, d] });
      inputs.set(`${place}.s_columns`, { data: int64(part.sGates), shape: [rows] });
    }
  }
  return inputs;
}

function checkKinds(edit: Edit, manifest: Manifest): void {
  const has = (input: string) => Object.keys(manifest.ports).some((name) => name.endsWith(`.${input}`));
  const kinds = ["affine", ...(has("acts") ? ["act"] : []), ...(has("s_columns") ? ["diagonal"] : [])];
  const refuse = (what: string, kind: string) => {
    throw new ReftEdgeError(
      `${what}, for which this folder has no ports; export the model again with --ports ${[...kinds, kind].join(",")}`,
    );
  };
  for (const part of edit.places.values()) {
    const act = part.acts.find((number) => number > 0);
    if (act !== undefined && !has("acts")) refuse(`the adapter's act_fn is '${ACTS[act]}'`, "act");
    if (part.sGates.length > 0 && !has("s_columns")) {
      refuse("the adapter multiplies hidden states elementwise", "diagonal");
    }
  }
}

export function int64(numbers: Iterable<number>): BigInt64Array {
  return BigInt64Array.from(numbers, BigInt);
}

/** Whether a port belongs to an edit; the others say how long the prompt is and which logits are wanted. */
function isEdit(name: string): boolean {
  return name !== "reft.prompt_len" && name !== "reft.logits_to_keep";
}

function isFloat(name: string): boolean {
  return name === "reft.scale" || /\.[AbBs]$/.test(name);
}
