import type { AdapterConfig } from "../src/adapter";
import type { Finished } from "../src/model";
import { droppedFiles } from "./drop";
import type { Device, Reply, Request, Side, Source } from "./messages";

interface LoadedAdapter {
  bytes: number;
  config: AdapterConfig;
}

const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
const element = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
const adapters = new Map<string, LoadedAdapter>();
let source: Source | undefined;
let inUse: string | undefined;
let ready = false;
let answering = false;

const form = element<HTMLFormElement>("form");
const prompt = element<HTMLTextAreaElement>("prompt");
const scale = element<HTMLInputElement>("scale");
const device = element<HTMLSelectElement>("device");
const maxTokens = element<HTMLInputElement>("max-tokens");

function send(request: Request, transfer: Transferable[] = []): void {
  worker.postMessage(request, transfer);
}

worker.onmessage = ({ data: reply }: MessageEvent<Reply>) => {
  switch (reply.type) {
    case "progress":
      return showProgress(reply.loaded, reply.total);
    case "opened":
      return showModel(reply);
    case "adapter":
      adapters.set(reply.name, { bytes: reply.bytes, config: reply.config });
      inUse = reply.name;
      return showAdapters();
    case "piece":
      element(reply.side).textContent += reply.text;
      return;
    case "finished":
      element(`${reply.side}-figures`).textContent = figures(reply.finished);
      return;
    case "answered":
      return setAnswering(false);
    case "failed":
      return showFailure(reply.during, reply.message);
  }
};
worker.onerror = (event) => showFailure("open", `the page's worker failed: ${event.message || "it did not start"}`);

function open(chosen: Source): void {
  source = chosen;
  ready = false;
  adapters.clear();
  inUse = undefined;
  hideError();
  showAdapters();
  element("model-name").textContent = "name" in chosen ? chosen.name : chosen.url;
  showProgress(0, 0);
  setAnswering(false);
  send({ type: "open", source: chosen, device: device.value as Device });
}

function showProgress(loaded: number, total: number): void {
  const bar = element<HTMLProgressElement>("progress");
  element("loading").hidden = false;
  if (total > 0 && loaded < total) bar.value = loaded / total;
  else bar.removeAttribute("value");
  const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(0)} MB`;
  element("loading-text").textContent =
    total > 0 && loaded < total
      ? `Reading the weights: ${megabytes(loaded)} of ${megabytes(total)}`
      : "Starting the model";
}

function showModel(opened: Extract<Reply, { type: "opened" }>): void {
  ready = true;
  element("loading").hidden = true;
  const where =
    opened.device === "webgpu" ? "GPU" : opened.threads > 1 ? `CPU, ${opened.threads} threads` : "CPU, 1 thread";
  element("model-name").textContent = `${opened.name} · ${opened.precision} · ${where}`;
  setAnswering(false);
}

function showAdapters(): void {
  const buttons = [...adapters.keys()].map((name) => {
    const button = document.createElement("button");
    button.type = "button";
    button.role = "radio";
    button.textContent = name;
    button.ariaChecked = String(name === inUse);
    button.onclick = () => {
      inUse = name;
      showAdapters();
    };
    return button;
  });
  element("adapters").replaceChildren(...buttons);
  const current = inUse === undefined ? undefined : adapters.get(inUse);
  element("scale-choice").hidden = current === undefined;
  element("steered-title").textContent = current === undefined ? "With an adapter" : `With ${inUse}`;
  element("adapter-facts").textContent = current === undefined ? "No adapter yet." : facts(current);
}

function facts({ bytes, config }: LoadedAdapter): string {
  const layers = config.layers.length > 8 ? `${config.layers.length} layers` : `layers ${config.layers.join(", ")}`;
  return [
    config.intervention,
    `rank ${config.rank}`,
    layers,
    `positions ${config.positions}`,
    `${(bytes / 1000).toFixed(1)} kB`,
  ].join(" · ");
}

function figures(finished: Finished): string {
  const steps = finished.tokens.length - (finished.reason === "stop" ? 0 : 1);
  const speed = finished.decodeSeconds > 0 ? ` · ${(steps / finished.decodeSeconds).toFixed(1)} tokens/s` : "";
  const first = `first after ${(finished.prefillSeconds * 1000).toFixed(0)} ms`;
  const end = { stop: "", length: " · cut at the limit", aborted: " · stopped" }[finished.reason];
  return `${finished.tokens.length} tokens · ${first}${speed}${end}`;
}

function setAnswering(now: boolean): void {
  answering = now;
  element<HTMLButtonElement>("ask").disabled = now || !ready;
  element("stop").hidden = !now;
}

function showFailure(during: Request["type"], message: string): void {
  element("error-text").textContent = message;
  element("error").hidden = false;
  if (during === "open") {
    element("loading").hidden = true;
    element("model-name").textContent = "No model";
  }
  if (during === "open" || during === "ask") setAnswering(false);
}

function hideError(): void {
  element("error").hidden = true;
}

async function loadAdapter(file: File): Promise<void> {
  hideError();
  try {
    const content = await file.arrayBuffer();
    send({ type: "adapter", name: file.name.replace(/\.safetensors$/, ""), file: content }, [content]);
  } catch (error) {
    showFailure("adapter", `cannot read ${file.name}: ${String(error)}`);
  }
}

async function take(files: File[], folder?: string): Promise<void> {
  if (files.some((file) => file.name === "reft_edge.json")) {
    open({ name: folder ?? "the dropped files", files });
    return;
  }
  const found = files.filter((file) => file.name.endsWith(".safetensors"));
  for (const file of found) await loadAdapter(file);
  if (found.length === 0) {
    const what = folder === undefined ? files.map((file) => file.name).join(", ") || "nothing" : `the folder ${folder}`;
    showFailure("adapter", `${what} is neither an adapter (.safetensors) nor a folder that \`reft-edge export\` wrote`);
  }
}

form.onsubmit = (event) => {
  event.preventDefault();
  if (answering || !ready) return;
  hideError();
  for (const side of ["base", "steered"] satisfies Side[]) {
    element(side).textContent = "";
    element(`${side}-figures`).textContent = "";
  }
  setAnswering(true);
  send({
    type: "ask",
    prompt: prompt.value,
    adapters: inUse === undefined ? {} : { [inUse]: Number(scale.value) },
    maxTokens: Number(maxTokens.value),
  });
};

prompt.onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
};

scale.oninput = () => {
  element("scale-value").textContent = Number(scale.value).toFixed(2);
};

device.onchange = () => {
  if (source !== undefined) open(source);
};

element("stop").onclick = () => send({ type: "stop" });
element("dismiss").onclick = hideError;

for (const [id, act] of [
  ["folder", (files: File[]) => take(files, files[0]?.webkitRelativePath.split("/")[0])],
  ["adapter", (files: File[]) => take(files)],
] as const) {
  const input = element<HTMLInputElement>(id);
  input.onchange = () => {
    const files = [...(input.files ?? [])];
    input.value = "";
    if (files.length > 0) void act(files);
  };
}

document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
};
document.ondragleave = (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dragging");
};
document.ondrop = async (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer === null) return;
  const { files, folder } = await droppedFiles(event.dataTransfer);
  await take(files, folder);
};

showAdapters();

/** The GPU, where there is one, is the faster choice. */
async function offerDevices(): Promise<void> {
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  if (gpu == null) return;
  element("device-choice").hidden = false;
  device.value = "webgpu" satisfies Device;
}

/** A folder on this server: `?model=smol-int4`, or `model` beside the page. */
async function openServed(): Promise<void> {
  const asked = new URLSearchParams(location.search).get("model");
  const url = new URL(`${asked ?? "model"}/`, location.href);
  if (url.origin !== location.origin) {
    return showFailure("open", `${url.href} is on another server; the page opens folders of its own server only`);
  }
  if (asked === null) {
    const manifest = await fetch(new URL("reft_edge.json", url), { method: "HEAD" }).catch(() => undefined);
    if (manifest?.ok !== true) return;
  }
  open({ url: url.href });
}
void offerDevices().then(openServed);
