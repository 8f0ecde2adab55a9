import type { AdapterConfig } from "../src/adapter";
import type { Finished } from "../src/model";

export type Device = "wasm" | "webgpu";
export type Side = "base" | "steered";
export type Source = { url: string } | { name: string; files: File[] };

/** From the page to the worker that holds the model. */
export type Request =
  | { type: "open"; source: Source; device: Device }
  | { type: "adapter"; name: string; file: ArrayBuffer }
  | { type: "ask"; prompt: string; adapters: Record<string, number>; maxTokens: number }
  | { type: "stop" };

/** And back. */
export type Reply =
  | { type: "progress"; loaded: number; total: number }
  | { type: "opened"; name: string; precision: string; threads: number; device: Device }
  | { type: "adapter"; name: string; bytes: number; config: AdapterConfig }
  | { type: "piece"; side: Side; text: string }
  | { type: "finished"; side: Side; finished: Finished }
  | { type: "answered" }
  | { type: "failed"; during: Request["type"]; message: string };
