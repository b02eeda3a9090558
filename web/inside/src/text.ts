import type { Picture } from "./data";
import { h, percent, s, shown } from "./dom";
import { sharesOf, tokenAt, type Drawn } from "./lines";
import type { Role, Store, Token } from "./store";

const WIDEST = 384; // pixels of a picture

/** The texts as they stand; what a token looks at is shaded, on a picture too. */
export function text(store: Store, width: number): Drawn {
  const roles: Role[] = store.isOneText ? ["query"] : ["query", "key"];
  const parts = roles.map((role) => side(store, role, width));
  const element = h(
    "div",
    { class: "texts" },
    ...parts.map((part, i) =>
      h("div", {}, !store.isOneText && h("h3", {}, i === 0 ? "looks" : "is looked at"), part.element),
    ),
  );

  function hover(token: Token | null): void {
    // Of all queries together the root is shaded, or else nothing but a sink would be seen.
    const shares = token ? sharesOf(store, token) : store.weights!.received(store.state.heads).map(Math.sqrt);
    const other: Role = !token || token.role === "query" ? "key" : "query";
    const most = Math.max(1e-9, ...shares);
    roles.forEach((role, i) => {
      const isShaded = store.isOneText || role === other;
      parts[i]!.shade(isShaded ? shares : null, most, token && (store.isOneText || token.role === role) ? token.index : null, !!token);
    });
  }

  return { element, hover };
}

interface Part {
  element: Element;
  shade(shares: Float32Array | null, most: number, active: number | null, says: boolean): void;
}

function side(store: Store, role: Role, width: number): Part {
  const { tokens, picture } = store.side(role);
  const isPatch = (index: number) =>
    !!picture && index >= picture.first && index < picture.first + picture.rows * picture.columns;
  const found = new Set(store.matches(role));
  const shaded = new Map<number, Element>();
  const words = tokens.flatMap((token, index) => {
    if (isPatch(index)) return [];
    const word = h(
      "span",
      {
        class: found.has(index) ? "flow found" : "flow", "data-role": role, "data-token": index, tabindex: 0, role: "button",
        "data-key": `${role}-${index}`, title: `${index}`,
      },
      shown(token),
    );
    shaded.set(index, word);
    // Lines break before words, as the space before them is written out.
    return token.includes("\n") ? [word, h("br")] : /^\s/.test(token) ? [h("wbr"), word] : [word];
  });
  const drawn = picture ? over(picture, Math.min(WIDEST, width - 8), role, shaded) : null;

  function shade(shares: Float32Array | null, most: number, active: number | null, says: boolean): void {
    for (const [index, element] of shaded) {
      const share = shares ? shares[index]! : 0;
      const strength = (share / most).toFixed(3);
      if (isPatch(index)) element.setAttribute("fill-opacity", (0.85 * Number(strength)).toFixed(3));
      else (element as HTMLElement).style.setProperty("--share", strength);
      element.classList.toggle("active", index === active);
      element.setAttribute("aria-label", `${shown(tokenAt(store, role, index))}, token ${index}${shares && says ? `, ${percent(share)}` : ""}`);
    }
  }

  return { element: h("div", { class: "side" }, drawn, h("p", { class: "flowing" }, ...words)), shade };
}

/** The picture under its patches. */
function over(picture: Picture, width: number, role: Role, shaded: Map<number, Element>): SVGSVGElement {
  const edge = width / picture.columns;
  const height = edge * picture.rows;
  const patches: Element[] = [];
  for (let row = 0; row < picture.rows; row++) {
    for (let column = 0; column < picture.columns; column++) {
      const index = picture.first + row * picture.columns + column;
      const patch = s(
        "rect",
        {
          x: column * edge, y: row * edge, width: edge, height: edge, class: "patch", "data-role": role, "data-token": index,
          "data-key": `${role}-${index}`, role: "button", tabindex: row || column ? -1 : 0,
        },
        s("title", {}, `row ${row}, column ${column}`),
      );
      shaded.set(index, patch);
      patches.push(patch);
    }
  }
  return s(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, class: "picture", role: "group", "aria-label": "the image and its patches" },
    s("image", { href: picture.src, width, height, preserveAspectRatio: "none" }),
    ...patches,
  );
}
