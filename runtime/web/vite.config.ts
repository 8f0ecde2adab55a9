import { defineConfig } from "vite";

// Pages that are isolated so may use WebAssembly threads.
const headers = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

export default defineConfig({
  root: "page",
  base: "./",
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser"] },
  worker: { format: "es" },
  build: { outDir: "../dist", emptyOutDir: true, target: "es2022", chunkSizeWarningLimit: 1000 },
  preview: { headers },
});
