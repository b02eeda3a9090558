import { h, s } from "./dom";
import { clamp, type Role, type Store } from "./store";

const HEIGHT = 22;

/** A long text from end to end, its window to be moved; nothing where all of it is shown. */
export function strip(store: Store, role: Role, size: number, width: number, label: string): Element | null {
  const count = store.side(role).tokens.length;
  if (count <= size) return null;
  const first = clamp(store.state.first[role], 0, count - size);
  const [scale, most] = [width / count, count - size];
  const to = (token: number) => store.scroll(role, clamp(Math.round(token), 0, most));
  const received = store.weights && role === "key" ? store.weights.received(store.state.heads) : null;
  const highest = received ? Math.max(...received) : 1;
  const bars = received
    ? Array.from(received, (sum, i) => s("rect", {
        x: i * scale, y: 0, width: Math.max(1, scale), height: HEIGHT, class: "weight",
        "fill-opacity": (Math.sqrt(sum / highest) * 0.6).toFixed(3),
      }))
    : [];
  const found = store.matches(role).map((i) => s("rect", { x: i * scale, y: HEIGHT - 5, width: Math.max(2, scale), height: 5, class: "match" }));
  const keys: Record<string, number> = {
    ArrowLeft: first - 1, ArrowUp: first - 1, ArrowRight: first + 1, ArrowDown: first + 1,
    PageUp: first - size, PageDown: first + size, Home: 0, End: most,
  };
  const key = `strip-${role}`;
  const drag = (event: PointerEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    to(((event.clientX - box.left) / box.width) * count - size / 2);
  };
  const svg = s(
    "svg",
    {
      width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, class: "strip", tabindex: 0, role: "slider", "data-key": key,
      "aria-label": `first token shown: ${label}`, "aria-valuemin": 0, "aria-valuemax": most, "aria-valuenow": first,
      pointerdown: (event: PointerEvent) => { event.preventDefault(); drag(event); store.focus(key); },
      pointermove: (event: PointerEvent) => { if (event.buttons === 1) drag(event); },
      keydown: (event: KeyboardEvent) => {
        const wanted = keys[event.key];
        if (wanted === undefined) return;
        event.preventDefault();
        to(wanted);
      },
    },
    ...bars, ...found,
    s("rect", { x: first * scale, y: 1, width: size * scale, height: HEIGHT - 2, rx: 3, class: "window" }),
  );
  return h("div", { class: "stripped" }, h("span", { class: "hint" }, `${label}: ${first} to ${first + size - 1} of ${count}`), svg);
}
