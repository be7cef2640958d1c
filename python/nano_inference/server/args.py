"""What `nano-inference serve` can be told, in one schema: the command line, the environment and the
TOML file all follow from the fields of ServeArgs, and so does the table in docs/serving.md."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundled import DEFAULT
from ..sizes import parse_size
from ..validation import (
    NamedFields,
    check_bool,
    check_choice,
    check_float,
    check_int,
    refuse,
    unknown_field,
)

if TYPE_CHECKING:
    from ..engine_args import EngineArgs

ENV_PREFIX = "NANO_INFERENCE_"
# Variables of that prefix which are no options of the server.
OTHER_VARIABLES = (
    "NANO_INFERENCE_CONFIG",
    "NANO_INFERENCE_CPU_ISA",
    "NANO_INFERENCE_CACHE",
)
GROUPS = ("Model", "Engine", "Cache", "API", "Server", "Security", "Limits", "Logging")

Size = int  # a field of this type also takes 4GB, 16MiB, …


@dataclass(frozen=True, slots=True)
class Option:
    """One field of ServeArgs."""

    name: str
    group: str
    kind: str
    """str, int, float, bool, Size, list[str] or list[int]."""
    optional: bool
    """None is possible: whatever `unset` says then applies."""
    default: Any
    doc: str
    unset: str
    choices: tuple[str, ...]
    low: float
    high: float | None
    above: bool
    """`low` itself is too little."""
    aliases: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        if self.default in (None, [], ""):
            return self.unset
        if isinstance(self.default, list):
            return ",".join(map(str, self.default))
        if self.kind == "bool":
            return "on" if self.default else "off"
        if self.kind == "Size" and self.default % 2**20 == 0:
            return f"{self.default >> 20}MiB"
        return f"{self.default:g}" if self.kind == "float" else str(self.default)

    def check(self, value: Any) -> None:
        if value is None and self.optional:
            return
        if self.kind == "bool":
            check_bool(self.name, value)
        elif self.kind in ("int", "Size"):
            check_int(
                self.name, value, int(self.low), None if self.high is None else int(self.high)
            )
        elif self.kind == "float":
            check_float(self.name, value, self.low, open_low=self.above)
        elif self.kind == "list[str]":
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                refuse(self.name, value, "a list of non-empty strings")
        elif self.kind == "list[int]":
            if not isinstance(value, list) or not value:
                refuse(self.name, value, "a list of integers")
            for entry in value:
                check_int(self.name, entry, int(self.low), also=" (each of the list)")
        elif self.choices:
            check_choice(self.name, value, self.choices)
        elif not isinstance(value, str) or not value:
            refuse(self.name, value, "a non-empty string")

    def parse(self, text: str) -> Any:
        """The value that a flag or an environment variable says."""
        text = text.strip()
        if self.kind == "bool":
            if text.lower() in ("1", "true", "yes", "on"):
                return True
            if text.lower() in ("0", "false", "no", "off"):
                return False
            refuse(self.name, text, "1, true, yes, on, or 0, false, no, off")
        if self.kind == "list[str]":
            return _parse_list(self.name, text)
        if self.kind == "list[int]":
            return _parse_integers(self.name, text)
        if self.kind == "Size":
            try:
                return parse_size(text)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        if self.kind in ("int", "float"):
            try:
                return int(text) if self.kind == "int" else float(text)
            except ValueError:
                want = "an integer" if self.kind == "int" else "a number"
                refuse(self.name, text, want)
        return text

    def from_toml(self, value: Any) -> Any:
        """TOML has types of its own; sizes and lists may be text there, too."""
        if isinstance(value, str) and self.kind in ("Size", "list[str]", "list[int]"):
            return self.parse(value)
        return value


def _parse_list(name: str, text: str) -> list[str]:
    """a,b,c or, as vLLM has it, ["a", "b", "c"]."""
    if text.startswith("["):
        try:
            return list(json.loads(text))
        except ValueError:
            refuse(name, text, "a,b,c or a JSON list of strings")
    return [part.strip() for part in text.split(",")]


def _parse_integers(name: str, text: str) -> list[int]:
    """1,2,4 or [1, 2, 4]."""
    try:
        return [int(part) for part in text.removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        refuse(name, text, "a list of integers, as 1,2,4")


def option(
    group: str,
    doc: str,
    default: Any = None,
    *,
    unset: str = "",
    choices: tuple[str, ...] = (),
    low: float = 0,
    high: float | None = None,
    above: bool = False,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A field of ServeArgs; see Option."""
    assert group in GROUPS
    meta = {"group": group, "doc": doc, "unset": unset, "choices": choices, "low": low}
    meta |= {"high": high, "above": above, "aliases": aliases}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=meta, repr=not secret)
    return dataclasses.field(default=default, metadata=meta, repr=not secret)


_DTYPES = ("auto", "float32", "bfloat16", "float16")
_KV_DTYPES = (*_DTYPES, "fp8", "fp8_e4m3")
_NONE = "none"


@dataclass(slots=True)
class ServeArgs(metaclass=NamedFields):
    """Everything that the server can be told; names and meanings are vLLM's where it has them. An
    unknown name or an impossible value is a ValueError that says so."""

    # -- Model --
    model: str | None = option(
        "Model",
        "Folder of a Hugging Face model, or its name on the hub.",
        unset="the bundled nano-5m",
    )
    served_model_name: list[str] = option(
        "Model",
        "What requests may say for `model`; the first is what responses say.",
        [],
        unset="the model as given",
    )
    tokenizer: str | None = option(
        "Model", "Folder or hub name of another tokenizer.", unset="the model's"
    )
    revision: str | None = option("Model", "Branch, tag or commit on the hub.", unset="main")
    download_dir: str | None = option("Model", "Where downloads go.", unset="the hub's cache")
    hf_token: str | None = option(
        "Model", "Access token for the hub.", unset="HF_TOKEN, or the stored login", secret=True
    )
    dtype: str = option("Model", "Of the weights.", "auto", choices=_DTYPES)
    max_model_len: int | None = option(
        "Model", "Longest prompt plus output, in tokens.", unset="the model's", low=1
    )
    check_weights: bool = option("Model", "Refuse weights that are NaN or infinite.", False)
    # -- Engine --
    device: str = option(
        "Engine",
        "What runs the model: cpu, cuda, cuda:N for card N, or auto: cuda where it can be used.",
        "auto",
    )
    num_threads: int | None = option("Engine", "CPU threads.", unset="all", low=1, high=1024)
    isa: str | None = option("Engine", "CPU instruction set (see info).", unset="the best")
    max_num_seqs: int | None = option(
        "Engine",
        "Most sequences in a step.",
        unset="256 on CUDA, 128 on the CPU, or max_num_batched_tokens if that is less",
        low=1,
    )
    max_num_batched_tokens: int | None = option(
        "Engine",
        "Most tokens in a step.",
        unset="8192 on CUDA, 128 on the CPU, at least max_num_seqs; without chunked prefill at "
        "least max_model_len",
        low=1,
    )
    enable_chunked_prefill: bool = option(
        "Engine", "Cut long prompts into pieces that run beside decoding.", True
    )
    scheduling_policy: str = option(
        "Engine",
        "Order of the queue; priority: smaller numbers first.",
        "fcfs",
        choices=("fcfs", "priority"),
    )
    static_batching: bool = option(
        "Engine", "Start a batch only when the one before has ended, for comparison.", False
    )
    batch_invariant: bool | None = option(
        "Engine",
        "The same bytes for a request whatever runs beside it. Off only on CUDA.",
        unset="on",
    )
    async_scheduling: bool | None = option(
        "Engine",
        "Launch a step before the tokens of the one before have arrived.",
        unset="on with CUDA",
    )
    enforce_eager: bool = option("Engine", "CUDA: no CUDA graphs.", False)
    cudagraph_capture_sizes: list[int] | None = option(
        "Engine",
        "CUDA: numbers of sequences for which decoding is captured as a graph.",
        unset="1, 2, 4, 8, 16, … to max_num_seqs",
        low=1,
    )
    max_logprobs: int = option(
        "Engine", "Largest number of logprobs of a request; -1: the vocabulary.", 20, low=-1
    )
    seed: int = option(
        "Engine",
        "Starts the generator of seeds for requests that have none.",
        0,
        low=-(2**63),
        high=2**64 - 1,
    )
    trace_capacity: int = option("Engine", "Steps that the trace keeps; 0: none.", 1024)
    check_invariants: bool = option(
        "Engine", "Check the engine's bookkeeping after every step (slow; for tests).", False
    )
    # -- Cache --
    kv_cache_dtype: str = option(
        "Cache", "Of the KV cache; fp8 only on CUDA.", "auto", choices=_KV_DTYPES
    )
    kv_cache_memory_bytes: Size | None = option(
        "Cache",
        "Size of the KV cache: bytes, or as 4GB.",
        unset="see gpu_memory_utilization",
        low=1,
        high=2**62,
        aliases=("--kv-cache-memory",),
    )
    gpu_memory_utilization: float | None = option(
        "Cache",
        "CUDA: share of the card's memory for all of it; CPU: share of the memory left free by the "
        "weights that the KV cache may take. Not with kv_cache_memory_bytes or num_blocks, which "
        "say how large the cache is.",
        unset="0.9 on CUDA, 0.5 on the CPU",
        above=True,
    )
    num_blocks: int | None = option(
        "Cache",
        "Size of the KV cache in blocks.",
        unset="see kv_cache_memory_bytes",
        low=1,
        aliases=("--num-gpu-blocks-override",),
    )
    block_size: int = option("Cache", "Tokens in a block; CUDA: multiples of 16.", 16, low=1)
    enable_prefix_caching: bool = option(
        "Cache", "Keep the cache of finished requests for prompts that begin alike.", True
    )
    paged: bool = option(
        "Cache", "Off: one reservation of max_model_len a sequence, for comparison.", True
    )
    # -- API --
    reasoning_parser: str = option(
        "API",
        "How reasoning is split from answers: auto (if the model's template knows <think>), none, "
        "or think.",
        "auto",
        choices=("auto", "none", "think"),
    )
    # -- Server --
    host: str = option("Server", "Address to listen at; 0.0.0.0: all of this machine.", "127.0.0.1")
    port: int = option("Server", "Port to listen at; 0: a free one.", 8000, high=65535)
    uds: str | None = option(
        "Server", "Listen at this Unix socket instead of host and port.", unset=_NONE
    )
    root_path: str = option(
        "Server", "Path under which a proxy shows the server, as /llm.", "", unset=_NONE
    )
    drain_timeout: float = option(
        "Server", "Seconds that running requests get to finish after SIGTERM.", 30.0
    )
    health_timeout: float = option(
        "Server",
        "Seconds without a finished step, with work pending, after which /health says 503.",
        120.0,
        above=True,
    )
    # -- Security --
    api_key: list[str] = option(
        "Security",
        "Key that requests must carry; several are possible. Prefer api_key_file: command lines "
        "are public on a machine.",
        [],
        unset="no key is asked for",
        secret=True,
    )
    api_key_file: str | None = option(
        "Security",
        "File of keys, one a line; # starts a comment, after a space or first in the line.",
        unset=_NONE,
    )
    ssl_certfile: str | None = option(
        "Security", "Certificate (PEM, with its chain): serve HTTPS.", unset="plain HTTP"
    )
    ssl_keyfile: str | None = option(
        "Security", "The certificate's private key (PEM).", unset="in ssl_certfile"
    )
    ssl_ca_certs: str | None = option(
        "Security", "Clients must show a certificate signed by one of these (PEM).", unset=_NONE
    )
    allowed_origins: list[str] = option(
        "Security", "CORS: origins of web pages that may call; *: all.", [], unset=_NONE
    )
    allowed_methods: list[str] = option("Security", "CORS: methods.", ["GET", "POST"])
    allowed_headers: list[str] = option("Security", "CORS: request headers.", ["*"])
    allow_credentials: bool = option("Security", "CORS: cookies and the like.", False)
    # -- Limits --
    max_waiting: int = option(
        "Limits", "Most requests in the queue; further ones get 429. 0: any number.", 1024
    )
    max_request_bytes: Size = option(
        "Limits", "Largest body of a request; larger ones get 413.", 16 << 20, low=1, high=2**62
    )
    request_timeout: float | None = option(
        "Limits", "Most seconds that a request may take.", unset="no limit", above=True
    )
    stream_buffer_bytes: Size = option(
        "Limits",
        "What a slow reader of a stream may leave unread before he is dropped.",
        1 << 20,
        low=1,
        high=2**62,
    )
    keep_alive_interval: float = option(
        "Limits", "Seconds of silence in a stream before a comment is sent; 0: never.", 15.0
    )
    # -- Logging --
    log_level: str = option(
        "Logging",
        "Least level that is logged.",
        "info",
        choices=("debug", "info", "warning", "error", "critical"),
    )
    log_format: str = option(
        "Logging", "Lines for people, or a JSON object a line.", "text", choices=("text", "json")
    )
    access_log: bool = option("Logging", "Log a line a request.", True)
    log_prompts: bool = option(
        "Logging", "Put the bodies of requests, prompts included, into the access log.", False
    )
    disable_log_stats: bool = option(
        "Logging", "Do not log throughput and cache use every ten seconds of work.", False
    )

    def __post_init__(self) -> None:
        for known in OPTIONS.values():
            value = getattr(self, known.name)
            if not (known.name == "root_path" and value == ""):
                known.check(value)
        self.root_path = self.root_path.rstrip("/")
        self._check_security()
        if self.root_path and not re.fullmatch(r"(/[^/?#\s]+)+", self.root_path):
            refuse("root_path", self.root_path, "a path, as /llm")

    def _check_security(self) -> None:
        for name in ("api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            if (path := getattr(self, name)) is not None:
                _check_readable(name, path)
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ValueError(f"{name} needs ssl_certfile")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError("allow_credentials needs allowed_origins that are listed, not *")
        if self.allow_credentials and not self.allowed_origins:
            raise ValueError("allow_credentials needs allowed_origins")
        for key in self.api_keys:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError("api_key and the lines of api_key_file must be printable ASCII")
        if self.api_key_file is not None and not self.api_keys:
            raise ValueError(f"api_key_file {self.api_key_file} holds no key")

    @property
    def model_names(self) -> list[str]:
        """What requests may say for `model`; the first is what responses say."""
        return self.served_model_name or [self.model or DEFAULT]

    @property
    def asks_for_key(self) -> bool:
        return bool(self.api_key or self.api_key_file)

    @property
    def api_keys(self) -> list[str]:
        """Of api_key and api_key_file."""
        keys = list(self.api_key)
        if self.api_key_file is not None:
            for line in Path(self.api_key_file).read_text(encoding="utf-8").splitlines():
                if key := re.split(r"(?:^|\s)#", line)[0].strip():
                    keys.append(key)
        return keys

    def engine_args(self) -> EngineArgs:
        """ValueError, too, where the engine alone knows what is right."""
        from .. import _core
        from ..engine_args import EngineArgs

        if self.isa is not None:
            check_choice("isa", self.isa, _core.cpu_isas())
        mine = {f.name for f in dataclasses.fields(EngineArgs)} & OPTIONS.keys()
        options = {name: getattr(self, name) for name in mine}
        options["model"] = self.model or DEFAULT
        return EngineArgs(use_tqdm_on_load=False, **options)


def _check_readable(name: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be read: {error.strerror}") from None


def _options() -> Iterator[Option]:
    for field in dataclasses.fields(ServeArgs):
        kind = str(field.type)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        optional = kind.endswith(" | None")
        yield Option(
            field.name, kind=kind.removesuffix(" | None"), optional=optional, default=default,
            **field.metadata,
        )  # fmt: skip


OPTIONS: dict[str, Option] = {known.name: known for known in _options()}
"""By name, in the order of --help."""


# -- Flags, environment, file ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    value: Any
    source: str


def load_args(flags: Mapping[str, Any], environ: Mapping[str, str]) -> ServeArgs:
    """flags (text as given on the command line, a tuple of it for lists; None, (): not given; also
    `config`, the TOML file) before environ before the file before the defaults. A ValueError names
    where the impossible value comes from."""
    given: dict[str, _Given] = {}
    if config := flags.get("config") or environ.get(ENV_PREFIX + "CONFIG"):
        given |= _from_file(config)
    given |= _from_environ(environ)
    given |= _from_flags(flags)
    try:
        args = ServeArgs(**{name: entry.value for name, entry in given.items()})
        args.engine_args()
    except ValueError as error:
        raise ValueError(_with_sources(str(error), given)) from None
    return args


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each variable that looks like an option and is none."""
    known = [o.variable for o in OPTIONS.values()]
    return [
        unknown_field("the environment", name, known)
        for name in environ
        if name.startswith(ENV_PREFIX) and name not in known and name not in OTHER_VARIABLES
        if not re.match(ENV_PREFIX + r"(SERVICE_|PORT_)", name)  # Kubernetes' service links
    ]


def _with_sources(message: str, given: Mapping[str, _Given]) -> str:
    places = [e.source for name, e in given.items() if re.search(rf"\b{name}\b", message)]
    return f"{message} (from {', '.join(places)})" if places else message


def _from_flags(flags: Mapping[str, Any]) -> dict[str, _Given]:
    given = {}
    for name, known in OPTIONS.items():
        text = flags.get(name)
        if text is None or text == ():
            continue
        value = text
        if isinstance(text, tuple):  # a comma does not split what may be given several times
            lists = [_parse_list(name, t) if t.startswith("[") else [t] for t in text]
            value = [part for parts in lists for part in parts]
        elif isinstance(text, str):
            value = _parse(known, text, known.flag)
        given[name] = _Given(value, known.flag)
    return given


def _from_environ(environ: Mapping[str, str]) -> dict[str, _Given]:
    given = {}
    for name, known in OPTIONS.items():
        if (text := environ.get(known.variable)) is None:
            continue
        source = known.variable
        if name == "port" and text.startswith("tcp://"):
            source += ", which Kubernetes sets for a Service called nano-inference: rename that"
            source += ", or say enableServiceLinks: false"
        given[name] = _Given(_parse(known, text, source), source)
    return given


def _parse(known: Option, text: str, source: str) -> Any:
    try:
        return known.parse(text)
    except ValueError as error:
        raise ValueError(f"{error} (from {source})") from None


def _from_file(path: str | os.PathLike[str]) -> dict[str, _Given]:
    given = {}
    for key, value in _read_toml(path).items():
        name = key.replace("-", "_")
        if name not in OPTIONS:
            raise ValueError(unknown_field(f"the file {path}", key, OPTIONS))
        source = f"{key} in {path}"
        try:
            given[name] = _Given(OPTIONS[name].from_toml(value), source)
            OPTIONS[name].check(given[name].value)
        except ValueError as error:
            raise ValueError(f"{error} (from {source})") from None
    return given


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is no TOML: {error}") from None


# -- Documentation --------------------------------------------------------------------------------


def options_table() -> str:
    """The table of docs/serving.md."""
    lines = []
    for group in GROUPS:
        lines += [f"### {group}", "", "| Name | Default | Meaning |", "|---|---|---|"]
        for o in OPTIONS.values():
            if o.group == group:
                choices = f" One of {', '.join(f'`{c}`' for c in o.choices)}." if o.choices else ""
                doc = f"{o.doc}{choices}".replace("|", "\\|").replace("<think>", "`<think>`")
                default = o.default_text
                if o.default not in (None, [], ""):
                    default = f"`{default}`"
                lines.append(f"| `{o.name}` | {default} | {doc} |")
        lines.append("")
    return "\n".join(lines)
