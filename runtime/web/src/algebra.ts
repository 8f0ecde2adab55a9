import { type Adapter, adapterSpans } from "./adapter";
import { ReftEdgeError } from "./errors";
import type { Span } from "./positions";

/** The edit of one place, h' = h + (h A + b) B, row-major: A [d, r], b [r], B [r, d], and the gate of each column [r]. */
export interface LayerEdit {
  A: Float32Array;
  b: Float32Array;
  B: Float32Array;
  gates: number[];
}

/** Where a set of columns acts, and how strongly. */
export interface Gate {
  span: Span;
  scale: number;
}

/** Edits at some places of a model; columns point into `gates`, places are named as their ports are. */
export interface Edit {
  hiddenSize: number;
  gates: Gate[];
  places: Map<string, LayerEdit>;
}

/**
 * An adapter as one linear edit a place; the formulas are those of `reft_edge/adapter.py`.
 *
 * Raises ReftEdgeError if its act_fn is not linear: such an edit is not affine in h.
 */
export function fold({ config, tensors }: Adapter): Edit {
  if (config.act_fn !== "linear") {
    throw new ReftEdgeError(
      `the adapter's act_fn is '${config.act_fn}', which no linear port can carry; ` +
        "train it with act_fn `linear` to run it on an exported model",
    );
  }
  const rows = foldedRows(config.intervention, tensors);
  for (const name of ["A", "b"] as const) {
    if (!rows[name].every(Number.isFinite)) {
      throw new ReftEdgeError(
        `its tensors are finite, but not the ${name} of h + (hA + b)B that they fold to; train the adapter again`,
      );
    }
  }
  const gates = adapterSpans(config).map((span) => ({ span, scale: 1 }));
  const d = config.hidden_size;
  const r = gates.length * config.rank;
  const columns = gates.flatMap((_, gate) => new Array<number>(config.rank).fill(gate));
  const places = new Map<string, LayerEdit>();
  config.layers.forEach((layer, i) => {
    const from = i * r;
    places.set(portName(layer, config.component), {
      A: transpose(rows.A.subarray(from * d, (from + r) * d), r, d),
      b: rows.b.slice(from, from + r),
      B: rows.B.slice(from * d, (from + r) * d),
      gates: columns,
    });
  });
  return { hiddenSize: d, gates, places };
}

/** What the names of a port's inputs begin with. */
export function portName(layer: number, component: string): string {
  return `reft.layers.${layer}` + (component === "block" ? "" : `.${component}`);
}

/** The edit with its effect multiplied by `factor`. Raises ReftEdgeError for a factor that is not finite in float32. */
export function scale(edit: Edit, factor: number): Edit {
  const gates = edit.gates.map((gate) => ({ ...gate, scale: gate.scale * factor }));
  if (!gates.every((gate) => Number.isFinite(Math.fround(gate.scale)))) {
    throw new ReftEdgeError(`scaled by ${factor}, the edit is not finite in float32; give a smaller scale`);
  }
  return { ...edit, gates };
}

/** All edits at once, each computed from the same h: their deltas add. */
export function concat(edits: Edit[]): Edit {
  const sizes = new Set(edits.map((edit) => edit.hiddenSize));
  const [hiddenSize] = sizes;
  if (hiddenSize === undefined || sizes.size > 1) {
    throw new ReftEdgeError(`adapters of different hidden sizes ${[...sizes].join(", ")} cannot run together`);
  }
  const places = new Map<string, LayerEdit>();
  const gates: Gate[] = [];
  for (const edit of edits) {
    for (const [place, part] of edit.places) {
      const shifted = { ...part, gates: part.gates.map((gate) => gate + gates.length) };
      const there = places.get(place);
      places.set(place, there === undefined ? shifted : join(there, shifted, hiddenSize));
    }
    gates.push(...edit.gates);
  }
  return { hiddenSize, gates, places };
}

/** Whether any column can be active after the prompt. */
export function onGenerated(edit: Edit): boolean {
  return edit.gates.some((gate) => gate.span.after > 0 && gate.scale !== 0);
}

/** Aᵀ, b and B of every layer and group, stacked as the tensors are. */
function foldedRows(
  intervention: string,
  tensors: Map<string, Float32Array>,
): { A: Float32Array; b: Float32Array; B: Float32Array } {
  const t = (name: string): Float32Array => {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw new ReftEdgeError(`the adapter has no tensor ${name}`);
    return tensor;
  };
  switch (intervention) {
    case "loreft":
      return { A: minus(t("W"), t("R")), b: t("b"), B: t("R") };
    case "direft":
      return { A: t("W"), b: t("b"), B: t("R") };
    case "noreft":
      return {
        A: minus(t("W1"), t("W2")),
        b: tensors.has("b2") ? minus(t("b"), t("b2")) : t("b"),
        B: t("W2"),
      };
    case "nodireft":
      return { A: t("W1"), b: t("b"), B: t("W2") };
    case "consreft":
      return { A: t("R").map((value) => -value), b: t("b"), B: t("R") };
    case "lobireft":
      return { A: new Float32Array(t("R").length), b: t("b"), B: t("R") };
    default:
      return { A: new Float32Array(t("v").length), b: t("alpha"), B: t("v") };
  }
}

function minus(left: Float32Array, right: Float32Array): Float32Array {
  return left.map((value, i) => value - right[i]!);
}

function transpose(matrix: Float32Array, rows: number, columns: number): Float32Array {
  const turned = new Float32Array(matrix.length);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) turned[j * rows + i] = matrix[i * columns + j]!;
  }
  return turned;
}

function join(left: LayerEdit, right: LayerEdit, d: number): LayerEdit {
  const [l, r] = [left.b.length, right.b.length];
  const A = new Float32Array(d * (l + r));
  for (let i = 0; i < d; i++) {
    A.set(left.A.subarray(i * l, (i + 1) * l), i * (l + r));
    A.set(right.A.subarray(i * r, (i + 1) * r), i * (l + r) + l);
  }
  const append = (one: Float32Array, other: Float32Array) => {
    const both = new Float32Array(one.length + other.length);
    both.set(one);
    both.set(other, one.length);
    return both;
  };
  return { A, b: append(left.b, right.b), B: append(left.B, right.B), gates: [...left.gates, ...right.gates] };
}
