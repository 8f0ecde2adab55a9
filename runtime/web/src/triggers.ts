import { ReftEdgeError } from "./errors";

/** A sequence of tokens. A gate that has one is open from the start of the last such sequence in a prompt on. */
export interface Trigger {
  /** Empty where a spec gives the text only. */
  ids: number[];
  text: string;
}

const MOST_TOKENS = 64;
const LONGEST_TEXT = 200;
const LARGEST_ID = 2 ** 31 - 1;
const FORM = /from:\s*("(?:[^"\\]|\\.)*")?\s*(\[[^\]]*\])?/g;
const IDS = /^\[\s*[0-9]{1,10}(\s*,\s*[0-9]{1,10})*\s*\]$/;

/**
 * The spec with `from:0;`, `from:1;` and so on in place of its triggers, and these (`reft_edge/adapter/triggers.py`).
 *
 * Raises ReftEdgeError for a trigger that is none.
 */
export function takeTriggers(spec: string): [string, Trigger[]] {
  const found: Trigger[] = [];
  const plain = spec.replace(FORM, (_, quoted?: string, ids?: string) => {
    found.push(readTrigger(spec, quoted, ids));
    return `from:${found.length - 1};`;
  });
  return [plain, found];
}

/** The trigger that a part of such a spec stands for. */
export function takenTrigger(part: string, triggers: Trigger[]): Trigger | undefined {
  return triggers.find((_, number) => part === `from:${number};`);
}

/** Of a prompt's tokens, the number of the first one of the last such sequence; undefined where there is none. */
export function triggerStart({ ids }: Trigger, prompt: number[]): number | undefined {
  for (let start = prompt.length - ids.length; start >= 0; start--) {
    if (ids.every((id, i) => prompt[start + i] === id)) return start;
  }
  return undefined;
}

function readTrigger(spec: string, quoted: string | undefined, given: string | undefined): Trigger {
  const text = quoted === undefined ? "" : readText(spec, quoted);
  if (given !== undefined && !IDS.test(given)) {
    throw new ReftEdgeError(
      `positions '${spec}': cannot read '${given.slice(0, 40)}'; token ids are whole numbers, as in from:[27,14506,29]`,
    );
  }
  const ids = given === undefined ? [] : given.slice(1, -1).split(",").map(Number);
  if (text === "" && ids.length === 0) {
    throw new ReftEdgeError(
      `positions '${spec}': 'from:' names a text in double quotes, token ids in brackets, or both, as in ` +
        `from:"<tool>" or from:"<tool>"[27,14506,29]`,
    );
  }
  if (ids.length > MOST_TOKENS || [...text].length > LONGEST_TEXT) {
    throw new ReftEdgeError(
      `positions '${spec.slice(0, 40)}'...: a trigger has at most ${MOST_TOKENS} tokens and a text of ${LONGEST_TEXT} characters`,
    );
  }
  if (ids.some((id) => id > LARGEST_ID)) {
    throw new ReftEdgeError(`positions '${spec}': token ids end at ${LARGEST_ID}`);
  }
  return { ids, text };
}

function readText(spec: string, quoted: string): string {
  let text: unknown;
  try {
    text = JSON.parse(quoted);
  } catch {
    text = undefined;
  }
  if (typeof text !== "string" || /\p{Cs}/u.test(text)) {
    throw new ReftEdgeError(
      `positions '${spec}': cannot read ${quoted.slice(0, 40)}; the text behind 'from:' is a JSON string`,
    );
  }
  return text;
}
