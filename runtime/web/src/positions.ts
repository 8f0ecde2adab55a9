import { ReftEdgeError } from "./errors";
import { takenTrigger, takeTriggers, type Trigger, triggerStart } from "./triggers";

/** Every prompt token (as `last`), or every generated one (as `after`). */
export const UNLIMITED = 2 ** 31 - 1;

const NONE: Span = { first: 0, last: 0, after: 0, skip_first: 0, skip_last: 0, trigger: null };
const COUNTED = { f: "first", l: "last", gen: "after" } as const;

const SKIPPED = { f: "skip_first", l: "skip_last" } as const;

/**
 * One gate: the first `first` and last `last` prompt tokens, and `after` generated tokens. The prompt's first `skip_first`
 * and last `skip_last` tokens are left out. With a trigger, what comes before its last occurrence in the prompt is left out,
 * too, and everything is where the prompt lacks it.
 */
export interface Span {
  first: number;
  last: number;
  after: number;
  skip_first: number;
  skip_last: number;
  trigger: Trigger | null;
}

type Skips = Partial<Pick<Span, "skip_first" | "skip_last">>;

/**
 * The gates of a position spec such as `f7+l7`: one a part if untied, one for all parts if tied, one a group where
 * groups are set apart by `|`. The language is that of `reft_edge/positions.py`.
 *
 * Raises ReftEdgeError for an unknown, repeated or overlapping part, and for a repeated group.
 */
export function parsePositions(spec: string, tied: boolean): Span[] {
  const [plain, triggers] = takeTriggers(spec);
  const groups = plain.split("|");
  if (groups.length === 1) return parseGroup(spec, plain, triggers, tied);
  if (tied) {
    throw new ReftEdgeError(`positions '${spec}': '|' already says which parts share weights; drop tied`);
  }
  const spans = groups.flatMap((group) => parseGroup(spec, group, triggers, true));
  if (new Set(spans.map((span) => JSON.stringify(span))).size < spans.length) {
    throw new ReftEdgeError(`positions '${spec}': a group is given twice; name each group once`);
  }
  return spans;
}

/** The same gate for this prompt alone, without a trigger. */
export function inPrompt(span: Span, prompt: number[]): Span {
  if (span.trigger === null) return span;
  const start = triggerStart(span.trigger, prompt);
  if (start === undefined) return NONE;
  return { ...span, trigger: null, skip_first: Math.max(span.skip_first, start) };
}

/** The gates of one group, in which numbers stand for the triggers. */
function parseGroup(spec: string, group: string, triggers: Trigger[], tied: boolean): Span[] {
  const parts = new Map<string, Span>();
  const skips: Skips = {};
  for (const part of group.trim().split("+")) {
    const [edited, ...leftOut] = part.split("-").map((text) => text.trim());
    const [name, span] = parsePart(spec, edited!, triggers);
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
  if (parts.has("from") && parts.size > 1) {
    throw new ReftEdgeError(
      `positions '${spec}': 'from:' already covers every token from the trigger on; set other parts apart with '|'`,
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
  if (!tied || spans.length === 1) return spans;
  const largest = (key: "first" | "last" | "after") => Math.max(...spans.map((span) => span[key]));
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

function parsePart(spec: string, part: string, triggers: Trigger[]): [string, Span] {
  if (part === "all") return ["all", { ...NONE, last: UNLIMITED }];
  if (part === "gen") return ["gen", { ...NONE, after: UNLIMITED }];
  const trigger = takenTrigger(part, triggers);
  if (trigger !== undefined) return ["from", { ...NONE, last: UNLIMITED, after: UNLIMITED, trigger }];
  const [, kind, digits] = /^(f|l|gen)([1-9][0-9]{0,6})$/.exec(part) ?? [];
  if (kind === undefined) {
    throw new ReftEdgeError(
      `positions '${spec}': cannot read '${part}'; join parts like f7, l7, all, gen, gen5 with '+'`,
    );
  }
  return [kind, { ...NONE, [COUNTED[kind as keyof typeof COUNTED]]: Number(digits) }];
}
