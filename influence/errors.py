"""The one error that means: the request was wrong, and its message is for the person who made it."""


class RequestError(ValueError):
    """A request that cannot be served as it stands: what arrived, what was expected, what to do. Exit status 2, HTTP status 4xx."""
