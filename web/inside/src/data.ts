// What the component is given: made by polyhead.explain.view, on a page or by the server.

export interface Picture {
  src: string;
  rows: number;
  columns: number;
  first: number; // the token that is the first patch
}

/** Tokens that look or are looked at; some may be patches of a picture. */
export interface Side {
  tokens: string[];
  picture?: Picture;
}

/** Layers whose heads look from one side at another. */
export interface Stack {
  name: string;
  queries: number; // which of the sides
  keys: number;
  layers: string[];
  numbers: number[]; // what readers call the layers, as some may have been left out
  heads: number;
  /** Bytes [layers, heads, Q, K], or of windows [layers, heads, windows, edge², edge²]: gzip, base64. */
  weights: string;
  windows?: { area: number; places: number[][] };
  least: number; // smaller weights were left out
  measures: Record<string, (number | null)[][]>;
}

export interface Finding {
  title: string;
  text: string;
  stack: number;
  heads: [layer: number, head: number][];
  token: number | null; // a query that shows it
}

/** What each layer would answer at each token, the likeliest first. */
export interface Lens {
  side: number;
  layers: string[];
  answers: [answer: string, probability: number][][][];
}

export interface Inside {
  title: string;
  sides: Side[];
  stacks: Stack[];
  findings: Finding[];
  lens: Lens | null;
}

export type Head = readonly [layer: number, head: number];
