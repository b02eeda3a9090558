import type { Head, Side, Stack } from "./data";

/** A byte keeps the root of a weight: small ones are told apart, too. */
const SHARES = Float32Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);

/** The weights of a stack, unpacked; every view reads them by rows and columns alone. */
export class Weights {
  readonly #bytes: Uint8Array;
  readonly #stack: Stack;
  readonly #queries: number;
  readonly #keys: number;

  private constructor(bytes: Uint8Array, stack: Stack, queries: number, keys: number) {
    this.#bytes = bytes;
    this.#stack = stack;
    this.#queries = queries;
    this.#keys = keys;
  }

  static async of(stack: Stack, sides: Side[]): Promise<Weights> {
    const packed = Uint8Array.from(atob(stack.weights), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const bytes = new Uint8Array(await new Response(unpacked).arrayBuffer());
    const count = (side: number) => sides[side]?.tokens.length ?? 0;
    return new Weights(bytes, stack, count(stack.queries), count(stack.keys));
  }

  /** What a query gives every key, in the mean of the heads. */
  row(heads: readonly Head[], query: number): Float32Array {
    return this.#mean(heads, this.#keys, (head, key) => this.at(head, query, key));
  }

  /** What every query gives a key, in the mean of the heads. */
  column(heads: readonly Head[], key: number): Float32Array {
    return this.#mean(heads, this.#queries, (head, query) => this.at(head, query, key));
  }

  /** What each key is given by all queries together. */
  received(heads: readonly Head[]): Float32Array {
    const sums = new Float32Array(this.#keys);
    for (let query = 0; query < this.#queries; query++) {
      const row = this.row(heads, query);
      for (let key = 0; key < sums.length; key++) sums[key]! += row[key]!;
    }
    return sums;
  }

  at([layer, head]: Head, query: number, key: number): number {
    const { heads, windows } = this.#stack;
    const page = layer * heads + head;
    if (!windows) {
      return SHARES[this.#bytes[(page * this.#queries + query) * this.#keys + key]!]!;
    }
    const { area } = windows;
    const places = windows.places[layer]!;
    const [from, to] = [places[query]!, places[key]!];
    const window = Math.floor(from / area);
    if (window !== Math.floor(to / area)) return 0;
    const size = this.#bytes.length / (this.#stack.layers.length * heads);
    return SHARES[this.#bytes[page * size + from * area + (to % area)]!]!;
  }

  #mean(heads: readonly Head[], count: number, at: (head: Head, i: number) => number) {
    const mean = new Float32Array(count);
    for (const head of heads) {
      for (let i = 0; i < count; i++) mean[i]! += at(head, i) / heads.length;
    }
    return mean;
  }
}
