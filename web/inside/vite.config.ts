import { defineConfig } from "vite";

// One file for pages that are opened from disk: no modules, no requests.
export default defineConfig({
  build: {
    target: "es2023",
    outDir: "../src/polyhead/explain/assets",
    emptyOutDir: true,
    lib: { entry: "inside/src/element.ts", name: "PolyheadInside", formats: ["iife"], fileName: () => "inside.js" },
  },
});
