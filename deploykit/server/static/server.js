// How both pages talk to the server.

let token = "";

/** Send this token from now on. It is kept in memory alone. */
export function useToken(text) {
  token = text.trim();
}

/** What the server refused, or that it did not answer (status 0). */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request and return the response, whatever its status. */
export async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  try {
    return await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer; see whether it still runs.");
  }
}

/** Send a request and return its JSON and headers, or throw what the server refused. */
export async function ask(path, options) {
  const response = await send(path, options);
  const value = await response.json().catch(() => null);
  if (response.ok && value !== null) return { value, headers: response.headers };
  throw new Refused(response.status, value?.error ?? `The server answered with status ${response.status}.`);
}
