"""The demonstration's model: a byte-level tokenizer and a small GPT-2, both made from nothing out of the given documents.

`train_model` writes a Hugging Face directory that loads with ``from_pretrained``. It appears whole or not at all and carries a
record of the documents and settings it was made from. This module does not know what the documents say, nor what
is asked of the model afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from influence.config import DataConfig
from influence.documents import Document as TextDocument
from influence.evaluation.recipe import FILE as RECIPE_FILE
from influence.evaluation.recipe import Recipe
from influence.evaluation.retraining import RetrainingSettings, fine_tuned
from influence.sequences import TrainingSequence, tokenize
from jobs.demo.text import Document

END_OF_TEXT = "<|endoftext|>"
RECORD_FILE = "made_from.json"
INITIAL = "initial"
"""Where in the model's directory the model is before its training."""

RECORD_FORMAT = 2

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What decides the model besides the documents. `learning_rate` rises over `warmup_share` of all steps, then falls to zero.

    The defaults stop when the planted facts are known and before they are known by heart: once the loss of a statement has
    reached its floor, little in its gradient tells that it was the source, and influence no longer ranks it near the top.
    """

    vocabulary_size: int = 2048
    sequence_length: int = 64
    num_layers: int = 2
    width: int = 128
    num_heads: int = 4
    epochs: int = 12
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.25
    warmup_share: float = 0.05
    initializer_range: float = 0.05
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary_size` entries, trained on `texts`.

    Every encoded text begins with ``<|endoftext|>``, which is also the end and padding token. Bytes are all in the vocabulary, so
    nothing is unknown, and offsets are in characters of the text, a token's leading space included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    byte_level = processors.ByteLevel(trim_offsets=False)
    beginning = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    tokenizer.post_processor = processors.Sequence([byte_level, beginning])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, padding_side="right"
    )


def train_model(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], settings: TrainingSettings, out: Path, progress: Progress
) -> None:
    """Train a GPT-2 from nothing on `documents` and write it with its tokenizer to the directory `out`.

    The training sequences are each document's tokens cut at every `settings.sequence_length`; it is trained as `influence evaluate` trains again,
    and the initial model and the recipe are written beside it. `progress(done, total, message)` is called after every epoch. Where
    `out` already holds the model of these documents, this tokenizer and these settings, nothing is done. Equal arguments on one
    machine give equal weights, and torch's random state is left as it was.

    Raises ValueError when `out` holds anything else.
    """
    made_from = fingerprint(tokenizer, documents, settings)
    if is_made_from(out, made_from):
        progress(settings.epochs, settings.epochs, f"{out} is there already, made from the same documents and settings")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    initial, recipe = initial_model(tokenizer, settings).to(device), recipe_of(settings)
    sequences = cut_sequences(tokenizer, documents, settings.sequence_length)
    trained = fine_tuned(initial, sequences, recipe.settings, recipe.seed, epoch_done=progress)
    write_whole(initial, trained, tokenizer, recipe, {"format": RECORD_FORMAT, "sha256": made_from, "settings": asdict(settings)}, out)


def recipe_of(settings: TrainingSettings) -> Recipe:
    """How the model is trained from the initial one, which lies in its directory."""
    return Recipe(
        base=f"./{INITIAL}",
        seed=settings.seed,
        settings=RetrainingSettings(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_share=settings.warmup_share,
            clip_norm=1.0,
            similar_lengths=True,
        ),
    )


def fingerprint(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], settings: TrainingSettings) -> str:
    """SHA-256 of everything that the weights are made from."""
    parts = [tokenizer.backend_tokenizer.to_str(), asdict(settings), [[document.id, document.text] for document in documents]]
    return hashlib.sha256(json.dumps([RECORD_FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def is_made_from(out: Path, made_from: str) -> bool:
    """Whether `out` holds the model with this fingerprint; False when nothing is there.

    Raises ValueError when something else is there.
    """
    if not out.exists():
        return False
    record = out / RECORD_FILE
    if not record.is_file():
        raise ValueError(f"{out} exists and is not a model this command made (it has no {RECORD_FILE}): choose another directory")
    found = json.loads(record.read_text(encoding="utf-8")).get("sha256")
    if found != made_from:
        raise ValueError(
            f"{out} holds a model made from other documents or settings (found {found}, expected {made_from}): "
            "remove it or choose another directory"
        )
    return True


def cut_sequences(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], length: int) -> list[TrainingSequence]:
    """Every document cut into sequences of at most `length` tokens, as the run's own, those of one token left out."""
    config = DataConfig(files=["train.jsonl"], sequence_length=length)
    texts = [
        TextDocument(id=document.id, place=f"train.jsonl, row {number}", text=document.text, metadata={})
        for number, document in enumerate(documents)
    ]
    return [sequence for sequence in tokenize(texts, tokenizer, config) if sequence.counted.any()]


def initial_model(tokenizer: PreTrainedTokenizerFast, settings: TrainingSettings) -> GPT2LMHeadModel:
    """A GPT-2 without dropout, its weights drawn from `settings.seed`; torch's random state is left as it was."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.sequence_length,
        n_embd=settings.width,
        n_layer=settings.num_layers,
        n_head=settings.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=False,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one operation instead of seven
        initializer_range=settings.initializer_range,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed seeds the GPUs too
        torch.manual_seed(settings.seed)
        return GPT2LMHeadModel(config)


def write_whole(
    initial: nn.Module, trained: nn.Module, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, record: dict[str, object], out: Path
) -> None:
    """Write both models, tokenizer, recipe and record to a temporary sibling of `out`, then rename it: `out` is never half written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        for model, place in ((initial, temporary / INITIAL), (trained, temporary)):
            assert isinstance(model, GPT2LMHeadModel)
            model.to("cpu").save_pretrained(place)
            tokenizer.save_pretrained(place)
        for name, content in ((RECORD_FILE, record), (RECIPE_FILE, recipe.to_json())):
            (temporary / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp lets only its owner in
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
