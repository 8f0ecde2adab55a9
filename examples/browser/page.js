import * as ort from "onnxruntime-web/wasm";
import wasmModule from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import wasmBinary from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import { folderOf, SteeredModel } from "reft-edge-web";

ort.env.wasm.wasmPaths = { mjs: wasmModule, wasm: wasmBinary };
const [folder, adapter, prompt, ask, answer] = document.querySelectorAll("input, button, pre");
let model;

/** Do something when an event comes; what goes wrong is shown where the answer would be. */
function on(element, event, act) {
  element.addEventListener(event, async () => {
    ask.disabled = true;
    await act().catch((error) => (answer.textContent = error.message));
    ask.disabled = model === undefined;
  });
}

on(folder, "change", async () => {
  model = await SteeredModel.open(ort, folderOf("exported", folder.files), { unpack: true });
});

on(ask, "click", async () => {
  const [file] = adapter.files;
  if (file) model.loadAdapter(new Uint8Array(await file.arrayBuffer()), "task");
  answer.textContent = "";
  for await (const piece of model.stream(prompt.value, { adapters: file ? { task: 1 } : {} })) {
    answer.textContent += piece;
  }
});
