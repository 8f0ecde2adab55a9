import { type Adapter, type AdapterConfig, adapterSpans } from "./adapter";
import { ReftEdgeError } from "./errors";
import { inPrompt, type Span } from "./positions";

/** Activations that ports carry, as `reft_edge/adapter/algebra.py` numbers them. */
export const ACTS = ["linear", "relu", "gelu", "silu", "tanh", "sigmoid"];
const ALIASES: Record<string, string> = { swish: "silu" };

/**
 * The edit of one place, h' = h + act(h A + b) B + s ⊙ h, row-major: A [d, r], b [r], B [r, d], the gate of each column [r]
 * and its activation [r], a number in ACTS; s [k, d] and the gate of each of its rows [k].
 */
export interface LayerEdit {
  A: Float32Array;
  b: Float32Array;
  B: Float32Array;
  gates: number[];
  acts: number[];
  s: Float32Array;
  sGates: number[];
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
 * An adapter as one edit a place; the formulas are those of `reft_edge/adapter/linear.py`.
 *
 * Raises ReftEdgeError if no port carries its act_fn.
 */
export function fold({ config, tensors }: Adapter): Edit {
  const sets = columnSets(config, tensors);
  for (const { rows } of sets) {
    for (const name of ["A", "b"] as const) {
      if (!rows[name].every(Number.isFinite)) {
        throw new ReftEdgeError(
          `its tensors are finite, but not the ${name} of h + (hA + b)B that they fold to; train the adapter again`,
        );
      }
    }
  }
  const gates = adapterSpans(config).map((span) => ({ span, scale: 1 }));
  const d = config.hidden_size;
  const r = gates.length * config.rank;
  const columns = gates.flatMap((_, gate) => new Array<number>(config.rank).fill(gate));
  const places = new Map<string, LayerEdit>();
  config.layers.forEach((layer, i) => {
    const from = i * r;
    const diagonal = config.intervention === "red" ? tensors.get("s")!.slice(from * d, (from + r) * d) : new Float32Array();
    const parts = sets.map(({ rows, act }, set): LayerEdit => ({
      A: transpose(rows.A.subarray(from * d, (from + r) * d), r, d),
      b: rows.b.slice(from, from + r),
      B: rows.B.slice(from * d, (from + r) * d),
      gates: columns,
      acts: columns.map(() => act),
      s: set === 0 ? diagonal : new Float32Array(),
      sGates: set === 0 && diagonal.length > 0 ? columns : [],
    }));
    places.set(portName(layer, config.component), parts.reduce((left, right) => join(left, right, d)));
  });
  return { hiddenSize: d, gates, places };
}

/** Whether it depends on a prompt's tokens where the edit acts. */
export function hasTrigger(edit: Edit): boolean {
  return edit.gates.some(({ span }) => span.trigger !== null);
}

/** The same edit for a prompt of these tokens, without triggers. */
export function editInPrompt(edit: Edit, prompt: number[]): Edit {
  return { ...edit, gates: edit.gates.map((gate) => ({ ...gate, span: inPrompt(gate.span, prompt) })) };
}

interface Rows {
  A: Float32Array;
  b: Float32Array;
  B: Float32Array;
}

/**
 * Columns of an adapter, all layers and groups of one activation together. What pyreft subtracts outside of the activation
 * is a set of its own without one: act(hA + b)B − (hC + c)B.
 */
function columnSets(config: AdapterConfig, tensors: Map<string, Float32Array>): { rows: Rows; act: number }[] {
  if (config.act_fn === "linear") return [{ rows: foldedRows(config, tensors), act: 0 }];
  const act = ACTS.indexOf(ALIASES[config.act_fn] ?? config.act_fn);
  if (act < 0) {
    throw new ReftEdgeError(
      `the adapter's act_fn is '${config.act_fn}', which no port can carry; ` +
        `train it with one of ${ACTS.join(", ")} to run it on an exported model`,
    );
  }
  const t = (name: string): Float32Array => tensors.get(name)!;
  const rotated = ["loreft", "direft"].includes(config.intervention);
  const B = t(rotated ? "R" : "W2");
  const sets = [{ rows: { A: t(rotated ? "W" : "W1"), b: t("b"), B }, act }];
  if (["loreft", "noreft"].includes(config.intervention)) {
    const b = tensors.get("b2")?.map((value) => -value) ?? new Float32Array(t("b").length);
    sets.push({ rows: { A: B.map((value) => -value), b, B }, act: 0 });
  }
  return sets;
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
      const shift = (numbers: number[]) => numbers.map((gate) => gate + gates.length);
      const shifted = { ...part, gates: shift(part.gates), sGates: shift(part.sGates) };
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
function foldedRows({ intervention, hidden_size: d }: AdapterConfig, tensors: Map<string, Float32Array>): Rows {
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
    case "red":
      return { A: new Float32Array(t("v").length), b: new Float32Array(t("v").length / d).fill(1), B: t("v") };
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
  return {
    A,
    b: append(left.b, right.b),
    B: append(left.B, right.B),
    gates: [...left.gates, ...right.gates],
    acts: [...left.acts, ...right.acts],
    s: append(left.s, right.s),
    sGates: [...left.sGates, ...right.sGates],
  };
}
