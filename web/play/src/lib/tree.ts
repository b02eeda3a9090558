/** A conversation as a tree: what is edited or written again stands beside what was there before. */

export type Role = "user" | "assistant";

export interface Message {
  id: string;
  parent: string;
  role: Role;
  text: string;
  /** Of an answer that is being written: its name at the server, and the last event that was heard. */
  running?: { response: string; seen: number };
  error?: string;
  note?: string;
}

export interface Talk {
  id: string;
  title: string;
  model: string;
  system: string;
  changed: number;
  messages: Record<string, Message>;
  /** Of several that follow one message, which is shown. */
  chosen: Record<string, string>;
}

export const ROOT = "root";

export function newTalk(model: string): Talk {
  return { id: crypto.randomUUID(), title: "New chat", model, system: "", changed: Date.now(), messages: {}, chosen: {} };
}

export function followers(talk: Talk, parent: string): Message[] {
  return Object.values(talk.messages).filter((message) => message.parent === parent);
}

/** The messages that are shown, the first first. */
export function path(talk: Talk): Message[] {
  const found: Message[] = [];
  for (let at = ROOT; ; ) {
    const next = talk.messages[talk.chosen[at] ?? ""] ?? followers(talk, at).at(-1);
    if (!next) return found;
    found.push(next);
    at = next.id;
  }
}

export function add(talk: Talk, parent: string, role: Role, text: string): Message {
  const id = crypto.randomUUID();
  talk.messages[id] = { id, parent, role, text };
  talk.chosen[parent] = id;
  talk.changed = Date.now();
  if (role === "user" && parent === ROOT) talk.title = text.trim().slice(0, 60) || "New chat";
  return talk.messages[id] as Message;
}

/** Show the sibling so many places on. */
export function turn(talk: Talk, message: Message, by: number): void {
  const all = followers(talk, message.parent);
  const next = all[all.findIndex((each) => each.id === message.id) + by];
  if (next) talk.chosen[message.parent] = next.id;
}

/** What stands before a message, as the server reads it. */
export function history(talk: Talk, until: Message): { role: Role; content: string }[] {
  const before: Message[] = [];
  for (let at = talk.messages[until.parent]; at; at = talk.messages[at.parent]) before.unshift(at);
  return before.filter((each) => each.text).map(({ role, text }) => ({ role, content: text }));
}

/** A talk of a file. Throws where it is none. */
export function read(text: string): Talk[] {
  const found = JSON.parse(text) as unknown;
  const talks = Array.isArray(found) ? found : [found];
  return talks.map((each: Partial<Talk>) => {
    if (!each || typeof each.title !== "string" || typeof each.messages !== "object" || !each.messages) {
      throw new Error("This is no exported chat.");
    }
    const messages: Record<string, Message> = {};
    for (const [id, message] of Object.entries(each.messages)) {
      const { parent, role, text: said } = message;
      if (typeof parent !== "string" || typeof said !== "string" || (role !== "user" && role !== "assistant")) {
        throw new Error("This is no exported chat.");
      }
      messages[id] = { id, parent, role, text: said };
    }
    const whole = newTalk(each.model ?? "");
    return { ...whole, title: each.title.slice(0, 60), system: String(each.system ?? ""), messages, chosen: { ...each.chosen } };
  });
}
