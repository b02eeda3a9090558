// Diagrams in the colours of the page; it is drawn again when the reader changes these.
const kept = new Map();
const isDark = () => {
  const chosen = document.body.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
};
const draw = () => {
  mermaid.initialize({ startOnLoad: false, theme: isDark() ? "dark" : "neutral" });
  for (const node of document.querySelectorAll("pre.mermaid")) {
    if (!kept.has(node)) kept.set(node, node.textContent);
    node.removeAttribute("data-processed");
    node.textContent = kept.get(node);
  }
  mermaid.run({ querySelector: "pre.mermaid" });
};
document.addEventListener("DOMContentLoaded", () => {
  draw();
  new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-theme"] });
});
