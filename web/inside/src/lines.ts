import { colour, h, percent, s, shown } from "./dom";
import type { Role, Store, Token } from "./store";

const ROW = 20;
const LEAST = 0.02; // thinner lines are not drawn
const LETTER = 7.3;
export const LINES_SHOWN = 32;

export interface Drawn {
  element: Element;
  /** Show a token's own weights alone; null shows all again. */
  hover(token: Token | null): void;
}

/** Two columns of tokens and a line for each weight between them, of a colour for each head. */
export function lines(store: Store, width: number): Drawn {
  const [from, to] = [rows(store, "query"), rows(store, "key")];
  const height = ROW * (2 + Math.max(from.length, to.length));
  const label = Math.min(220, width * 0.34);
  const [left, right] = [label, width - label];
  const y = (token: number, all: number[]) => ROW * (1.5 + token - all[0]!);
  const strokes = s("g", { class: "strokes" });
  const marks = { query: new Map<number, SVGTextElement>(), key: new Map<number, SVGTextElement>() };
  const letters = Math.floor((label - 46) / LETTER);

  function column(role: Role, all: number[]): Element[] {
    const isLeft = role === "query";
    const found = new Set(store.matches(role));
    return all.map((index) => {
      const at = y(index, all);
      const share = s("text", { x: isLeft ? 2 : width - 2, y: at, class: isLeft ? "share" : "share end" });
      marks[role].set(index, share);
      const pinned = store.state.pinned;
      const classes = ["token", found.has(index) && "found", pinned?.role === role && pinned.index === index && "pinned"];
      return s(
        "g",
        {
          class: classes.filter(Boolean).join(" "), tabindex: 0, role: "button", "data-role": role, "data-token": index,
          "data-key": `${role}-${index}`,
          "aria-label": `${isLeft ? "looking" : "looked at"}: ${shown(tokenAt(store, role, index))}, token ${index}`,
        },
        s("rect", { x: isLeft ? 0 : right, y: at - ROW / 2, width: label, height: ROW, class: "ground" }),
        s("text", { x: isLeft ? left - 8 : right + 8, y: at, class: isLeft ? "word end" : "word" },
          shown(tokenAt(store, role, index), letters)),
        share,
        s("title", {}, `${index}: ${shown(tokenAt(store, role, index))}`),
      );
    });
  }

  const beyond = s("g", { class: "beyond" });
  const element = s(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", class: "lines", "aria-label": "weights as lines" },
    s("text", { x: left - 8, y: 11, class: "label end" }, "looks"),
    s("text", { x: right + 8, y: 11, class: "label" }, "is looked at"),
    strokes, beyond, ...column("query", from), ...column("key", to),
  );

  function hover(token: Token | null): void {
    const weights = store.weights!;
    const { heads } = store.state;
    const drawn: Element[] = [];
    const asks = (index: number) => !token || token.role === "key" || token.index === index;
    for (const query of from.filter(asks)) {
      heads.forEach((head, number) => {
        const row = weights.row([head], query);
        for (const key of to) {
          if (token?.role === "key" && token.index !== key) continue;
          const weight = row[key]!;
          if (weight < LEAST) continue;
          const [y0, y1, middle] = [y(query, from), y(key, to), (left + right) / 2];
          drawn.push(s("path", {
            d: `M${left},${y0}C${middle},${y0} ${middle},${y1} ${right},${y1}`,
            style: `stroke: ${colour(number)}`, "stroke-opacity": Math.min(1, weight ** 0.8).toFixed(3),
            "stroke-width": (0.6 + 2.4 * weight).toFixed(2),
          }));
        }
      });
    }
    strokes.replaceChildren(...drawn);
    write(token);
  }

  /** The shares of the token's own weights beside the other side's tokens, and what lies beyond the window. */
  function write(token: Token | null): void {
    for (const role of ["query", "key"] as const) {
      for (const mark of marks[role].values()) mark.textContent = "";
    }
    beyond.replaceChildren();
    if (!token) return;
    const shares = sharesOf(store, token);
    const other = token.role === "query" ? "key" : "query";
    for (const [index, mark] of marks[other].entries()) {
      if (shares[index]! >= 0.005) mark.textContent = percent(shares[index]!);
    }
    const all = other === "key" ? to : from;
    const ends = [
      ["earlier", 0, all[0]!, ROW * 0.55],
      ["later", all.at(-1)! + 1, shares.length, height - ROW * 0.4],
    ] as const;
    for (const [name, begin, end, at] of ends) {
      const rest = shares.slice(begin, end).reduce((sum, share) => sum + share, 0);
      if (rest < 0.005) continue;
      const best = shares.slice(begin, end).indexOf(Math.max(...shares.slice(begin, end))) + begin;
      const x = (left + right) / 2;
      beyond.append(s("text", {
        x, y: at, class: "middle further", role: "button", tabindex: 0,
        click: () => store.scroll(other, best), 
      }, `${percent(rest)} ${name}`));
    }
  }

  return { element: h("div", { class: "drawing" }, element), hover };
}

/** What a token gives all keys, or what it is given by all queries. */
export function sharesOf(store: Store, token: Token): Float32Array {
  const { heads } = store.state;
  const weights = store.weights!;
  return token.role === "query" ? weights.row(heads, token.index) : weights.column(heads, token.index);
}

/** The tokens of a side that the window shows. */
export function rows(store: Store, role: Role, size = LINES_SHOWN): number[] {
  const all = store.side(role).tokens.length;
  const first = Math.max(0, Math.min(store.state.first[role], all - size));
  return Array.from({ length: Math.min(size, all) }, (_, i) => first + i);
}

export function tokenAt(store: Store, role: Role, index: number): string {
  return store.side(role).tokens[index] ?? "";
}
