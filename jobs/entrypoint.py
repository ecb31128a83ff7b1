"""What runs on the cluster as a Ray job: `influence run`, and beside it, among what it prints, the progress as lines of JSON.

python -m jobs.entrypoint CONFIG [options of `influence run`]
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from influence.config import load_config
from influence.run_directory import RunDirectory
from influence.stored_run import run_directory
from jobs import cli
from jobs.progress import PROGRESS_PREFIX

SECONDS_BETWEEN_LINES = 10.0


def main() -> None:
    directory = run_directory(load_config(Path(sys.argv[1]), {}).run.dir)
    sys.argv = ["influence", "run", *sys.argv[1:], "--address", "auto"]
    with telling_progress(directory):
        cli.main()


@contextmanager
def telling_progress(directory: RunDirectory) -> Iterator[None]:
    """Within it, the progress in the run directory is printed whenever it has changed, every so many seconds and at the end."""
    over = threading.Event()
    before = directory.read_progress()  # that of an earlier job

    def tell() -> None:
        last, ended = before, False
        while not ended:
            ended = over.wait(SECONDS_BETWEEN_LINES)
            progress = directory.read_progress()
            if progress != last:
                print(PROGRESS_PREFIX + json.dumps(progress), flush=True)
                last = progress

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join(timeout=SECONDS_BETWEEN_LINES)


if __name__ == "__main__":
    main()
