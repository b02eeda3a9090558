import type { Head, Inside, Side, Stack } from "./data";
import type { Weights } from "./weights";

export type View = "lines" | "heatmap" | "text" | "lens";
export type Role = "query" | "key";

/** A token of one side: one that looks, or one that is looked at. */
export interface Token {
  role: Role;
  index: number;
}

export interface State {
  stack: number;
  heads: readonly Head[];
  view: View;
  pinned: Token | null;
  first: Record<Role, number>; // where the windows on long texts begin
  together: boolean; // whether they move as one
  search: string;
  measure: string;
}

/** What is shown, and who wants to know when that changes. */
export class Store {
  state: State;
  weights: Weights | null = null;
  showsFindings = true;
  /** Where the keyboard stands in a heatmap. */
  cell = { query: 0, key: 0 };

  constructor(
    readonly data: Inside,
    readonly changed: (state: State, before: State) => void,
    /** Put the keyboard on what has such a key, once it is drawn. */
    readonly focus: (key: string) => void,
  ) {
    this.state = {
      stack: 0,
      heads: [[0, 0]],
      view: data.stacks.length > 0 ? "lines" : "lens",
      pinned: null,
      first: { query: 0, key: 0 },
      together: true,
      search: "",
      measure: "",
    };
  }

  get stack(): Stack {
    return this.data.stacks[this.state.stack]!;
  }

  side(role: Role): Side {
    return this.data.sides[role === "query" ? this.stack.queries : this.stack.keys]!;
  }

  /** Whether tokens look at themselves, so that both sides are one text. */
  get isOneText(): boolean {
    return this.stack.queries === this.stack.keys;
  }

  set(change: Partial<State>): void {
    const before = this.state;
    this.state = { ...before, ...change };
    this.changed(this.state, before);
  }

  /** Move a window on a long text, and the other one where they are one. */
  scroll(role: Role, first: number): void {
    const { together, first: now } = this.state;
    const moved = together && this.isOneText ? { query: first, key: first } : { ...now, [role]: first };
    if (moved.query !== now.query || moved.key !== now.key) this.set({ first: moved });
  }

  /** Where tokens hold what is searched for. */
  matches(role: Role): number[] {
    const wanted = this.state.search.toLowerCase();
    if (!wanted) return [];
    return this.side(role).tokens.flatMap((token, i) => (token.toLowerCase().includes(wanted) ? [i] : []));
  }
}

/** Where a window of so many tokens begins that holds a token, moved as little as need be. */
export function windowAround(index: number, first: number, size: number): number {
  return index < first ? index : index >= first + size ? index - size + 1 : first;
}

export function clamp(value: number, least: number, most: number): number {
  return Math.max(least, Math.min(most, value));
}

export function sameHead(one: Head, other: Head): boolean {
  return one[0] === other[0] && one[1] === other[1];
}
