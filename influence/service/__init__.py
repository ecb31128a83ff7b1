"""The service: influence queries over HTTP, for one or several runs. The web framework stays in here; nothing below knows of it.

settings   what is served, where state is kept, and the limits
bodies     what requests and responses hold (pydantic, OpenAPI)
errors     what can go wrong, as one exception with a status
tokens     who may ask: bearer tokens, kept as salted hashes
store      queries and their results in SQLite: the queue that outlives the process
catalog    the runs: found by name, loaded when asked, released when memory is short, opened again when they changed
answers    from request bodies to result objects, by a run
engine     the one thread that works with the models: batches of quick queries, and between their units of work the queue
gate       what every request passes: host, token, limits, audit line, security headers
routes     the HTTP routes; app: all of it as one ASGI application
server     the application in uvicorn, with a graceful stop
"""

from influence.service.app import create_app
from influence.service.settings import Limits, ServiceSettings

__all__ = ["Limits", "ServiceSettings", "create_app"]
