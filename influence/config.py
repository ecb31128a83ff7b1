"""The configuration of a run: what YAML and command-line flags may say, checked strictly.

Keys and their defaults are described once, here; the command line and the documentation read them from these models.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ekfac import Damping, Split
from indexing import Encoding, is_mixed, row_length_within
from influence.errors import RequestError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: object) -> object:
    """Bytes from a number or from text such as "16GiB"; anything else is left for pydantic to refuse."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)):
        unit = (match[2] or "B").upper()
        if unit in _UNITS and match[1].count(".") <= 1 and match[1] != ".":
            return int(float(match[1]) * _UNITS[unit])
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Names = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The model whose behaviour is explained."""

    name: str = Field(description="local directory or hub id of a causal language model")
    revision: str | None = Field(None, description="hub revision: a branch, tag or commit")
    flax: str | None = Field(
        None, description="for a model in Flax, the code that makes it: package.module:function or file.py:function (docs/jax.md)"
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field(
        "float32", description="what weights and activations are computed in"
    )
    adapter: str | None = Field(
        None, description="local directory or hub id of a PEFT adapter, such as LoRA, of this model: its parameters alone are attributed"
    )
    quantize: Literal["8bit", "4bit"] | None = Field(
        None, description="load the weights in 8 or 4 bits (bitsandbytes), as the adapter was trained; they need an adapter"
    )

    @model_validator(mode="after")
    def quantized_under_an_adapter(self) -> "ModelConfig":
        if self.quantize is not None and self.adapter is None:
            raise ValueError("quantized weights have no gradient: quantize needs an adapter, whose parameters are attributed")
        return self

    @model_validator(mode="after")
    def adapters_of_torch(self) -> "ModelConfig":
        if self.flax is not None and self.adapter is not None:
            raise ValueError("a Flax model takes no PEFT adapter: give the model whose parameters are to be attributed whole")
        return self


class DataConfig(Section):
    """The training data of that model."""

    files: Annotated[Names, Field(min_length=1)] = Field(
        description="jsonl, csv, parquet, arrow or text files, globs of them, or one hub data set"
    )
    split: str = Field("train", description="split of a hub data set")
    sample_by: Literal["line", "paragraph", "document"] = Field("line", description="what one document is in text files")
    text: str = Field("text", description="column of the text; every token is counted")
    prompt: str | None = Field(None, description="column of a prompt that is read but not counted; needs `completion`")
    completion: str | None = Field(None, description="column of the completion, whose tokens are counted; needs `prompt`")
    messages: str | None = Field(
        None, description="column of conversations, as the tokenizer's chat template writes them; the assistant's turns are counted"
    )
    tools: str | None = Field(None, description="column of the tools that a conversation's template is told of; needs `messages`")
    input_ids: str | None = Field(None, description="column of token ids, instead of text")
    counted: str | None = Field(None, description="column that says of each token whether it is counted (1 or 0); needs `input_ids`")
    labels: str | None = Field(
        None, description="column of labels: the token itself where it is counted, -100 where it is not; needs `input_ids`"
    )
    attention_mask: str | None = Field(None, description="column that is 0 at padding, which is taken away; needs `input_ids`")
    document_ids: str | None = Field(
        None, description="column that says of each token of a packed row which document it belongs to; needs `input_ids`"
    )
    position_ids: str | None = Field(
        None,
        description="column of positions that begin at 0 with each document of a packed row; needs `input_ids` and attention: document",
    )
    attention: Literal["sequence", "document"] = Field(
        "sequence",
        description="what a token of a packed sequence sees: all of the sequence before it, or its own document alone, whose positions begin at 0 "
        "and whose first token is not counted unless labels say so; take what the model was trained with",
    )
    weight: str | None = Field(
        None, description="column of weights from 0: the training loss is the sum of weight × loss; those of weight 0 are left out"
    )
    id: str = Field("id", description="column of document ids; the row number where there is none")
    metadata: Names = Field(default_factory=list, description="columns that are kept and shown with each result")
    sequence_length: int = Field(512, ge=2, description="longest sequence in tokens")
    documents: Literal["split", "truncate", "pack"] = Field(
        "split",
        description="a document longer than sequence_length gives several sequences (split) or its beginning (truncate); "
        "pack joins documents by the end-of-text token and cuts them to equal length",
    )
    overlap: int = Field(
        0,
        ge=0,
        description="how many tokens each sequence of a split document repeats of the one before, as context that is not counted again",
    )
    keep_text: bool = Field(
        True, description="whether text is kept beside tokens; where it is not, what is shown is decoded from the tokens"
    )
    streaming: bool = Field(False, description="read a hub data set as it arrives, without keeping a copy; local files are never copied")
    sequences_per_shard: int = Field(512, ge=1, description="how many sequences one unit of work takes; results do not depend on it")

    @model_validator(mode="after")
    def one_kind_of_column(self) -> "DataConfig":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion come together: name both columns or neither")
        kinds = [name for name in ("prompt", "messages", "input_ids") if getattr(self, name) is not None]
        if len(kinds) > 1:
            names = [{"prompt": "prompt and completion"}.get(kind, kind) for kind in kinds]
            raise ValueError(f"name columns of one kind, {' or '.join(names)}, not both")
        if self.tools is not None and self.messages is None:
            raise ValueError("tools are told to a chat template: they go with messages")
        for name in ("counted", "labels", "attention_mask", "document_ids", "position_ids"):
            if getattr(self, name) is not None and self.input_ids is None:
                raise ValueError(f"{name} goes with input_ids: it has a value for each token id")
        if self.counted is not None and self.labels is not None:
            raise ValueError("counted and labels say the same: name one of them")
        return self

    @model_validator(mode="after")
    def packing_is_said_once(self) -> "DataConfig":
        rows_are_packed = self.document_ids is not None or self.position_ids is not None
        if self.document_ids is not None and self.position_ids is not None:
            raise ValueError("document_ids and position_ids both say where documents begin: name one of them")
        if rows_are_packed and self.documents == "pack":
            raise ValueError(
                "documents: pack joins rows, and rows with document_ids or position_ids are packed already: take split or truncate"
            )
        if self.position_ids is not None and self.attention == "sequence":
            raise ValueError(
                "position_ids that begin anew are those of a model whose attention stays within documents: set attention: document"
            )
        if self.attention == "document" and not rows_are_packed and self.documents != "pack":
            raise ValueError(
                "attention: document is for packed sequences: set documents: pack, or name a column document_ids or position_ids"
            )
        if self.weight is not None and self.documents == "pack":
            raise ValueError("weight is that of a sequence, and documents: pack joins documents of several weights: take split or truncate")
        if self.overlap and self.documents != "split":
            raise ValueError("overlap is between the sequences of a document that is split: it goes with documents: split")
        if self.overlap >= self.sequence_length:
            raise ValueError(f"overlap must be less than sequence_length, {self.sequence_length}")
        return self


class AbsoluteDamping(Section):
    """Damping in the unit of the eigenvalues."""

    absolute: float = Field(ge=0, allow_inf_nan=False)


def _parse_damping(value: object) -> object:
    """On the command line, absolute damping is written absolute:1e-4."""
    if isinstance(value, str) and value.startswith("absolute:"):
        return {"absolute": value.removeprefix("absolute:")}
    return value


def _kind_of_damping(value: object) -> str:
    if value == "optimizer":
        return "optimizer"
    return "AbsoluteDamping" if isinstance(value, dict | AbsoluteDamping) else "float"


class FactorsConfig(Section):
    """The EK-FAC factors."""

    layers: Names = Field(default_factory=lambda: ["all"], description="all, or globs of module names")
    split_layers: Split = Field(
        "none",
        description="none; projections: fused linear layers are split into queries, keys and values, or gate and up; heads: those of attention "
        "into its heads too. Each block has factors and scores of its own",
    )
    sequences: int | None = Field(
        None,
        ge=1,
        description="how many sequences, chosen by hash of their ids, the factors are fitted on; when left out, as many as are enough: "
        "for covariances 64 tokens for each dimension of the widest layer, for corrected eigenvalues the same and at least 1,000 sequences",
    )
    damping: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False), Tag("float")]
        | Annotated[AbsoluteDamping, Tag("AbsoluteDamping")]
        | Annotated[Literal["optimizer"], Tag("optimizer")],
        Discriminator(_kind_of_damping),
        BeforeValidator(_parse_damping),
    ] = Field(
        0.1,
        description="relative to each layer's mean corrected eigenvalue; or {absolute: value}, as an option absolute:value; or optimizer: "
        "0.1 for EK-FAC, and a state of the optimizer beside the model, for refined answers, is required",
    )
    seed: int = Field(0, ge=0, description="seed of the labels drawn from the model")

    @property
    def patterns(self) -> list[str]:
        return ["*"] if self.layers == ["all"] else self.layers

    def as_damping(self) -> Damping:
        if isinstance(self.damping, AbsoluteDamping):
            return Damping(value=self.damping.absolute, kind="absolute")
        return Damping(value=0.1 if self.damping == "optimizer" else self.damping)


class IndexConfig(Section):
    """The index of rows."""

    bytes_per_sequence: Bytes = Field(8192, description="what a sequence's row may cost on disk and in memory")
    encoding: Encoding = Field(
        "sparse",
        description="what a row holds: sparse, the largest numbers of the whitened gradient; bit, int8 or float16, all of them spread over fewer",
    )
    seed: int = Field(0, ge=0, description="seed of the random signs that spread whitened gradients into buckets")
    recall_queries: int = Field(
        16, ge=0, description="how many training sequences are asked as queries to measure the index against an exact scan; 0: none"
    )

    @property
    def row_length(self) -> int:
        return row_length_within(self.encoding, self.bytes_per_sequence)

    @property
    def mixed(self) -> bool:
        """Whether the numbers of a row are made even, as whoever stores all of them wants."""
        return is_mixed(self.encoding)


class RunConfig(Section):
    """Where results go."""

    dir: str = Field(description="run directory, or s3://bucket/run or gs://bucket/run; made if missing, resumed if present")


class ResourcesConfig(Section):
    """What the work may use. None of this changes results."""

    memory_budget: Bytes = Field(
        16 * 2**30,
        description="memory per worker for model, factors and batches: batches are chosen to fit, and layers are worked on in groups where the "
        "factors of all do not; more than one GPU has places the layers over several of the worker's",
    )
    workers: int = Field(0, ge=0, description="Ray workers; 0 runs everything in this process")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs each Ray worker asks for; left out, one where the cluster has one for each worker"
    )
    address: str | None = Field(None, description="address of a Ray cluster; left out, a local one is started when workers are wanted")


class Config(Section):
    """Everything `influence run` needs to know."""

    model: ModelConfig
    data: DataConfig
    factors: FactorsConfig = FactorsConfig()
    index: IndexConfig = IndexConfig()
    run: RunConfig
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def torch_layers_are_split(self) -> "Config":
        if self.model.flax is not None and self.factors.split_layers != "none":
            raise ValueError("factors.split_layers: layers of a Flax model are not split")
        return self

    def identity(self) -> dict[str, Any]:
        """What results depend on besides the contents of model and data: every setting but places and resources."""
        settings = self.model_dump(mode="json", include={"model", "data", "factors", "index"})
        for place in ("name", "revision", "adapter", "flax"):
            del settings["model"][place]
        del settings["data"]["files"]
        if settings["model"]["quantize"] is None:
            del settings["model"]["quantize"]
        if settings["factors"]["split_layers"] == "none":
            del settings["factors"]["split_layers"]
        return settings


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """As `read_config`, with local paths made absolute, so that a worker in another directory reads the same files."""
    return _with_resolved_paths(read_config(path, overrides))


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """The configuration in the YAML file at `path`, if any, with `overrides` ({"section.key": value}) laid over it.

    Raises RequestError for a missing or malformed file, an unknown key (with the nearest known one) and a value that is not allowed.
    """
    raw = _read_yaml(path) if path else {}
    for key, value in overrides.items():
        section, name = key.split(".", 1)
        if isinstance(raw.get(section) or {}, dict):  # anything else is refused below
            raw[section] = {**(raw.get(section) or {}), name: value}
    source = f"{path or ''}{' with ' if path and overrides else ''}{'the given options' if overrides or not path else ''}"
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise RequestError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RequestError(f"{path} is empty or not a mapping of sections: expected model:, data:, run: and so on")
    return {str(key): value for key, value in raw.items()}


def _explain(item: Mapping[str, Any]) -> str:
    place = [str(part) for part in item["loc"]]
    key = ".".join(part for part in place if part not in ("AbsoluteDamping", "float", "optimizer"))
    if item["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(place[-1], _known_keys(place[:-1]), n=1, cutoff=0.5)
        return f"unknown key {key!r}" + (f"; did you mean {'.'.join([*place[:-1], nearest[0]])!r}?" if nearest else "")
    if item["type"] == "missing":
        return f"{key} is missing"
    return f"{key or 'configuration'}: {item['msg'].removeprefix('Value error, ')}" + (
        f" (got {item['input']!r})" if not isinstance(item["input"], dict) else ""
    )


def _known_keys(place: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in place:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _with_resolved_paths(config: Config) -> Config:
    model = config.model
    if is_local_model(model.name):
        model = model.model_copy(update={"name": str(Path(model.name).expanduser().resolve())})
    if model.adapter is not None and is_local_model(model.adapter):
        model = model.model_copy(update={"adapter": str(Path(model.adapter).expanduser().resolve())})
    if model.flax is not None and model.flax.rpartition(":")[0].endswith(".py"):
        model = model.model_copy(update={"flax": str(Path(model.flax).expanduser().resolve())})
    files = [absolute(name) for name in config.data.files]
    run = config.run
    if not is_url(run.dir):
        run = run.model_copy(update={"dir": str(Path(run.dir).expanduser().resolve())})
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update={"files": files}), "run": run})


def is_local_model(name: str) -> bool:
    """Whether a model's name is a directory of this machine, and not a hub id."""
    return Path(name).is_dir() or name.startswith((".", "~"))


def is_url(place: str) -> bool:
    """Whether a run's place is on object storage, such as s3://bucket/run, and not a directory."""
    return "://" in place


def absolute(name: str) -> str:
    """A local path made absolute; the name of a hub data set as it is."""
    path = Path(name).expanduser()
    if path.exists() or any(mark in name for mark in "*?[") or path.suffix:
        return str(path if path.is_absolute() else Path.cwd() / path)
    return name
