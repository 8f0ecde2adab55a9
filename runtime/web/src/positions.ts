import { ReftEdgeError } from "./errors";

/** Every prompt token (as `last`), or every generated one (as `after`). */
export const UNLIMITED = 2 ** 31 - 1;

const COUNTED = { f: "first", l: "last", gen: "after" } as const;

/** One gate: the first `first` and last `last` prompt tokens, and `after` generated tokens. */
export interface Span {
  first: number;
  last: number;
  after: number;
}

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
  for (const part of spec.trim().split("+")) {
    const [name, span] = parsePart(spec, part.trim());
    if (parts.has(name)) {
      throw new ReftEdgeError(`positions '${spec}': '${name}' is given twice; name each part once`);
    }
    parts.set(name, span);
  }
  if (parts.has("all") && (parts.has("f") || parts.has("l"))) {
    throw new ReftEdgeError(
      `positions '${spec}': 'all' already covers every prompt token; drop the f and l parts`,
    );
  }
  const spans = [...parts.values()];
  if (!tied) return spans;
  const largest = (key: keyof Span) => Math.max(...spans.map((span) => span[key]));
  return [{ first: largest("first"), last: largest("last"), after: largest("after") }];
}

function parsePart(spec: string, part: string): [string, Span] {
  const none = { first: 0, last: 0, after: 0 };
  if (part === "all") return ["all", { ...none, last: UNLIMITED }];
  if (part === "gen") return ["gen", { ...none, after: UNLIMITED }];
  const [, kind, digits] = /^(f|l|gen)([1-9][0-9]{0,6})$/.exec(part) ?? [];
  if (kind === undefined) {
    throw new ReftEdgeError(
      `positions '${spec}': cannot read '${part}'; join parts like f7, l7, all, gen, gen5 with '+'`,
    );
  }
  return [kind, { ...none, [COUNTED[kind as keyof typeof COUNTED]]: Number(digits) }];
}
