import { get, words, type Model } from "./api";

/** The models that are served, looked at again every few seconds. */
class Server {
  models = $state<readonly Model[]>([]);
  error = $state("");
  loaded = $state(false);

  async look(): Promise<void> {
    try {
      const found = (await get<{ data: Model[] }>("/v1/models")).data;
      // The same list stays the same object, so that nothing is drawn anew.
      if (JSON.stringify(found) !== JSON.stringify(this.models)) this.models = found;
      this.error = found.length ? "" : "The models are being loaded.";
    } catch (error) {
      this.error = words(error);
    }
    this.loaded = true;
  }

  of(...kinds: string[]): Model[] {
    return this.models.filter((model) => kinds.includes(model.kind));
  }
}

export const server = new Server();
