import { ApiError, asked, events, isAbort, post, words } from "./api";
import { recalled, remember } from "./kept";
import { add, history, newTalk, ROOT, type Message, type Talk } from "./tree";

export interface Settings {
  temperature: string;
  top_p: string;
  max_output_tokens: string;
  seed: string;
  schema: string;
}

const NUMBERS = ["temperature", "top_p", "max_output_tokens", "seed"] as const;
const OFTEN_MS = 400;
const DRAWN_MS = 50;

/** The conversations of this browser, and the answers that are on their way. */
class Talks {
  all = $state<Talk[]>(recalled<Talk[]>("talks", []));
  settings = $state<Settings>(
    recalled<Settings>("settings", { temperature: "", top_p: "", max_output_tokens: "", seed: "", schema: "" }),
  );
  full = $state(false);
  #listening = new Map<string, AbortController>();
  #heard = new Map<string, { text: string; seen: number }>();
  #drawing = 0;
  #later = 0;

  begin(model: string): Talk {
    this.all.unshift(newTalk(model));
    return this.all[0] as Talk;
  }

  keep(): void {
    clearTimeout(this.#later);
    this.#later = 0;
    this.full = !remember("talks", this.all) || !remember("settings", this.settings);
  }

  remove(talk: Talk): void {
    for (const message of Object.values(talk.messages)) if (message.running) void this.stop(message);
    this.all = this.all.filter((each) => each.id !== talk.id);
    this.keep();
  }

  async say(talk: Talk, parent: string, text: string): Promise<void> {
    await this.answer(talk, add(talk, parent, "user", text).id);
  }

  /** Write an answer below a message, beside those that are there. */
  async answer(talk: Talk, parent: string): Promise<void> {
    const message = add(talk, parent, "assistant", "");
    message.running = { response: "", seen: -1 };
    this.keep();
    try {
      const body = { ...this.#body(), model: talk.model, input: history(talk, message), background: true, stream: true };
      await this.#hear(message, "/v1/responses", talk.system ? { ...body, instructions: talk.system } : body);
    } catch (error) {
      this.#failed(message, error);
    }
  }

  /** Go on listening to answers that were on their way when the page was left. */
  resume(): void {
    for (const talk of this.all) {
      for (const message of Object.values(talk.messages)) {
        if (message.running && !this.#listening.has(message.id)) void this.#again(message);
      }
    }
  }

  async stop(message: Message): Promise<void> {
    const response = message.running?.response;
    delete message.running;
    message.note = "stopped";
    this.#listening.get(message.id)?.abort();
    this.keep();
    if (response) await post(`/v1/responses/${response}/cancel`, {}).catch(() => undefined);
  }

  async #again(message: Message): Promise<void> {
    const running = message.running;
    if (!running) return;
    try {
      if (!running.response) throw new ApiError("The page was left before the answer began.", 0);
      await this.#hear(message, `/v1/responses/${running.response}?stream=true&starting_after=${running.seen}`);
    } catch (error) {
      this.#failed(message, error);
    }
  }

  async #hear(message: Message, path: string, body?: unknown): Promise<void> {
    const control = new AbortController();
    this.#listening.set(message.id, control);
    try {
      for await (const { data } of events(path, body ? asked(body, control.signal) : { signal: control.signal })) {
        this.#take(message, JSON.parse(data) as Told);
      }
      this.#show(message);
      delete message.running;
    } finally {
      this.#show(message);
      this.#listening.delete(message.id);
      this.keep();
    }
  }

  #take(message: Message, told: Told): void {
    if (!message.running) return;
    if (told.error) throw new ApiError(told.error.message, 0);
    if (told.type === "error") throw new ApiError(told.message ?? "The answer failed.", 0);
    if (told.type === "response.incomplete") message.note = "cut at the most tokens";
    if (told.type === "response.created") {
      message.running.response = told.response?.id ?? "";
      this.keep();
    }
    const heard = this.#heard.get(message.id) ?? { text: "", seen: -1 };
    this.#heard.set(message.id, { text: heard.text + (told.delta ?? ""), seen: told.sequence_number ?? heard.seen });
    // A fast model says more in a second than a page can be drawn.
    this.#drawing ||= window.setTimeout(() => this.#show(), DRAWN_MS);
  }

  /** Show what was heard since, of one message or of all. */
  #show(only?: Message): void {
    if (!only) this.#drawing = 0;
    for (const message of only ? [only] : this.all.flatMap((talk) => Object.values(talk.messages))) {
      const heard = this.#heard.get(message.id);
      if (!heard) continue;
      this.#heard.delete(message.id);
      message.text += heard.text;
      if (message.running) message.running.seen = heard.seen;
    }
    this.#later ||= window.setTimeout(() => this.keep(), OFTEN_MS);
  }

  #failed(message: Message, error: unknown): void {
    delete message.running;
    if (!isAbort(error)) message.error = words(error);
    this.keep();
  }

  #body(): Record<string, unknown> {
    const body: Record<string, unknown> = {};
    for (const name of NUMBERS) if (this.settings[name].trim()) body[name] = Number(this.settings[name]);
    if (this.settings.schema.trim()) {
      const schema: unknown = JSON.parse(this.settings.schema);
      body.text = { format: { type: "json_schema", name: "answer", schema } };
    }
    return body;
  }
}

interface Told {
  readonly type?: string;
  readonly sequence_number?: number;
  readonly delta?: string;
  readonly message?: string;
  readonly response?: { readonly id: string };
  readonly error?: { readonly message: string };
}

export const talks = new Talks();
export { ROOT };
