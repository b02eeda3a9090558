/** What the server says of a model; see GET /v1/models. */
export interface Model {
  readonly id: string;
  readonly kind: string;
  readonly head?: string;
  readonly chats?: boolean;
  readonly max_tokens?: number | null;
  /** Not told of models that another server holds. */
  readonly parameters?: number;
  readonly weight_bytes?: number;
  readonly cache_bytes?: number;
  readonly parent?: string;
}

/** An answer that is an error, or no answer at all. */
export class ApiError extends Error {
  constructor(message: string, readonly status: number) {
    super(message);
  }
}

export interface ServerEvent {
  readonly name: string;
  readonly data: string;
}

const LOST = "The server does not answer. Is it still running?";

async function sent(path: string, init: RequestInit): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(path.replace(/^\//, ""), init);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(LOST, 0);
  }
  if (answer.ok) return answer;
  const said = (await answer.json().catch(() => null)) as { error?: { message?: string } } | null;
  throw new ApiError(said?.error?.message ?? `The server answered ${answer.status}.`, answer.status);
}

export function asked(body: unknown, signal?: AbortSignal): RequestInit {
  const headers = { "content-type": "application/json" };
  return { method: "POST", headers, body: JSON.stringify(body), ...(signal ? { signal } : {}) };
}

export async function get<T>(path: string): Promise<T> {
  return (await (await sent(path, {})).json()) as T;
}

export async function post<T>(path: string, body: unknown, signal?: AbortSignal): Promise<T> {
  return (await (await sent(path, asked(body, signal))).json()) as T;
}

/** Server-sent events, one after the other. */
export async function* events(path: string, init: RequestInit = {}): AsyncGenerator<ServerEvent> {
  const answer = await sent(path, init);
  const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    while (reader) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const blocks = held.split("\n\n");
      held = blocks.pop() ?? "";
      for (const block of blocks) yield parsed(block);
    }
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(LOST, 0);
  } finally {
    await reader?.cancel().catch(() => undefined);
  }
}

function parsed(block: string): ServerEvent {
  const field = (name: string): string =>
    block.split("\n").filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2)).join("\n");
  return { name: field("event"), data: field("data") };
}

export function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}

export function sized(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < 3) [bytes, unit] = [bytes / 1024, unit + 1];
  return `${bytes.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}
