// Speech as a stream, billed by the character. README.md says how to run it.
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { Billing, Refused } from "./billing.js";

const billing = new Billing(process.env.METERFALL_URL ?? "http://127.0.0.1:8080", process.env.METERFALL_KEY ?? "");
const port = Number(process.env.PORT ?? 3000);

const server = createServer((request, response) => {
  answer(request, response).catch((error: unknown) => fail(response, error));
});

async function answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const user = request.headers["x-user"]; // yours comes from the session: a client must not be able to choose it
  const job = request.headers["idempotency-key"]; // a client that tries again sends the same key, and pays once
  if (typeof user !== "string") return send(response, 400, { detail: "X-User: who pays" });
  if (request.method === "GET") return send(response, 200, { available: await billing.available(user) });
  if (typeof job !== "string") return send(response, 400, { detail: "Idempotency-Key: which job this is" });
  const text = await read(request);
  await billing.reserve(user, job, charactersOf(text));
  let made = 0;
  try {
    for await (const sound of synthesize(text)) {
      made += sound.characters;
      if (!response.write(sound.bytes)) await once(response);
      if (response.destroyed) break; // the listener hung up, and pays for what was made
    }
  } finally {
    await (made > 0 ? billing.settle(user, job, made) : billing.release(user, job));
  }
  response.end();
}

// Stand in for an engine, which makes one sentence at a time.
async function* synthesize(text: string): AsyncGenerator<{ characters: number; bytes: Buffer }> {
  for (const sentence of text.match(/[^.]+\.?|\./g) ?? []) {
    await new Promise((done) => setTimeout(done, sentence.length / 10));
    yield { characters: charactersOf(sentence), bytes: Buffer.alloc(sentence.length * 100, 0x7f) };
  }
}

// As people count them, and the Python services: `length` counts some twice.
function charactersOf(text: string): number {
  return [...text].length;
}

function once(response: ServerResponse): Promise<void> {
  return new Promise((done) => {
    response.once("drain", done);
    response.once("close", done);
  });
}

async function read(request: IncomingMessage): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of request) parts.push(part as Buffer);
  return Buffer.concat(parts).toString("utf8");
}

function fail(response: ServerResponse, error: unknown): void {
  if (response.headersSent) {
    response.destroy();
  } else if (error instanceof Refused) {
    send(response, [402, 409].includes(error.status) ? error.status : 503, { detail: error.message, reason: error.problem?.reason });
  } else {
    send(response, 503, { detail: "billing is away" });
  }
}

function send(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
}

server.listen(port, "127.0.0.1", () => console.log(`listening on ${port}`));
process.on("SIGTERM", () => server.close(() => process.exit(0)));
