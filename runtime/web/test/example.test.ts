import { existsSync } from "node:fs";
import { join } from "node:path";

import { type Browser, chromium, type Page } from "playwright-core";
import { createServer, type ViteDevServer } from "vite";
import { afterAll, beforeAll, describe, expect, test } from "vitest";

import { CHROMIUM, QUIET } from "./chromium";
import { ADAPTERS, ANSWERS, type Answers, EXPORT, readJson, stem, VECTORS } from "./vectors";

const { answers } = readJson<Answers>(ANSWERS);
const { prompt } = answers[0]!;

/** How the answer begins; the last character may not be whole there. */
function beginning(adapters: Record<string, number>): string {
  const found = answers.find((answer) => JSON.stringify(answer.adapters) === JSON.stringify(adapters));
  return found!.text.replace(/\ufffd+$/, "");
}

describe.skipIf(!existsSync(CHROMIUM))("examples/browser in Chromium", () => {
  let server: ViteDevServer;
  let browser: Browser;
  let page: Page;
  const failures: string[] = [];

  beforeAll(async () => {
    const root = join(import.meta.dirname, "../../../examples/browser");
    server = await createServer({ root, server: { host: "127.0.0.1" }, logLevel: "warn" });
    await server.listen();
    browser = await chromium.launch({ executablePath: CHROMIUM, args: [...QUIET, "--disable-gpu"] });
    page = await browser.newPage();
    page.setDefaultTimeout(100_000);
    page.on("pageerror", (error) => failures.push(String(error)));
    await page.goto(server.resolvedUrls!.local[0]!);
  }, 60_000);

  afterAll(async () => {
    await browser?.close();
    await server?.close();
  });

  const ready = () => page.locator("button:enabled").waitFor();

  async function ask(): Promise<string> {
    await page.locator("input").nth(2).fill(prompt);
    await page.locator("button").click();
    await ready();
    return (await page.locator("pre").textContent())!;
  }

  test("answers without an adapter and with one", async () => {
    await page.locator("input").nth(0).setInputFiles(EXPORT);
    await ready();
    expect((await ask()).slice(0, beginning({}).length)).toBe(beginning({}));
    await page.locator("input").nth(1).setInputFiles(ADAPTERS[0]!);
    const steered = beginning({ [stem(ADAPTERS[0]!)]: 1 });
    expect(steered).not.toBe(beginning({}));
    expect((await ask()).slice(0, steered.length)).toBe(steered);
  }, 120_000);

  test("says what is wrong with an adapter", async () => {
    await page.locator("input").nth(1).setInputFiles(join(VECTORS, "bad-other-base.safetensors"));
    expect(await ask()).toContain("was trained on another base model");
    expect(failures).toEqual([]);
  }, 120_000);
});
