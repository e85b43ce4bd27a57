// The calls of this service, typed by meterfall's OpenAPI document.
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

export type Problem = components["schemas"]["Problem"];
export const METER = "premium_voice";

// A "no" or a failure, with the document that tells why.
export class Refused extends Error {
  constructor(readonly status: number, readonly problem: Problem | undefined) {
    super(problem?.detail ?? `status ${status}`);
  }
}

export class Billing {
  readonly #client;

  constructor(baseUrl: string, key: string, timeoutMs = 5_000) {
    this.#client = createClient<paths>({
      baseUrl,
      headers: { Authorization: `Bearer ${key}` },
      fetch: (request) => fetch(request, { signal: AbortSignal.timeout(timeoutMs) }),
    });
  }

  // How many units the user may spend now.
  async available(user: string): Promise<number | null> {
    const answer = await this.#client.POST("/v1/check", { body: { user_id: user, meter: METER } });
    return wanted(answer).available ?? null; // null: without a limit
  }

  // Hold `amount` units while the work is done. The same key again is the same hold.
  async reserve(user: string, key: string, amount: number): Promise<void> {
    wanted(await this.#client.POST("/v1/holds", { body: { user_id: user, meter: METER, amount, key } }));
  }

  // Take what the work has cost; give back the rest.
  async settle(user: string, key: string, actual: number): Promise<number> {
    const body = { user_id: user, meter: METER, key, actual, source: "tts" };
    return wanted(await this.#client.POST("/v1/holds/settle", { body })).amount;
  }

  // Give everything back: the work failed.
  async release(user: string, key: string): Promise<void> {
    wanted(await this.#client.POST("/v1/holds/release", { body: { user_id: user, meter: METER, key } }));
  }

  // Record work that is done already. The same ids again are billed once.
  async emit(events: components["schemas"]["UsageEvent"][]): Promise<number> {
    const answer = wanted(await this.#client.POST("/v1/events", { body: events }));
    return "events" in answer ? answer.events.length : 1;
  }
}

function wanted<T>(answer: { data?: T; error?: unknown; response: Response }): T {
  if (answer.data !== undefined) return answer.data;
  throw new Refused(answer.response.status, answer.error as Problem | undefined);
}
