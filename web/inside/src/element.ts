import type { Inside } from "./data";
import { h, shown } from "./dom";
import { findings } from "./findings";
import { cellsShown, heatmap } from "./heatmap";
import { lens } from "./lens";
import { lines, LINES_SHOWN, sharesOf, type Drawn } from "./lines";
import { picker } from "./picker";
import { Store, windowAround, type Role, type State, type Token, type View } from "./store";
import { strip } from "./strip";
import style from "./style.css?inline";
import { text } from "./text";
import { isDark } from "./theme";
import { Weights } from "./weights";

const VIEWS: readonly (readonly [View, string])[] = [
  ["lines", "Lines"], ["heatmap", "Heatmap"], ["text", "Text"], ["lens", "Lens"],
];
const KEYS: readonly (readonly [string, string])[] = [
  ["/", "search tokens; Enter goes to the next"],
  ["v", "next view"],
  ["[ ]", "layer before, layer after"],
  ["{ }", "head before, head after"],
  ["PageUp PageDown", "move the window"],
  ["Tab, arrows", "walk through heads, tokens and cells"],
  ["Enter", "hold a token, or let it go"],
  ["Esc", "let all go"],
];
const NARROWEST = 280;

/** `<polyhead-inside>`: give it `data` (see data.ts); `theme` is "light" or "dark", or what the page is. */
export class InsideElement extends HTMLElement {
  static readonly observedAttributes = ["data-theme"];
  readonly #root = this.attachShadow({ mode: "open" });
  readonly #frame = h("div", { class: "frame" });
  readonly #readout = h("p", { class: "readout", role: "status", "aria-live": "polite" });
  readonly #watch = new ResizeObserver(() => this.#resized());
  #store: Store | null = null;
  #view: Drawn | null = null;
  #width = 0;
  #lost = "";

  constructor() {
    super();
    this.#root.append(h("style", {}, style), this.#frame);
    this.#root.addEventListener("keydown", (event) => this.#key(event as KeyboardEvent));
    for (const name of ["pointerover", "focusin"]) this.#root.addEventListener(name, (event) => this.#over(event));
    this.#root.addEventListener("pointerout", () => this.#hover(null));
    this.#root.addEventListener("click", (event) => this.#click(event));
  }

  connectedCallback(): void {
    if (!this.hasAttribute("theme")) this.setAttribute("theme", isDark(this) ? "dark" : "light");
    this.#watch.observe(this);
  }

  disconnectedCallback(): void {
    this.#watch.disconnect();
  }

  /** Everything that is shown; see `Inside`. */
  set data(data: Inside) {
    this.#store = new Store(data, (state, before) => this.#changed(state, before), (key) => this.#focus(key));
    const [first] = data.findings.filter((finding) => finding.heads.length > 0);
    const stack = first?.stack ?? 0;
    const picture = data.sides[data.stacks[stack]?.keys ?? -1]?.picture;
    this.#store.showsFindings = this.clientWidth >= 640;
    this.#store.state = {
      ...this.#store.state, stack,
      ...(first ? { heads: first.heads.slice(0, 1) } : {}),
      ...(picture ? { view: "text" as const } : {}),
    };
    void this.#load();
  }

  /** Show another stack, heads, view or token. */
  show(change: Partial<State>): void {
    this.#store?.set(change);
  }

  get shown(): State | undefined {
    return this.#store?.state;
  }

  async #load(): Promise<void> {
    const store = this.#store!;
    store.weights = null;
    if (store.data.stacks.length > 0) {
      const { stack } = store.state;
      try {
        const weights = await Weights.of(store.stack, store.data.sides);
        if (store !== this.#store || stack !== store.state.stack) return;
        store.weights = weights;
      } catch (error) {
        this.#frame.replaceChildren(h("p", { role: "alert" }, `The weights cannot be read (${String(error)}).`));
        return;
      }
    }
    this.#draw();
  }

  #changed(state: State, before: State): void {
    if (state.stack !== before.stack) {
      this.#lost = this.#focused();
      void this.#load();
    } else this.#draw();
    this.dispatchEvent(new CustomEvent("show", { detail: state }));
  }

  #resized(): void {
    const width = this.clientWidth;
    if (Math.abs(width - this.#width) > 4) {
      this.#width = width;
      this.#draw();
    }
  }

  #draw(): void {
    const store = this.#store;
    if (!store || (store.data.stacks.length > 0 && !store.weights)) return;
    const focused = this.#lost || this.#focused();
    const positions = [...this.#root.querySelectorAll(".scroller, .flowing")].map((part) => part.scrollTop);
    this.#lost = "";
    const isWide = this.clientWidth >= 640;
    const isLens = store.state.view === "lens";
    const aside = isLens || store.data.stacks.length === 0 ? null : h("aside", {}, picker(store));
    const main = h("main", {});
    this.#frame.replaceChildren(
      this.#bar(store),
      ...[findings(store)].filter((part) => part !== null),
      h("div", { class: aside ? "columns" : "" }, aside, main),
      this.#help(),
    );
    const room = main.clientWidth || (isWide ? this.clientWidth - 260 : this.clientWidth);
    const width = Math.max(NARROWEST, Math.min(room, 900));
    this.#view = this.#drawn(store, width);
    main.append(...this.#strips(store, width), this.#view.element, this.#readout);
    [...this.#root.querySelectorAll(".scroller, .flowing")].forEach((part, i) => (part.scrollTop = positions[i] ?? 0));
    this.#hover(null);
    if (focused) this.#focus(focused);
  }

  #drawn(store: Store, width: number): Drawn {
    const tell = (words: string) => (this.#readout.textContent = words);
    this.#readout.textContent = "";
    switch (store.state.view) {
      case "heatmap": return heatmap(store, width, tell);
      case "text": return text(store, width);
      case "lens": return lens(store, width, tell);
      default: return lines(store, width);
    }
  }

  #size(width: number): number {
    return this.#store!.state.view === "heatmap" ? cellsShown(width) : LINES_SHOWN;
  }

  #strips(store: Store, width: number): Element[] {
    const { view, together } = store.state;
    if (view !== "lines" && view !== "heatmap") return [];
    const asOne = together && store.isOneText;
    const size = this.#size(width);
    const parts = asOne
      ? [strip(store, "key", size, width, "tokens")]
      : [strip(store, "query", size, width, "looking"), strip(store, "key", size, width, "looked at")];
    const found = parts.filter((part) => part !== null);
    if (found.length > 0 && store.isOneText) {
      const box = h("input", {
        type: "checkbox", checked: together, "data-key": "together",
        change: (event: Event) => {
          const isOn = (event.target as HTMLInputElement).checked;
          const { key } = store.state.first;
          store.set({ together: isOn, ...(isOn ? { first: { query: key, key } } : {}) });
        },
      });
      found.push(h("label", { class: "together" }, box, " both sides move together"));
    }
    return found;
  }

  #bar(store: Store): Element {
    const { data, state } = store;
    const stacks = data.stacks.map(({ name }, number) =>
      h("button", {
        type: "button", "aria-pressed": String(number === state.stack && state.view !== "lens"), "data-key": `stack-${number}`,
        click: () => store.set({
          stack: number, heads: [[0, 0]], pinned: null, first: { query: 0, key: 0 }, view: state.view === "lens" ? "lines" : state.view,
        }),
      }, name),
    );
    const views = VIEWS.filter(([view]) => this.#has(view)).map(([view, name]) =>
      h("button", {
        type: "button", "aria-pressed": String(view === state.view), "data-key": `view-${view}`, click: () => store.set({ view }),
      }, name),
    );
    const search = h("input", {
      type: "search", placeholder: "search tokens", "aria-label": "search tokens", "data-key": "search", value: state.search,
      input: (event: Event) => store.set({ search: (event.target as HTMLInputElement).value }),
      keydown: (event: KeyboardEvent) => { if (event.key === "Enter") this.#next(event.shiftKey ? -1 : 1); },
    });
    const count = data.stacks.length > 0 && state.search ? store.matches("query").length : null;
    return h(
      "div",
      { class: "bar" },
      data.title !== "" && h("span", { class: "name" }, data.title),
      stacks.length > 1 && h("span", { class: "group", role: "group", "aria-label": "attention" }, ...stacks),
      views.length > 1 && h("span", { class: "group", role: "group", "aria-label": "views" }, ...views),
      data.stacks.length > 0 && search,
      count !== null && h("span", { class: "hint" }, `${count} found`),
    );
  }

  #has(view: View): boolean {
    const { data } = this.#store!;
    return view === "lens" ? data.lens !== null : data.stacks.length > 0;
  }

  #help(): Element {
    return h(
      "details",
      {},
      h("summary", {}, "Keys and what is shown"),
      h("p", {}, "A line or cell is the share of a token's attention that goes to another; the shares of a token sum to one."
        + this.#leftOut()),
      ...KEYS.map(([keys, what]) => h("p", {}, h("kbd", {}, keys), ` ${what}`)),
      h("p", {}, h("kbd", {}, "Shift"), " with a click or an arrow adds a head; a layer's number takes all of its heads."),
    );
  }

  #leftOut(): string {
    const least = this.#store!.data.stacks[this.#store!.state.stack]?.least ?? 0;
    return least > 0 ? ` Shares under ${(100 * least).toFixed(2)} % were left out to keep the page small.` : "";
  }

  /** The next token that is searched for, after the one that is held. */
  #next(step: number): void {
    const store = this.#store!;
    const role: Role = store.matches("query").length > 0 ? "query" : "key";
    const found = store.matches(role);
    if (found.length === 0) return;
    const { pinned, first } = store.state;
    const from = pinned?.role === role ? pinned.index : step > 0 ? -1 : Infinity;
    const index = step > 0 ? (found.find((i) => i > from) ?? found[0]!) : (found.findLast((i) => i < from) ?? found.at(-1)!);
    const begin = windowAround(index, first[role], this.#size(this.clientWidth));
    const both = store.isOneText && store.state.together ? { query: begin, key: begin } : { ...first, [role]: begin };
    store.set({ pinned: { role, index }, first: both });
  }

  #key(event: KeyboardEvent): void {
    const store = this.#store;
    if (!store || event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target as HTMLElement;
    if (event.key === "Escape") return store.set({ pinned: null, search: "" });
    if (target instanceof HTMLInputElement || target instanceof HTMLSelectElement) return;
    const { stack, state } = store;
    const views = VIEWS.map(([view]) => view).filter((view) => this.#has(view));
    const [layer, head] = state.heads.at(-1) ?? [0, 0];
    const turn = (value: number, count: number) => (value + count) % count;
    const go = (role: Role, by: number) => {
      const size = this.#size(this.clientWidth);
      const most = Math.max(0, store.side(role).tokens.length - size);
      store.scroll(role, Math.max(0, Math.min(most, state.first[role] + by * size)));
    };
    const actions: Record<string, () => void> = {
      "/": () => this.#focus("search"),
      v: () => store.set({ view: views[turn(views.indexOf(state.view) + 1, views.length)]! }),
      "[": () => store.set({ heads: [[turn(layer - 1, stack.layers.length), head]] }),
      "]": () => store.set({ heads: [[turn(layer + 1, stack.layers.length), head]] }),
      "{": () => store.set({ heads: [[layer, turn(head - 1, stack.heads)]] }),
      "}": () => store.set({ heads: [[layer, turn(head + 1, stack.heads)]] }),
      PageDown: () => go("key", 1),
      PageUp: () => go("key", -1),
      Enter: () => this.#hold(tokenOf(target)),
      " ": () => this.#hold(tokenOf(target)),
      ArrowDown: () => this.#walk(target, 1),
      ArrowUp: () => this.#walk(target, -1),
    };
    const isPage = event.key.startsWith("Page") && state.view === "text";
    const isOnToken = tokenOf(target) !== null;
    if (!actions[event.key] || event.defaultPrevented || isPage) return;
    if (["Enter", " ", "ArrowDown", "ArrowUp"].includes(event.key) && !isOnToken) return;
    event.preventDefault();
    actions[event.key]!();
  }

  /** From a token to the next, moving the window at its edge. */
  #walk(target: Element, step: number): void {
    const [store, token] = [this.#store!, tokenOf(target)!];
    const index = token.index + step;
    if (index < 0 || index >= store.side(token.role).tokens.length) return;
    const first = store.state.first[token.role];
    if (store.state.view === "lines") store.scroll(token.role, windowAround(index, first, LINES_SHOWN));
    this.#focus(`${token.role}-${index}`);
  }

  #over(event: Event): void {
    const token = tokenOf(event.composedPath()[0] as Element);
    if (token) this.#hover(token);
  }

  #click(event: Event): void {
    this.#hold(tokenOf(event.composedPath()[0] as Element));
  }

  /** Keep a token's own weights on view, or let them go where it is held. */
  #hold(token: Token | null): void {
    if (!token || !this.#store) return;
    const { pinned } = this.#store.state;
    const isHeld = pinned?.role === token.role && pinned.index === token.index;
    this.#store.set({ pinned: isHeld ? null : token });
  }

  #hover(token: Token | null): void {
    const store = this.#store;
    if (!store || !this.#view) return;
    const shownToken = token ?? store.state.pinned;
    this.#view.hover(shownToken);
    if (!store.weights || store.state.view === "heatmap" || store.state.view === "lens") return;
    this.#readout.textContent = shownToken ? said(store, shownToken) : "";
  }

  #focused(): string {
    return (this.#root.activeElement as HTMLElement | null)?.dataset["key"] ?? "";
  }

  #focus(key: string): void {
    const found = this.#root.querySelector<HTMLElement>(`[data-key="${CSS.escape(key)}"]`);
    if (found && found !== this.#root.activeElement) found.focus({ preventScroll: true });
    if (found instanceof HTMLInputElement && found.type === "search") found.setSelectionRange(found.value.length, found.value.length);
  }
}

/** The token that an element stands for. */
function tokenOf(element: Element | null): Token | null {
  const found = element?.closest?.<HTMLElement>("[data-token]");
  return found ? { role: found.dataset["role"] as Role, index: Number(found.dataset["token"]) } : null;
}

/** A token's five largest weights, as a sentence. */
function said(store: Store, token: Token): string {
  const shares = sharesOf(store, token);
  const other: Role = token.role === "query" ? "key" : "query";
  const name = (role: Role, index: number) => `${index} “${shown(store.side(role).tokens[index] ?? "")}”`;
  const best = [...shares.keys()].sort((one, two) => shares[two]! - shares[one]!).slice(0, 5).filter((i) => shares[i]! >= 0.0005);
  const list = best.map((i) => `${name(other, i)} ${(100 * shares[i]!).toFixed(1)} %`).join(", ");
  return `${name(token.role, token.index)} ${token.role === "query" ? "looks at" : "is looked at by"} ${list || "nothing"}`;
}

if (!customElements.get("polyhead-inside")) customElements.define("polyhead-inside", InsideElement);
