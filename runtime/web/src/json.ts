import { visit } from "jsonc-parser";

import { ReftEdgeError } from "./errors";

export type JsonObject = Record<string, unknown>;

export function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * A JSON object in which no name stands twice and every number is finite.
 *
 * Raises ReftEdgeError that names `what` was read.
 */
export function parseStrictly(text: string, what: string): JsonObject {
  let parsed: unknown;
  const names: Set<string>[] = [];
  const repeated: string[] = [];
  let infinite: string | undefined;
  try {
    parsed = JSON.parse(text);
    visit(text, {
      onObjectBegin: () => void names.push(new Set()),
      onObjectEnd: () => void names.pop(),
      onObjectProperty: (name) => {
        const seen = names[names.length - 1];
        if (seen?.has(name)) repeated.push(name);
        seen?.add(name);
      },
      onLiteralValue: (value, offset, length) => {
        if (Math.abs(value) === Infinity) infinite = text.slice(offset, offset + Math.min(length, 40));
      },
    });
  } catch {
    throw new ReftEdgeError(`its ${what} is not valid JSON`);
  }
  if (!isObject(parsed)) throw new ReftEdgeError(`its ${what} is not a JSON object`);
  if (repeated.length > 0) {
    throw new ReftEdgeError(`its ${what} names ${repeated.slice(0, 3).join(", ")} twice`);
  }
  if (infinite !== undefined) {
    throw new ReftEdgeError(`its ${what} holds ${infinite}, which is not a finite number`);
  }
  return parsed;
}
