// Errors of the service in plain words.

const SAID = {
  0: ["The service cannot be reached", "It may be stopped, or the connection lost."],
  401: ["The service wants a token", "Sign in with one of its tokens."],
  403: ["Your token does not allow this", null],
  404: ["It is not here", null],
  408: ["The question took too long to arrive", "Try again."],
  409: ["This run cannot be asked as it stands", null],
  413: ["The question is too long", null],
  422: ["The question cannot be answered as it stands", null],
  429: ["Too many of your questions are waiting", null],
  500: ["The service failed at this question", null],
  503: ["The service is busy", null],
};
const CODES = { cancelled: ["Cancelled", "The work was stopped."], failed: ["The work failed", null], timeout: ["It took too long", null], stale: ["The run has changed or is damaged", null] };

// {title, text, again}: what happened, why, and whether asking again may help.
export function explained(error) {
  const [title, text] = CODES[error.code] ?? SAID[error.status] ?? ["Something went wrong", null];
  const said = text ?? `${error.message[0].toUpperCase()}${error.message.slice(1).replace(/\.?$/, ".")}`;
  const wait = error.retrySeconds ? ` It suggests to try again in ${error.retrySeconds} seconds.` : "";
  return { title, text: said + wait, again: [0, 408, 429, 500, 503].includes(error.status) };
}
