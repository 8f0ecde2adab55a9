import { fileURLToPath } from "node:url";

const web = (path) => fileURLToPath(new URL(`../../runtime/web/${path}`, import.meta.url));

/** In a project of your own these are installed packages; here they are what runtime/web is and has. */
const fromRuntimeWeb = {
  name: "from-runtime-web",
  enforce: "pre",
  resolveId(source) {
    if (source === "reft-edge-web") return web("src/index.ts");
    if (source.startsWith("onnxruntime-web")) return this.resolve(source, web("src/index.ts"), { skipSelf: true });
  },
};

export default {
  base: "./",
  cacheDir: web("node_modules/.vite-example"),
  plugins: [fromRuntimeWeb],
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser"] },
  server: { fs: { allow: [web("../..")] } },
};
