import type { Head } from "./data";
import { h, MOST_HEADS, s, shown } from "./dom";
import { clamp, sameHead, type Store } from "./store";

const CELL = 17;
const MARGIN = 30;

/** Layers by heads, shaded by a measure; the arrows move, Shift adds a head, a layer's number takes all. */
export function picker(store: Store): HTMLElement {
  const { stack, state } = store;
  const names = Object.keys(stack.measures);
  const measure = names.includes(state.measure) ? state.measure : (names[0] ?? "");
  const choose = h(
    "select",
    {
      "aria-label": "what the heads are shaded by",
      "data-key": "measure",
      change: (event: Event) => store.set({ measure: (event.target as HTMLSelectElement).value }),
    },
    ...names.map((name) => h("option", { value: name, selected: name === measure }, name)),
  );
  return h(
    "section",
    { class: "picker", "aria-label": "layers and heads" },
    h("h3", {}, "Layers and heads"),
    names.length > 0 && h("label", {}, "shaded by ", choose),
    h("div", { class: "scroller" }, grid(store, stack.measures[measure] ?? [])),
    h("p", { class: "hint" }, chosenNames(store)),
  );
}

function grid(store: Store, values: (number | null)[][]): SVGSVGElement {
  const { stack, state } = store;
  const most = Math.max(1e-9, ...values.flat().map((value) => value ?? 0));
  const [width, height] = [MARGIN + stack.heads * CELL, 16 + stack.layers.length * CELL];
  const last = state.heads.at(-1) ?? [0, 0];
  const cells = stack.layers.map((name, layer) =>
    Array.from({ length: stack.heads }, (_, head) => {
      const at: Head = [layer, head];
      const number = state.heads.findIndex((one) => sameHead(one, at));
      const value = values[layer]?.[head];
      const said = value === null || value === undefined ? "" : `: ${value.toFixed(2)}`;
      return s(
        "rect",
        {
          x: MARGIN + head * CELL + 1, y: 16 + layer * CELL + 1, width: CELL - 2, height: CELL - 2, rx: 2,
          class: number >= 0 ? "cell chosen" : "cell", role: "gridcell",
          "fill-opacity": (0.06 + 0.94 * Math.max(0, value ?? 0) / most).toFixed(3),
          "aria-selected": String(number >= 0), "aria-label": `${name}, head ${head}${said}`,
          tabindex: sameHead(at, last) ? 0 : -1, "data-key": `head-${layer}-${head}`,
          click: (event: MouseEvent) => choose(store, at, event.shiftKey || event.ctrlKey || event.metaKey),
          keydown: (event: KeyboardEvent) => move(store, at, event),
        },
        s("title", {}, `layer ${stack.numbers[layer]} (${name}), head ${head}${said}`),
      );
    }),
  );
  const layers = stack.layers.map((name, layer) =>
    s(
      "text",
      {
        x: MARGIN - 5, y: 16 + (layer + 0.5) * CELL, class: "label end", role: "rowheader", tabindex: -1,
        click: () => store.set({ heads: allOf(store, layer) }),
      },
      s("title", {}, `all heads of ${name}`), String(stack.numbers[layer]),
    ),
  );
  const heads = Array.from({ length: stack.heads }, (_, head) =>
    s("text", { x: MARGIN + (head + 0.5) * CELL, y: 9, class: "label middle" }, String(head)),
  );
  return s(
    "svg",
    {
      width, height, viewBox: `0 0 ${width} ${height}`, role: "grid", "aria-label": "heads by layer",
      "aria-multiselectable": "true",
    },
    s("g", { "aria-hidden": "true" }, ...heads),
    ...cells.map((row, layer) => s("g", { role: "row" }, ...[layers[layer] ?? []].flat(), ...row)),
  );
}

function allOf(store: Store, layer: number): Head[] {
  return Array.from({ length: Math.min(MOST_HEADS, store.stack.heads) }, (_, head) => [layer, head] as const);
}

/** One head alone, or one more or less. */
function choose(store: Store, at: Head, adds: boolean): void {
  const { heads } = store.state;
  if (!adds) return store.set({ heads: [at] });
  const others = heads.filter((one) => !sameHead(one, at));
  const isNew = others.length === heads.length;
  if (isNew) store.set({ heads: [...others.slice(1 - MOST_HEADS), at] });
  else if (others.length > 0) store.set({ heads: others });
}

const STEPS: Record<string, readonly [number, number]> = {
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
};

function move(store: Store, [layer, head]: Head, event: KeyboardEvent): void {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    return choose(store, [layer, head], event.shiftKey);
  }
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  const { layers, heads } = store.stack;
  const to: Head = [clamp(layer + step[0], 0, layers.length - 1), clamp(head + step[1], 0, heads - 1)];
  choose(store, to, event.shiftKey);
  store.focus(`head-${to[0]}-${to[1]}`);
}

function chosenNames(store: Store): string {
  const { heads } = store.state;
  const names = heads.map(([layer, head]) => `${store.stack.numbers[layer]}.${head}`).join(", ");
  const [layer] = heads[0] ?? [0];
  const one = heads.length === 1 ? ` (${shown(store.stack.layers[layer] ?? "")})` : ", their mean in heatmap and text";
  return `layer.head ${names}${one}`;
}
