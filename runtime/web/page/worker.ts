import asyncifyModule from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import asyncifyBinary from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import wasmModule from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import wasmBinary from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

import { ReftEdgeError } from "../src/errors";
import { folderAt, folderOf } from "../src/folder";
import { type Generation, SteeredModel } from "../src/model";
import type { Runtime } from "../src/session";
import type { Device, Reply, Request, Side, Source } from "./messages";

let model: SteeredModel | undefined;
let asking: AbortController | undefined;

self.onmessage = async ({ data: request }: MessageEvent<Request>) => {
  try {
    await handle(request);
  } catch (error) {
    const message = error instanceof ReftEdgeError ? error.message : `something unexpected failed: ${String(error)}`;
    send({ type: "failed", during: request.type, message });
  }
};

async function handle(request: Request): Promise<void> {
  switch (request.type) {
    case "open":
      return open(request.source, request.device);
    case "adapter": {
      const config = opened().loadAdapter(new Uint8Array(request.file), request.name);
      return send({ type: "adapter", name: request.name, bytes: request.file.byteLength, config });
    }
    case "ask":
      return ask(request.prompt, request.adapters, request.maxTokens);
    case "stop":
      return asking?.abort();
  }
}

async function open(source: Source, device: Device): Promise<void> {
  asking?.abort();
  await model?.release();
  model = undefined;
  const folder = "url" in source ? folderAt(source.url) : folderOf(source.name, source.files);
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  model = await SteeredModel.open(await loadRuntime(device, threads), folder, {
    session: { executionProviders: [device] },
    unpack: device === "wasm",
    progress: (loaded, total) => send({ type: "progress", loaded, total }),
  });
  const { base_name: name, precision } = model.manifest;
  send({ type: "opened", name, precision, threads, device });
}

async function loadRuntime(device: Device, threads: number): Promise<Runtime> {
  const gpu = device === "webgpu";
  const ort = gpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = gpu
    ? { mjs: asyncifyModule, wasm: asyncifyBinary }
    : { mjs: wasmModule, wasm: wasmBinary };
  return ort;
}

/** Both answers, token by token in turn. */
async function ask(prompt: string, adapters: Record<string, number>, maxTokens: number): Promise<void> {
  asking?.abort();
  const controller = (asking = new AbortController());
  const options = { maxTokens, signal: controller.signal };
  const running = new Map<Side, Generation>();
  running.set("base", opened().stream(prompt, options));
  if (Object.keys(adapters).length > 0) running.set("steered", opened().stream(prompt, { ...options, adapters }));
  while (running.size > 0) {
    for (const [side, generation] of running) {
      const { value, done } = await generation.next();
      if (done) {
        running.delete(side);
        send({ type: "finished", side, finished: value });
      } else {
        send({ type: "piece", side, text: value });
      }
    }
  }
  send({ type: "answered" });
}

function opened(): SteeredModel {
  if (model === undefined) throw new ReftEdgeError("no model is loaded; choose an exported folder first");
  return model;
}

function send(reply: Reply): void {
  self.postMessage(reply);
}
