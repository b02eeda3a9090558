import type { Finding } from "./data";
import { h } from "./dom";
import type { Store } from "./store";
import { LINES_SHOWN } from "./lines";

const MOST_SHOWN = 8;

/** What to look for: each finding with the heads that show it, to be clicked. */
export function findings(store: Store): Element | null {
  const found = store.data.findings.filter((finding) => finding.heads.length > 0);
  const missed = store.data.findings.filter((finding) => finding.heads.length === 0);
  if (store.data.findings.length === 0) return null;
  return h(
    "details",
    {
      class: "findings", open: store.showsFindings,
      toggle: (event: Event) => { store.showsFindings = (event.target as HTMLDetailsElement).open; },
    },
    h("summary", { "data-key": "findings" }, "What to look for"),
    h("ul", {}, ...found.map((finding) => item(store, finding))),
    missed.length > 0 && h("p", { class: "hint" }, missed.map(({ title, text }) => `${title}: ${text}`).join(" ")),
  );
}

function item(store: Store, finding: Finding): Element {
  const buttons = finding.heads.slice(0, MOST_SHOWN).map(([layer, head]) =>
    h(
      "button",
      { type: "button", "data-key": `finding-${finding.title}-${layer}-${head}`, click: () => show(store, finding, layer, head) },
      `${store.data.stacks[finding.stack]?.numbers[layer]}.${head}`,
    ),
  );
  return h(
    "li",
    {},
    h("strong", {}, finding.title), " ", finding.text,
    buttons.length > 0 && h("div", { class: "heads", role: "group", "aria-label": `layer.head of ${finding.title}` }, ...buttons),
  );
}

/** The head, and the token that shows what is meant; each window holds its end of the longest share. */
function show(store: Store, finding: Finding, layer: number, head: number): void {
  const { token, stack } = finding;
  const before = (index: number) => Math.max(0, index - Math.floor(LINES_SHOWN * 0.7));
  const query = token === null ? 0 : before(token);
  let key = query;
  if (token !== null && store.weights && stack === store.state.stack) {
    const shares = store.weights.row([[layer, head]], token);
    const best = shares.indexOf(Math.max(...shares));
    if (best < key || best >= key + LINES_SHOWN) key = before(best);
  }
  store.set({
    stack, heads: [[layer, head]],
    view: store.state.view === "lens" ? "lines" : store.state.view,
    pinned: token === null ? null : { role: "query", index: token },
    first: { query, key }, together: query === key,
  });
}
