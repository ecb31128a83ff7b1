"""`influence serve` and `influence tokens`: the service in this process, or as replicas on Ray Serve, and who may ask it.

The service and its web framework are imported by those who serve; every other command starts without them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence.config import parse_bytes
from influence.errors import RequestError
from jobs.options import Debug, Json, Memory
from jobs.progress import say

if TYPE_CHECKING:
    from influence.service.settings import ServiceSettings

TokensFile = Annotated[
    Path | None, typer.Option("--tokens-file", envvar="INFLUENCE_TOKENS_FILE", help="file of tokens; without one only this machine may ask")
]


def serve(
    runs: Annotated[list[str] | None, typer.Argument(help="run directories, or s3:// or gs:// URLs", show_default=False)] = None,
    runs_dir: Annotated[Path | None, typer.Option("--runs-dir", help="serve every run in this directory, loaded when asked")] = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on; others than loopback need tokens")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port to listen on; 0 takes a free one")] = 8000,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", help="where queries and results are kept; .service beside the runs when left out")
    ] = None,
    tokens: TokensFile = None,
    log_queries: Annotated[bool, typer.Option("--log-queries", help="write what was asked into the audit log")] = False,
    memory_budget: Memory = "16GiB",
    replicas: Annotated[int, typer.Option("--replicas", min=0, help="replicas on Ray Serve; 0 serves from this process")] = 0,
    address: Annotated[
        str | None, typer.Option("--address", help="address of the Ray cluster of the replicas; left out, a local one is started")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer queries over HTTP, with a page to ask them at, until interrupted."""
    settings = settings_of(runs or [], runs_dir, host, state_dir, tokens, log_queries, memory_budget)

    def listening(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "runs": list(settings.runs)}), flush=True)
        say(f"serving {', '.join(settings.runs) or f'the runs in {runs_dir}'} at {url}")

    if address is not None and not replicas:
        raise RequestError("--address goes with --replicas")
    if address is not None and tokens is None:
        raise RequestError("--address needs --tokens-file: others than this machine can ask what a cluster serves")
    if replicas and port == 0:
        raise RequestError("--port 0 is for a service in one process: name the port that the replicas are to be asked at")
    if replicas:
        from jobs.replicas import serve_on_ray

        serve_on_ray(settings, host, port, replicas, address, listening)
        return
    from influence.service.server import serve as serve_here

    serve_here(settings, host, port, listening)


def settings_of(
    runs: list[str], runs_dir: Path | None, host: str, state_dir: Path | None, tokens: Path | None, log_queries: bool, memory_budget: str
) -> "ServiceSettings":
    """The settings that these options say. Raises RequestError when there is nothing to serve, or it cannot be served like this."""
    from influence.service.settings import ServiceSettings, is_loopback, named_runs, state_directory

    if not runs and runs_dir is None:
        raise RequestError("give run directories, or --runs-dir")
    if runs_dir is not None and not runs_dir.is_dir():
        raise RequestError(f"--runs-dir: {runs_dir} is no directory")
    budget = parse_bytes(memory_budget)
    if not isinstance(budget, int) or budget <= 0:
        raise RequestError(f"--memory-budget: {memory_budget!r} is not a size such as 4GiB")
    named = named_runs(runs)
    for name, place in named.items():
        other = None if runs_dir is None else runs_dir.resolve() / name
        if other is not None and (other / "run.json").is_file() and str(other) != place:
            raise RequestError(f"{place} and {other} are both called {name}: rename one")
    return ServiceSettings(
        runs=named,
        runs_dir=None if runs_dir is None else runs_dir.resolve(),
        state_dir=(state_dir or state_directory(runs, runs_dir)).resolve(),
        tokens_file=None if tokens is None else tokens.resolve(),
        loopback=is_loopback(host),
        log_queries=log_queries,
        memory_budget=budget,
    )


def tokens(
    action: Annotated[str, typer.Argument(help="add, remove or list")],
    name: Annotated[str | None, typer.Argument(help="whose token", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--tokens-file", envvar="INFLUENCE_TOKENS_FILE", help="file of tokens; made by the first `add`")
    ] = None,
    scope: Annotated[list[str] | None, typer.Option("--scope", help="query (the default) or admin; may be repeated")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The users of a service: add one, whose token is printed once; remove one with all tokens; list them."""
    from influence.service.tokens import add_token, read_tokens, remove_tokens

    if file is None:
        raise RequestError("name the file with --tokens-file or INFLUENCE_TOKENS_FILE")
    if action == "list" and name is None:
        users = [{"name": entry["name"], "scopes": entry["scopes"]} for entry in read_tokens(file)]
        print(json.dumps({"tokens": users}) if as_json else "\n".join(f"{user['name']}: {', '.join(user['scopes'])}" for user in users))
    elif action == "add" and name is not None:
        token = add_token(file, name, tuple(scope or ["query"]))
        print(json.dumps({"name": name, "token": token}) if as_json else token)
    elif action == "remove" and name is not None:
        removed = remove_tokens(file, name)
        if not removed:
            raise RequestError(f"{file} has no token of {name}")
        print(json.dumps({"name": name, "removed": removed}) if as_json else f"removed {removed} of {name}")
    else:
        raise RequestError("expected: tokens add NAME, tokens remove NAME, or tokens list")
