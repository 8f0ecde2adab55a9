import { readFileSync } from "node:fs";

import * as ort from "onnxruntime-web";
import { beforeAll, describe, expect, test } from "vitest";

import { readAdapter } from "../src/adapter";
import { fold } from "../src/algebra";
import { loadManifest } from "../src/manifest";
import { type Finished, type Generation, SteeredModel } from "../src/model";
import { portInputs } from "../src/ports";
import { GraphSession } from "../src/session";
import { ADAPTERS, ANSWERS, type Answers, EXPORT, folderOnDisk, readJson, stem } from "./vectors";

const { answers, encoded, max_tokens: maxTokens } = readJson<Answers>(ANSWERS);
const [first] = answers;
let model: SteeredModel;

beforeAll(async () => {
  ort.env.wasm.numThreads = 1;
  model = await SteeredModel.open(ort, folderOnDisk(EXPORT), { unpack: true });
  for (const path of ADAPTERS) model.loadAdapter(new Uint8Array(readFileSync(path)), stem(path));
}, 60_000);

test.each(answers)("'$prompt' with $adapters", async ({ prompt, adapters, ids, tokens, text, logits, reason }) => {
  expect(model.encode(prompt, { adapters })).toEqual(ids);
  const found = await model.logits(ids, adapters);
  const distance = logits.map((value, i) => Math.abs(value - found[i]!)).reduce((a, b) => Math.max(a, b));
  console.log(`logits are ${distance.toExponential(1)} apart`);
  expect(distance).toBeLessThan(Number(process.env.REFT_WEB_TOLERANCE ?? 1e-3));
  const answer = await whole(model.stream(prompt, { adapters, maxTokens }));
  expect(answer.tokens).toEqual(tokens);
  expect(answer.text).toBe(text);
  expect(answer.reason).toBe(reason);
  expect(answer.promptTokens).toBe(ids.length);
}, 120_000);

test.each(encoded)("tokens of '$text'", ({ text, raw, chat }) => {
  expect(model.encode(text, { raw: true })).toEqual(raw);
  expect(model.encode(text, { raw: false })).toEqual(chat);
  expect(model.encode([{ role: "user", content: text }])).toEqual(chat);
});

describe("streams", () => {
  test("side by side give what they give alone", async () => {
    const chosen = answers.filter(({ prompt }) => prompt === first!.prompt);
    expect(chosen.length).toBeGreaterThan(2);
    const together = await Promise.all(
      chosen.map(({ prompt, adapters }) => whole(model.stream(prompt, { adapters, maxTokens }))),
    );
    expect(together.map(({ tokens }) => tokens)).toEqual(chosen.map(({ tokens }) => tokens));
  }, 120_000);

  test("of scale 0 are the base's", async () => {
    const adapters = { [stem(ADAPTERS[0]!)]: 0 };
    expect((await whole(model.stream(first!.prompt, { adapters, maxTokens }))).tokens).toEqual(first!.tokens);
  }, 60_000);

  test.each(ADAPTERS.map(stem))("with %s run a prompt in pieces as they run it whole", async (name) => {
    const folder = folderOnDisk(EXPORT);
    const manifest = await loadManifest(folder);
    const graph = await GraphSession.open(ort, folder, manifest, {}, true);
    const path = ADAPTERS.find((path) => stem(path) === name)!;
    const ports = graph.bind(portInputs(fold(readAdapter(new Uint8Array(readFileSync(path)), name)), manifest));
    const { ids } = answers.find(({ adapters }) => adapters[name] === 1)!;
    const whole = await graph.run(ids, graph.emptyCache(), ports, ids.length);
    const cache = graph.emptyCache();
    for (const piece of [ids.slice(0, 2), ids.slice(2, 9)]) await graph.run(piece, cache, ports, ids.length);
    const pieces = await graph.run(ids.slice(9), cache, ports, ids.length);
    expect(cache.length).toBe(ids.length);
    expect(whole.every((value, i) => Math.abs(value - pieces[i]!) < 1e-3)).toBe(true);
    await graph.release();
  }, 60_000);

  test("end at maxTokens and by a signal", async () => {
    const short = await whole(model.stream(first!.prompt, { maxTokens: 2 }));
    expect(short.tokens).toEqual(first!.tokens.slice(0, 2));
    expect(short.reason).toBe("length");
    const stop = new AbortController();
    const stopped = model.stream(first!.prompt, { signal: stop.signal });
    await stopped.next();
    stop.abort();
    const { value } = await stopped.next();
    expect(value).toMatchObject({ reason: "aborted", promptTokens: first!.ids.length });
    const never = await whole(model.stream(first!.prompt, { signal: stop.signal }));
    expect(never).toMatchObject({ reason: "aborted", tokens: [], text: "" });
  }, 60_000);

  test("are refused for what they cannot do", async () => {
    const ask = (...given: Parameters<SteeredModel["stream"]>) => whole(model.stream(...given));
    await expect(ask("hi", { adapters: { nobody: 1 } })).rejects.toThrow("no adapter 'nobody' is loaded");
    await expect(ask("hi", { adapters: { [stem(ADAPTERS[0]!)]: NaN } })).rejects.toThrow("finite");
    await expect(ask("", { raw: true })).rejects.toThrow("empty");
    await expect(ask("a b c ".repeat(model.manifest.context_length), { raw: true })).rejects.toThrow("no room");
    await expect(ask([{ role: "user", content: "hi" }], { raw: true })).rejects.toThrow("one string");
    expect((await ask(first!.prompt, { maxTokens: 1 })).tokens).toEqual(first!.tokens.slice(0, 1));
  }, 60_000);
});

async function whole(generation: Generation): Promise<Finished & { text: string }> {
  let text = "";
  for (;;) {
    const { value, done } = await generation.next();
    if (done) return { ...value, text };
    text += value;
  }
}
