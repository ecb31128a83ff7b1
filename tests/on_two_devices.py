"""Does a run's work with its model on one device or two, and writes what came out: `python on_two_devices.py RUN OUT`, a process of its own.

A process of its own because the device that is pretended stays registered with torch.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model
from pretend_devices import PRETENDED, pretended

from ekfac import covariance_pass, drawn_label_loss, eigenvalue_pass, layer_device, reached_positions
from influence import QueryOptions, RefineOptions, RequestError, Run, open_run
from influence.batches import in_batches
from influence.model import LanguageModel
from influence.rows import encoded_rows

ASKED: dict[str, dict[str, Any]] = {
    "by index": {},
    "exact": {"exact": True, "opponents": True},
    "some layers": {"normalize": True, "layers": ("*h.1*",)},
}


def divide(run: Run) -> None:
    """Puts the last block of the run's GPT-2 and the normalisation after it on the other device; the head is tied to the embedding."""
    loaded = run.language_model
    places: dict[str, Any] = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.h.0", "lm_head"), "cpu")
    places |= dict.fromkeys(("transformer.h.1", "transformer.ln_f"), PRETENDED)
    model = dispatch_model(loaded.model, places, main_device="cpu", force_hooks=True)  # type: ignore[no-untyped-call]
    vars(run)["language_model"] = LanguageModel(model=model, tokenizer=loaded.tokenizer)


def everything(run: Run) -> dict[str, Any]:
    """What the passes, the index and the answers give, by name."""
    attributed = run.attributed
    sequences, of = run.training.shard(0), (attributed.model, attributed.layers)
    batches = [batch for _, batch in in_batches(sequences, attributed.budget, attributed.device)]
    covariances = covariance_pass(*of, batches, drawn_label_loss(0), reached_positions)
    sums = eigenvalue_pass(*of, run.eigenvectors_of(attributed.layers), batches, drawn_label_loss(0), reached_positions)
    found = {f"{kind}: {name}": one.total.cpu() for kind, all in (("covariance", covariances), ("sum", sums)) for name, one in all.items()}
    codes, found["self-influence"] = encoded_rows(run, sequences, run.features, run.row_format)
    found["rows"] = run.row_format.decode(codes)
    measurement = run.measure("Lisbon lies on", " the Tagus.")
    for name, options in ASKED.items():
        answer = run.answer([measurement], QueryOptions(k=10, **options))[0]
        found[f"{name}: ids"] = [one.id for one in answer.sequences]
        found[f"{name}: layers"] = [list(one.layers.values()) for one in answer.sequences]
        found[f"{name}: tokens"] = [share for one in answer.sequences for _, share in one.tokens]
    found["health"] = run.health().columns["influence"]
    return found


def refusal(run: Run) -> str:
    """Of what needs the model on one device."""
    try:
        run.answer([run.measure("Lisbon lies on", " the Tagus.")], QueryOptions(refine=RefineOptions(steps=1)))
    except RequestError as error:
        return str(error)
    return "none"


def main(directory: Path, out: Path) -> None:
    whole = {f"whole {name}": np.asarray(value) for name, value in everything(open_run(directory)).items()}
    with pretended():
        run = open_run(directory)
        divide(run)
        devices = {str(layer_device(run.language_model.model, layer)) for layer in run.coverage.layers}
        divided = {f"divided {name}": np.asarray(value) for name, value in everything(run).items()}
        np.savez(out, devices=sorted(devices), refusal=refusal(run), **whole, **divided)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
