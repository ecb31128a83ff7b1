// The service's routes. Knows the token, which lives as long as the tab; knows nothing of what is shown.

const KEPT = "influence-token";

export const token = () => sessionStorage.getItem(KEPT);
export const setToken = (value) => (value ? sessionStorage.setItem(KEPT, value) : sessionStorage.removeItem(KEPT));

// An answer that is not the one asked for: `status` 0 when the service could not be reached.
export class ApiError extends Error {
  constructor(status, code, message, retrySeconds = null) {
    super(message);
    Object.assign(this, { status, code, retrySeconds });
  }
}

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (token()) headers.Authorization = `Bearer ${token()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "no answer came");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const { code = "failed", message = `status ${response.status}` } = said?.error ?? {};
  throw new ApiError(response.status, code, message, Number(response.headers.get("Retry-After")) || null);
}

const json = async (...asked) => (await send(...asked)).json();
const part = encodeURIComponent;

export const runs = async () => (await json("/v1/runs")).runs;
export const examples = async (run, count, seed) => (await json(`/v1/runs/${part(run)}/examples?count=${count}&seed=${seed}`)).examples;
export const tokens = (run, prompt, completion, signal) => json(`/v1/runs/${part(run)}/tokens`, { method: "POST", body: { prompt, completion }, signal });
export const sequence = (run, id) => json(`/v1/runs/${part(run)}/sequences/${id.split("/").map(part).join("/")}`);
export const latest = async (limit) => (await json(`/v1/queries?limit=${limit}`)).queries;
export const state = (id, signal) => json(`/v1/queries/${part(id)}`, { signal });
export const words = (id) => json(`/v1/queries/${part(id)}/words`);
export const cancel = (id) => json(`/v1/queries/${part(id)}`, { method: "DELETE" });
export const runReport = async (run, about = "run") => (await send(`/v1/runs/${part(run)}/report?about=${about}`)).blob();
export const report = async (id) => (await send(`/v1/queries/${part(id)}/report`)).blob();

// The state of the query: done, with its result, or accepted. An abort gives it up.
export async function ask(run, body, signal) {
  const response = await send(`/v1/runs/${part(run)}/queries`, { method: "POST", body, signal });
  const answer = await response.json();
  return response.status === 200 ? { id: answer.id, run, state: "done", request: body, result: answer } : answer;
}

// The state of an accepted query once it is done; `progress` is told each state until then. Raises ApiError when it fails or is cancelled.
export async function finished(query, { signal, progress }) {
  for (let pause = 500; ["queued", "running"].includes(query.state); pause = Math.min(2 * pause, 5000)) {
    progress(query);
    try {
      for await (const heard of events(query.id, signal)) progress((query = heard));
    } catch (error) {
      if (error.name === "AbortError" || [401, 404].includes(error.status)) throw error;
    }
    if (["queued", "running"].includes(query.state)) await new Promise((wake) => setTimeout(wake, pause)); // the stream broke off
    query = await state(query.id, signal);
  }
  query = await state(query.id, signal);
  if (query.state === "done") return query;
  throw new ApiError(422, query.state, query.error?.message ?? "it was cancelled");
}

// Server-sent events through fetch, since EventSource sends no token.
async function* events(id, signal) {
  const reader = (await send(`/v1/queries/${part(id)}/events`, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      const told = data ? JSON.parse(data.slice(6)) : {};
      if (told.id) yield told;
    }
  }
}
