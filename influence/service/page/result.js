// What the object of a result means.

// The ends of a ranking under the names that people have for them; null for an end that was not asked for.
export function ends({ request, result }) {
  return request.opponents ? { helped: null, hurt: result.results } : { helped: result.results, hurt: result.opponents ?? null };
}

// All training sequences of both ends.
export const shown = (query) => Object.values(ends(query)).flatMap((sequences) => sequences ?? []);
