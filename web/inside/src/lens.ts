import type { Lens } from "./data";
import { h, percent, s, shown } from "./dom";
import type { Drawn } from "./lines";
import { clamp, windowAround, type Store, type Token } from "./store";

const [WIDE, TALL, MARGIN, TOP] = [84, 21, 34, 26] as const;

/** How many tokens a table of so many pixels shows. */
export function lensShown(width: number): number {
  return Math.max(3, Math.floor((width - MARGIN) / WIDE));
}

/** What each layer would answer after each token, the last layer on top, shaded by how sure it is. */
export function lens(store: Store, width: number, tell: (text: string) => void): Drawn {
  const table = store.data.lens!;
  const tokens = store.data.sides[table.side]!.tokens;
  const size = Math.min(lensShown(width), table.answers[0]?.length ?? 0);
  const first = clamp(store.state.first.query, 0, (table.answers[0]?.length ?? 0) - size);
  const columns = Array.from({ length: size }, (_, i) => first + i);
  const order = table.layers.map((_, layer) => table.layers.length - 1 - layer);
  const cells = new Map<string, SVGGElement>();
  let active = { layer: order[0] ?? 0, token: first };

  const drawn = order.flatMap((layer, row) =>
    columns.map((token, column) => {
      const [answer, probability] = table.answers[layer]![token]![0]!;
      const [x, y] = [MARGIN + column * WIDE, TOP + row * TALL];
      const cell = s(
        "g",
        {
          "data-layer": layer, "data-place": token,
          class: probability > 0.55 ? "answer sure" : "answer",
        },
        s("rect", { x, y, width: WIDE - 2, height: TALL - 2, rx: 2, class: "weight", "fill-opacity": (0.04 + 0.9 * probability).toFixed(3) }),
        s("text", { x: x + WIDE / 2 - 1, y: y + TALL / 2 - 0.5, class: "word middle" }, shown(answer, 10)),
      );
      cells.set(`${layer}-${token}`, cell);
      return cell;
    }),
  );

  function place(layer: number, token: number): void {
    cells.get(`${active.layer}-${active.token}`)?.classList.remove("active");
    active = { layer, token };
    cells.get(`${layer}-${token}`)?.classList.add("active");
    tell(`layer ${layer}, after ${token} “${shown(tokens[token] ?? "")}”: ${best(table, layer, token)}`);
  }

  function walk(event: KeyboardEvent): void {
    const step = ({ ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] } as const)[event.key as "ArrowUp"];
    if (!step) return;
    event.preventDefault();
    const layer = clamp(active.layer + step[0], 0, table.layers.length - 1);
    const token = clamp(active.token + step[1], 0, (table.answers[0]?.length ?? 1) - 1);
    if (columns.includes(token)) return place(layer, token);
    store.set({ first: { ...store.state.first, query: windowAround(token, first, size) } });
    store.focus("lens");
  }

  const [w, tall] = [MARGIN + size * WIDE, TOP + table.layers.length * TALL];
  const element = s(
    "svg",
    {
      width: w, height: tall, viewBox: `0 0 ${w} ${tall}`, class: "lens", tabindex: 0, role: "application", "data-key": "lens",
      "aria-label": "what each layer would answer; the arrows walk from cell to cell",
      keydown: walk,
      focus: () => place(active.layer, active.token),
      pointerover: (event: PointerEvent) => {
        const cell = (event.target as Element).closest<SVGGElement>("[data-place]");
        if (cell) place(Number(cell.dataset["layer"]), Number(cell.dataset["place"]));
      },
    },
    ...columns.map((token, column) =>
      s("text", { x: MARGIN + (column + 0.5) * WIDE, y: 12, class: "word middle" },
        shown(tokens[token] ?? "", 10), s("title", {}, `${token}: ${shown(tokens[token] ?? "")}`)),
    ),
    ...order.map((layer, row) =>
      s("text", { x: MARGIN - 6, y: TOP + (row + 0.5) * TALL, class: "label end" }, String(layer), s("title", {}, table.layers[layer] ?? "")),
    ),
    ...drawn,
  );
  const hover = (token: Token | null) => token && columns.includes(token.index) && place(active.layer, token.index);
  return { element: h("div", { class: "drawing" }, element), hover: (token) => void hover(token) };
}

function best(table: Lens, layer: number, token: number): string {
  return table.answers[layer]![token]!.map(([answer, share]) => `“${shown(answer)}” ${percent(share)}`).join(", ");
}
