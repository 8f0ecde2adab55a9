import { ReftEdgeError } from "./errors";

const LENGTH_DELIMITED = 2;

/** A field of a protobuf message. */
export interface Field {
  number: number;
  /** Tag and content. */
  whole: Uint8Array;
  /** Of a length-delimited field. */
  content?: Uint8Array;
  /** Of a whole number. */
  value?: number;
}

/**
 * The fields of one protobuf message, in order (https://protobuf.dev/programming-guides/encoding/).
 *
 * Raises ReftEdgeError if the bytes are no such message.
 */
export function* fields(message: Uint8Array): Generator<Field> {
  let at = 0;
  const number = (): number => {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      const byte = message[at++];
      if (byte === undefined) break;
      value += (byte & 127) * 2 ** shift;
      if (byte < 128) return value;
    }
    throw new ReftEdgeError("the graph is not an ONNX model; export the model again");
  };
  while (at < message.byteLength) {
    const start = at;
    const tag = number();
    let content: Uint8Array | undefined;
    let value: number | undefined;
    switch (tag % 8) {
      case 0:
        value = number();
        break;
      case 1:
        at += 8;
        break;
      case LENGTH_DELIMITED: {
        const size = number();
        content = message.subarray(at, at + size);
        at += size;
        break;
      }
      case 5:
        at += 4;
        break;
      default:
        at = Infinity;
    }
    if (at > message.byteLength) {
      throw new ReftEdgeError("the graph is not an ONNX model, or truncated; export the model again");
    }
    const field = { number: Math.floor(tag / 8), whole: message.subarray(start, at) };
    if (content !== undefined) yield { ...field, content };
    else yield value === undefined ? field : { ...field, value };
  }
}

/** A length-delimited field: text, bytes or a message. */
export function delimited(number: number, content: string | Uint8Array): Uint8Array {
  const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
  return join([Uint8Array.of(...varint(number * 8 + LENGTH_DELIMITED), ...varint(bytes.byteLength)), bytes]);
}

/** A field that holds a whole number. */
export function wholeNumber(number: number, value: number): Uint8Array {
  return Uint8Array.of(...varint(number * 8), ...varint(value));
}

function varint(value: number): number[] {
  const bytes: number[] = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return [...bytes, value];
}

/** A field's content as text. */
export function text(content: Uint8Array): string {
  return new TextDecoder().decode(content);
}

/** Bytes one behind the other. */
export function join(parts: Uint8Array[]): Uint8Array {
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.byteLength;
  }
  return joined;
}
