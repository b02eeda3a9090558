import { h, percent, s, shown } from "./dom";
import { rows, sharesOf, tokenAt, type Drawn } from "./lines";
import { clamp, windowAround, type Store, type Token } from "./store";

const CELL = 15;
const MOST_CELLS = 48; // a side of the window
const WORD = 92;

/** How many tokens a heatmap of so many pixels shows on each side. */
export function cellsShown(width: number): number {
  return clamp(Math.floor((width - WORD) / CELL), 8, MOST_CELLS);
}

/** Rows look at columns; the arrows walk from cell to cell. */
export function heatmap(store: Store, width: number, tell: (text: string) => void): Drawn {
  const size = cellsShown(width);
  const [from, to] = [rows(store, "query", size), rows(store, "key", size)];
  const [right, bottom] = [WORD + to.length * CELL, WORD + from.length * CELL];
  const weights = from.map((query) => store.weights!.row(store.state.heads, query));
  const found = { query: new Set(store.matches("query")), key: new Set(store.matches("key")) };

  const cells = from.map((query, i) =>
    s("g", {}, ...to.map((key, j) =>
      s("rect", {
        x: WORD + j * CELL, y: WORD + i * CELL, width: CELL - 1, height: CELL - 1, class: "weight",
        "fill-opacity": (weights[i]![key]! ** 0.6).toFixed(3), "data-query": query, "data-key-token": key,
      }),
    )),
  );
  const cursor = s("rect", { width: CELL + 1, height: CELL + 1, class: "cursor", visibility: "hidden" });
  const letters = Math.floor((WORD - 12) / 7.3);

  function word(role: "query" | "key", index: number, place: number): SVGTextElement {
    const at = WORD + (place + 0.5) * CELL;
    const where = role === "query"
      ? { x: WORD - 6, y: at, class: "word end" }
      : { x: at, y: WORD - 6, transform: `rotate(-90 ${at} ${WORD - 6})`, class: "word" };
    const pinned = store.state.pinned;
    const classes = [where.class, found[role].has(index) && "found", pinned?.role === role && pinned.index === index && "pinned"];
    return s("text", {
      ...where, class: classes.filter(Boolean).join(" "), "data-role": role, "data-token": index,
      "data-key": `${role}-${index}`,
    }, shown(tokenAt(store, role, index), letters));
  }

  function say(query: number, key: number): void {
    const weight = weights[from.indexOf(query)]?.[key] ?? 0;
    const [one, other] = [shown(tokenAt(store, "query", query)), shown(tokenAt(store, "key", key))];
    tell(`${query} “${one}” gives ${key} “${other}” ${percent(weight)}`);
  }

  function place(query: number, key: number): void {
    store.cell = { query, key };
    cursor.setAttribute("x", String(WORD + to.indexOf(key) * CELL - 1));
    cursor.setAttribute("y", String(WORD + from.indexOf(query) * CELL - 1));
    cursor.setAttribute("visibility", "visible");
    say(query, key);
  }

  function walk(event: KeyboardEvent): void {
    const step = ({ ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] } as const)[
      event.key as "ArrowUp"
    ];
    if (!step) return;
    event.preventDefault();
    const query = clamp(store.cell.query + step[0], 0, store.side("query").tokens.length - 1);
    const key = clamp(store.cell.key + step[1], 0, store.side("key").tokens.length - 1);
    if (from.includes(query) && to.includes(key)) return place(query, key);
    store.cell = { query, key };
    // Windows that move together cannot follow both.
    if (step[0]) store.scroll("query", windowAround(query, from[0]!, from.length));
    else store.scroll("key", windowAround(key, to[0]!, to.length));
    store.focus("heatmap");
  }

  /** Where the keyboard was, if that is shown. */
  function resume(): void {
    const { query, key } = store.cell;
    place(from.includes(query) ? query : from[0]!, to.includes(key) ? key : to[0]!);
  }

  const element = s(
    "svg",
    {
      width: right + 1, height: bottom + 1, viewBox: `0 0 ${right + 1} ${bottom + 1}`, class: "heatmap", tabindex: 0,
      role: "application", "aria-label": "weights as a heatmap; the arrows walk from cell to cell", "data-key": "heatmap",
      keydown: walk,
      focus: resume,
      blur: () => cursor.setAttribute("visibility", "hidden"),
      pointermove: (event: PointerEvent) => {
        const { query, keyToken } = (event.target as SVGElement).dataset;
        if (query !== undefined && keyToken !== undefined) place(Number(query), Number(keyToken));
      },
    },
    s("rect", { x: WORD - 1, y: WORD - 1, width: right - WORD + 1, height: bottom - WORD + 1, class: "frame" }),
    ...cells,
    ...from.map((query, i) => word("query", query, i)),
    ...to.map((key, j) => word("key", key, j)),
    cursor,
  );

  function hover(token: Token | null): void {
    if (!token) return;
    const shares = sharesOf(store, token);
    const best = shares.indexOf(Math.max(...shares));
    tell(
      token.role === "query"
        ? `${token.index} “${shown(tokenAt(store, "query", token.index))}” looks most at ${best} “${shown(tokenAt(store, "key", best))}”: ${percent(shares[best]!)}`
        : `${token.index} “${shown(tokenAt(store, "key", token.index))}” is looked at most by ${best} “${shown(tokenAt(store, "query", best))}”: ${percent(shares[best]!)}`,
    );
  }

  return { element: h("div", { class: "drawing" }, element), hover };
}
