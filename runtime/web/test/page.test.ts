import { existsSync, readFileSync, statSync } from "node:fs";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { basename, extname, join, normalize } from "node:path";

import { type Browser, chromium, type Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";

import { CHROMIUM, QUIET } from "./chromium";
import { ADAPTERS, ANSWERS, type Answers, EXPORT, readJson, stem, VECTORS } from "./vectors";

const SCREENSHOT = process.env.REFT_WEB_SCREENSHOT;
const DIST = join(import.meta.dirname, "../dist");
const TYPES: Record<string, string> = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".wasm": "application/wasm",
  ".json": "application/json",
};

const { answers, max_tokens: maxTokens } = readJson<Answers>(ANSWERS);
const prompts = [...new Set(answers.map(({ prompt }) => prompt))];
const expected = (prompt: string, adapters: Record<string, number>): string => {
  const found = answers.find(
    (answer) => answer.prompt === prompt && JSON.stringify(answer.adapters) === JSON.stringify(adapters),
  );
  if (found === undefined) throw new Error(`no answer to ${prompt} with ${JSON.stringify(adapters)}`);
  return found.text;
};

/** WebGPU computed by the CPU. */
const SOFTWARE_GPU = [
  "--enable-unsafe-webgpu",
  "--enable-features=Vulkan",
  "--use-vulkan=swiftshader",
  "--use-webgpu-adapter=swiftshader",
  "--use-angle=swiftshader",
  "--ignore-gpu-blocklist",
];

describe.skipIf(!existsSync(CHROMIUM)).each([
  ["threads", true],
  ["one thread", false],
])("the page in Chromium, %s", (_, isolated) => {
  let server: Server;
  let browser: Browser;
  let page: Page;
  let origin: string;
  const failures: string[] = [];

  beforeAll(async () => {
    server = await serve(isolated);
    origin = addressOf(server);
    browser = await chromium.launch({ executablePath: CHROMIUM, args: [...QUIET, "--disable-gpu"] });
    page = await browser.newPage({ viewport: { width: 1080, height: 760 } });
    page.setDefaultTimeout(20_000);
    page.on("pageerror", (error) => failures.push(String(error)));
    page.on("console", (message) => {
      if (message.type() === "error") failures.push(message.text());
    });
  }, 60_000);

  afterAll(async () => {
    await browser?.close();
    server?.close();
  });

  const textOf = (id: string) => page.locator(`#${id}`).innerText();
  const exactTextOf = (id: string) => page.locator(`#${id}`).evaluate((element) => element.textContent ?? "");
  const untilReady = () => ready(page);
  const untilSaid = (text: string) => page.locator("#error", { hasText: text }).waitFor();

  test("opens a folder of its server", async () => {
    await page.goto(`${origin}/index.html?model=exported`);
    await untilReady();
    expect(await textOf("model-name")).toContain(isolated ? "threads" : "1 thread");
    expect(await page.locator("#error").isVisible()).toBe(false);
  }, 120_000);

  test("answers without an adapter", async () => {
    await ask(page, prompts[0]!);
    expect(await exactTextOf("base")).toBe(expected(prompts[0]!, {}));
    expect(await exactTextOf("steered")).toBe("");
  }, 120_000);

  test("answers side by side with adapters that are dropped one after the other", async () => {
    for (const path of ADAPTERS) {
      await drop(page, path);
      await page.locator("#adapters [aria-checked=true]", { hasText: stem(path) }).waitFor();
      for (const prompt of prompts) {
        await ask(page, prompt);
        expect(await exactTextOf("base")).toBe(expected(prompt, {}));
        expect(await exactTextOf("steered")).toBe(expected(prompt, { [stem(path)]: 1 }));
      }
    }
  }, 300_000);

  test("streams both answers at once", async () => {
    await page.evaluate(() => {
      const order: string[] = [];
      Object.assign(window, { order });
      for (const id of ["base", "steered"]) {
        new MutationObserver(() => void order.push(id)).observe(document.getElementById(id)!, { childList: true });
      }
    });
    await ask(page, prompts[0]!);
    const order = await page.evaluate(() => (window as unknown as { order: string[] }).order);
    const changes = order.slice(2).filter((id, i, all) => i > 0 && id !== all[i - 1]).length;
    expect(changes).toBeGreaterThan(4);
  }, 120_000);

  test("goes back to an earlier adapter, at another strength", async () => {
    const name = stem(ADAPTERS[0]!);
    await page.locator("#adapters button", { hasText: name }).click();
    await page.locator("#scale").fill("0.5");
    await ask(page, prompts.at(-1)!);
    expect(await exactTextOf("steered")).toBe(expected(prompts.at(-1)!, { [name]: 0.5 }));
    await page.locator("#scale").fill("1");
  }, 120_000);

  test("refuses what is not an adapter for this model, and keeps the one in use", async () => {
    await drop(page, join(VECTORS, "bad-unknown-tensor.safetensors"));
    await untilSaid("bad-unknown-tensor is not a usable adapter");
    await page.locator("#dismiss").click();
    await drop(page, join(VECTORS, "bad-other-base.safetensors"));
    await untilSaid("was trained on another base model");
    if (SCREENSHOT !== undefined && isolated) await page.screenshot({ path: SCREENSHOT.replace(".png", "-error.png") });
    await drop(page, join(EXPORT, "reft_edge.json").replace("reft_edge", "tokenizer"));
    await untilSaid("tokenizer.json is neither an adapter");
    expect(await page.locator("#adapters [aria-checked=true]").innerText()).toBe(stem(ADAPTERS[0]!));
    await ask(page, prompts[0]!);
    expect(await exactTextOf("steered")).toBe(expected(prompts[0]!, { [stem(ADAPTERS[0]!)]: 1 }));
    expect(await page.locator("#error").isVisible()).toBe(false);
    if (SCREENSHOT !== undefined && isolated) {
      await page.screenshot({ path: SCREENSHOT });
      await page.emulateMedia({ colorScheme: "dark" });
      await page.screenshot({ path: SCREENSHOT.replace(".png", "-dark.png") });
      await page.setViewportSize({ width: 420, height: 900 });
      await page.screenshot({ path: SCREENSHOT.replace(".png", "-narrow.png") });
      await page.setViewportSize({ width: 1080, height: 760 });
    }
  }, 120_000);

  test("stops when asked to", async () => {
    await page.evaluate(() => {
      const answer = document.getElementById("base")!;
      const stop = new MutationObserver(() => {
        if (answer.textContent === "") return;
        stop.disconnect();
        document.getElementById("stop")!.click();
      });
      stop.observe(answer, { childList: true });
    });
    await page.locator("#max-tokens").fill("1000");
    await page.locator("#ask").click();
    await page.locator("#base-figures", { hasText: "stopped" }).waitFor();
    await page.locator("#steered-figures", { hasText: "stopped" }).waitFor();
    await untilReady();
  }, 120_000);

  test("opens a folder that is picked", async () => {
    await page.goto(`${origin}/index.html`);
    await page.locator("#folder").setInputFiles(EXPORT);
    await untilReady();
    await ask(page, prompts[0]!);
    expect(await exactTextOf("base")).toBe(expected(prompts[0]!, {}));
  }, 120_000);

  test("says what is wrong with a folder", async () => {
    await page.goto(`${origin}/index.html?model=nowhere`);
    await untilSaid("is not an exported model");
    expect(await page.locator("#ask").isDisabled()).toBe(true);
    await page.goto(`${origin}/index.html?model=https://example.com/model`);
    await untilSaid("is on another server");
  }, 60_000);

  test("made no errors of its own", () => {
    expect(failures.filter((text) => !text.includes("404"))).toEqual([]);
  });
});

describe.skipIf(!existsSync(CHROMIUM))("the page on WebGPU in software", () => {
  const COUNT = 12;
  let server: Server;
  let browser: Browser;

  beforeAll(async () => {
    server = await serve(true);
    browser = await chromium.launch({ executablePath: CHROMIUM, args: [...QUIET, ...SOFTWARE_GPU] });
  }, 60_000);

  afterAll(async () => {
    await browser?.close();
    server?.close();
  });

  test("answers as on the CPU", async ({ skip }) => {
    const size = statSync(join(EXPORT, "model.onnx.data")).size;
    if (size > 50e6) skip("a GPU in software takes minutes for a model of this size");
    const page = await browser.newPage();
    await page.goto(`${addressOf(server)}/index.html`);
    const offered = await page.evaluate(async () => (await navigator.gpu?.requestAdapter()) != null);
    if (!offered) skip("this Chromium offers no WebGPU");
    await page.locator("#device").selectOption("webgpu");
    await page.locator("#folder").setInputFiles(EXPORT);
    await ready(page);
    expect(await page.locator("#model-name").innerText()).toContain("GPU");
    const name = stem(ADAPTERS[0]!);
    await drop(page, ADAPTERS[0]!);
    await page.locator("#adapters [aria-checked=true]", { hasText: name }).waitFor();
    await ask(page, prompts[0]!, COUNT);
    for (const [side, adapters] of [["base", {}], ["steered", { [name]: 1 }]] as const) {
      const text = await page.locator(`#${side}`).evaluate((element) => element.textContent ?? "");
      expect(text.length).toBeGreaterThan(4);
      expect(expected(prompts[0]!, adapters).startsWith(text)).toBe(true);
    }
    expect(await page.locator("#error").isVisible()).toBe(false);
  }, 200_000);
});

async function serve(isolated: boolean): Promise<Server> {
  const server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url!, "http://localhost").pathname));
    const file = path.startsWith("/exported/") ? join(EXPORT, basename(path)) : join(DIST, path);
    if (!existsSync(file) || path.endsWith("/")) return void response.writeHead(404).end();
    const headers: Record<string, string> = { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream" };
    if (isolated) {
      headers["Cross-Origin-Opener-Policy"] = "same-origin";
      headers["Cross-Origin-Embedder-Policy"] = "require-corp";
    }
    const content = readFileSync(file);
    response.writeHead(200, { ...headers, "Content-Length": content.byteLength }).end(content);
  }).listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  return server;
}

function addressOf(server: Server): string {
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

async function ready(page: Page): Promise<void> {
  await page.locator("#ask:enabled").waitFor({ timeout: 100_000 });
}

async function ask(page: Page, prompt: string, count = maxTokens): Promise<void> {
  await page.locator("#prompt").fill(prompt);
  await page.locator("#max-tokens").fill(String(count));
  await page.locator("#ask").click();
  await page.locator("#base-figures:not(:empty)").waitFor({ timeout: 100_000 });
  await ready(page);
}

async function drop(page: Page, path: string): Promise<void> {
  const content = readFileSync(path).toString("base64");
  const transfer = await page.evaluateHandle(
    ({ content, name }) => {
      const dropped = new DataTransfer();
      dropped.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
      return dropped;
    },
    { content, name: basename(path) },
  );
  await page.locator("#drop").dispatchEvent("drop", { dataTransfer: transfer });
}
