import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

// Served by `polyhead serve` at /; during development `npm run dev` asks the server at 8000.
export default defineConfig({
  root: "play",
  base: "./",
  plugins: [svelte()],
  server: { proxy: Object.fromEntries(
    ["/v1", "/classify", "/tag", "/fill", "/answer", "/translate", "/explain", "/ready"].map((path) => [path, "http://127.0.0.1:8000"]),
  ) },
  build: { target: "es2023", outDir: "../../src/polyhead/serve/assets", emptyOutDir: true, modulePreload: { polyfill: false },
    rolldownOptions: { output: { entryFileNames: "page.js", assetFileNames: "page[extname]" } },
  },
});
