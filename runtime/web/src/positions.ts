import { ReftEdgeError } from "./errors";

/** Every prompt token (as `last`), or every generated one (as `after`). */
export const UNLIMITED = 2 ** 31 - 1;

const NONE: Span = { first: 0, last: 0, after: 0, skip_first: 0, skip_last: 0 };
const COUNTED = { f: "first", l: "last", gen: "after" } as const;

const SKIPPED = { f: "skip_first", l: "skip_last" } as const;

/**
 * One gate: the first `first` and last `last` prompt tokens, and `after` generated tokens. The prompt's first `skip_first`
 * and last `skip_last` tokens are left out.
 */
export interface Span {
  first: number;
  last: number;
  after: number;
  skip_first: number;
  skip_last: number;
}

type Skips = Partial<Pick<Span, "skip_first" | "skip_last">>;

/**
 * The gates of a position spec such as `f7+l7`: one a part if untied, one for all parts if tied, one a group where
 * groups are set apart by `|`. The language is that of `reft_edge/positions.py`.
 *
 * Raises ReftEdgeError for an unknown, repeated or overlapping part, and for a repeated group.
 */
export function parsePositions(spec: string, tied: boolean): Span[] {
  if (spec.includes("|")) {
    if (tied) {
      throw new ReftEdgeError(`positions '${spec}': '|' already says which parts share weights; drop tied`);
    }
    const groups = spec.split("|").flatMap((group) => parsePositions(group, true));
    if (new Set(groups.map((span) => JSON.stringify(span))).size < groups.length) {
      throw new ReftEdgeError(`positions '${spec}': a group is given twice; name each group once`);
    }
    return groups;
  }
  const parts = new Map<string, Span>();
  const skips: Skips = {};
  for (const part of spec.trim().split("+")) {
    const [edited, ...leftOut] = part.split("-").map((text) => text.trim());
    const [name, span] = parsePart(spec, edited!);
    if (parts.has(name)) {
      throw new ReftEdgeError(`positions '${spec}': '${name}' is given twice; name each part once`);
    }
    parts.set(name, span);
    for (const text of leftOut) addSkip(spec, text, skips);
  }
  if (parts.has("all") && (parts.has("f") || parts.has("l"))) {
    throw new ReftEdgeError(
      `positions '${spec}': 'all' already covers every prompt token; drop the f and l parts`,
    );
  }
  const onPrompt = (span: Span) => span.first > 0 || span.last > 0;
  if (Object.keys(skips).length > 0 && ![...parts.values()].some(onPrompt)) {
    throw new ReftEdgeError(
      `positions '${spec}': '-' leaves out tokens of the prompt, and no part edits the prompt; drop it`,
    );
  }
  const spans = [...parts.values()].map((span) => (onPrompt(span) ? { ...span, ...skips } : span));
  for (const { first, last, skip_first, skip_last } of spans) {
    if ((first > 0 && first <= skip_first) || (last > 0 && last <= skip_last)) {
      throw new ReftEdgeError(`positions '${spec}': '-' leaves nothing of a part; drop one of them`);
    }
  }
  if (!tied) return spans;
  const largest = (key: keyof Span) => Math.max(...spans.map((span) => span[key]));
  return [{ ...NONE, first: largest("first"), last: largest("last"), after: largest("after"), ...skips }];
}

function addSkip(spec: string, text: string, skips: Skips): void {
  const [, kind, digits] = /^([fl])([1-9][0-9]{0,6})$/.exec(text) ?? [];
  if (kind === undefined) {
    throw new ReftEdgeError(
      `positions '${spec}': cannot read '-${text}'; '-' leaves out the prompt's first or last tokens, as in all-f1`,
    );
  }
  const name = SKIPPED[kind as keyof typeof SKIPPED];
  if (skips[name] !== undefined) {
    throw new ReftEdgeError(`positions '${spec}': '-${kind}' is given twice; name each once`);
  }
  skips[name] = Number(digits);
}

function parsePart(spec: string, part: string): [string, Span] {
  if (part === "all") return ["all", { ...NONE, last: UNLIMITED }];
  if (part === "gen") return ["gen", { ...NONE, after: UNLIMITED }];
  const [, kind, digits] = /^(f|l|gen)([1-9][0-9]{0,6})$/.exec(part) ?? [];
  if (kind === undefined) {
    throw new ReftEdgeError(
      `positions '${spec}': cannot read '${part}'; join parts like f7, l7, all, gen, gen5 with '+'`,
    );
  }
  return [kind, { ...NONE, [COUNTED[kind as keyof typeof COUNTED]]: Number(digits) }];
}
