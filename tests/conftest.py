"""Tiny models of real architectures, and batches that expose mistakes: padding, one-token sequences, prompts that are not counted."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of two processes would wait for each other by spinning

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_workers import forked_workers
from small_run import Influence, Outcome, World, finished_run, model, perturbed, small_world
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ekfac import SequenceBatch, key_of
from jobs import cli

VOCABULARY = 23

ARCHITECTURES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=8,
            n_layer=2,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            tie_word_embeddings=True,
        )
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    ),
    # a scaled embedding that is tied, norms that multiply by 1 + weight, logits that are capped
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
        )
    ),
    # a head with a bias, tied
    "phi": lambda: PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            resid_pdrop=0,
        )
    ),
}


def tiny_model(architecture: str, seed: int = 0) -> Any:
    """A small model in float64, `perturbed`."""
    return perturbed(lambda: ARCHITECTURES[architecture]().to(torch.float64), seed)


def padded_batch(lengths: tuple[int, ...] = (7, 4, 2, 7), num_positions: int = 7, seed: int = 0, prompt: int = 0) -> SequenceBatch:
    """Random tokens padded on the right; the first `prompt` tokens of each sequence (at least one) are not counted."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (len(lengths), num_positions), generator=generator)
    positions = torch.arange(num_positions)[None]
    real = positions < torch.tensor(lengths)[:, None]
    return SequenceBatch(
        tokens=tokens.where(real, 0),
        counted=real & (positions >= max(1, prompt)),
        keys=np.array([key_of(f"{seed}/{n}") for n in range(len(lengths))], dtype=np.uint64),
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_world(tmp_path_factory)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never to be changed."""
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="session")
def forks() -> Iterator[Path]:
    """Workers of Ray's nodes that this process starts are forked from one, which leaves a file `RAYLET-WORKER` here for each."""
    with forked_workers() as place:
        yield place


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(scope="session")
def base(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the run's tokenizer, as if the run's had been trained from it."""
    directory = Path(shutil.copytree(world.model, tmp_path_factory.mktemp("base") / "model"))
    model(320, seed=1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def twin_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with its model in Flax."""
    import flax_twins  # which imports JAX: other tests need not wait for it

    return flax_twins.twin_world(tmp_path_factory)


@pytest.fixture(scope="session")
def twin_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of the model in Flax. Never to be changed."""
    import flax_twins

    return flax_twins.finished_twin(tmp_path_factory)


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import flax_twins

    with flax_twins.quick_compilation(tmp_path_factory):
        yield


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in a fixed order, whatever the machine, and no threads that wait for each other by spinning on a core that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def influence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Influence:
    """The console script in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["influence", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return call
