"""One schema for command line, environment and TOML file: precedence, errors, documentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nano_inference import _core
from nano_inference.cli import main
from nano_inference.engine_args import EngineArgs
from nano_inference.server.args import (
    GROUPS,
    OPTIONS,
    Option,
    ServeArgs,
    load_args,
    options_table,
    unknown_variables,
)

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"

# What EngineArgs has and a server does not.
NOT_SERVED = {
    "skip_tokenizer_init": "the API speaks text",
    "num_gpu_blocks_override": "a flag that is another name of num_blocks",
    "use_tqdm_on_load": "a log has no progress bars",
}


def other_value(known: Option, tmp_path: Path) -> tuple[str, str, Any]:
    """A value that is not the default: as flag or variable, as TOML, and itself."""
    if known.name.endswith("_file") or known.name.startswith("ssl_"):
        (tmp_path / known.name).write_text("a-key\n")
        value = str(tmp_path / known.name)
        return value, repr(value), value
    if known.choices:
        value = next(c for c in known.choices if c != known.default)
        return value, repr(value), value
    if known.name == "isa":
        return "portable", "'portable'", "portable"
    if known.name == "device":
        return "cpu", "'cpu'", "cpu"
    if known.name == "root_path":
        return "/llm", "'/llm'", "/llm"
    if known.kind == "bool":
        value = not known.default
        return str(value).lower(), str(value).lower(), value
    if known.kind == "int":
        return "17", "17", 17
    if known.kind == "list[int]":
        return "4,2", "[4, 2]", [4, 2]
    if known.kind == "Size":
        return "3MiB", "'3MiB'", 3 << 20
    if known.kind == "float":
        return "0.25", "0.25", 0.25
    if known.kind == "list[str]":
        return "x", "['x']", ["x"]
    return "some-text", "'some-text'", "some-text"


# What an option needs beside it, or cannot stand.
WITH: dict[str, dict[str, Any]] = {
    "ssl_keyfile": {"ssl_certfile": __file__},
    "ssl_ca_certs": {"ssl_certfile": __file__},
    "allow_credentials": {"allowed_origins": ["https://example.org"]},
    "enable_chunked_prefill": {"max_num_batched_tokens": 4096},
    "enforce_eager": {"device": "cuda"},
    "cudagraph_capture_sizes": {"device": "cuda"},
}


@pytest.fixture(autouse=True)
def one_card(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Some options need a card, the others none."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    has_card = WITH.get(str(name), {}).get("device") == "cuda"
    monkeypatch.setattr(_core, "cuda_devices", lambda: ["NVIDIA H200"] * has_card)


def with_flags(name: str) -> dict[str, Any]:
    return {
        key: (tuple(value) if isinstance(value, list) else str(value))
        for key, value in WITH.get(name, {}).items()
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_from_every_source(name: str, tmp_path: Path) -> None:
    known = OPTIONS[name]
    text, toml, value = other_value(known, tmp_path)
    assert value != known.default
    more = with_flags(name)
    file = tmp_path / "serve.toml"
    file.write_text(f"{name} = {toml}\n")
    flag: Any = text
    if known.kind == "bool":
        flag = value
    elif known.kind == "list[str]":
        flag = (text,)
    expected = dataclasses.replace(ServeArgs(**WITH.get(name, {})), **{name: value})
    assert load_args({name: flag, **more}, {}) == expected
    assert load_args(more, {known.variable: text}) == expected
    assert load_args({"config": str(file), **more}, {}) == expected
    assert load_args(more, {"NANO_INFERENCE_CONFIG": str(file)}) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_type_in_the_file_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f"{name} = {{ a = 1 }}\n")
    with pytest.raises(ValueError, match=f"^{name} must be .* \\(from {name} in {file}\\)$"):
        load_args({"config": str(file)}, {})


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nhost = "1.1.1.1"\nmax-waiting = 11\n')
    environ = {"NANO_INFERENCE_PORT": "2", "NANO_INFERENCE_HOST": "2.2.2.2"}
    args = load_args({"config": str(file), "port": "3"}, environ)
    assert (args.port, args.host, args.max_waiting) == (3, "2.2.2.2", 11)
    assert args.block_size == 16
    other = tmp_path / "other.toml"
    other.write_text("port = 5\n")
    environ = {"NANO_INFERENCE_CONFIG": str(file)}
    assert load_args({"config": str(other)}, environ).port == 5


def test_lists_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "cuda_devices", lambda: ["NVIDIA H200"])
    for text in ("1,2, 8", "[1, 2, 8]"):
        environ = {"NANO_INFERENCE_CUDAGRAPH_CAPTURE_SIZES": text}
        assert load_args({"device": "cuda"}, environ).cudagraph_capture_sizes == [1, 2, 8]


def test_lists() -> None:
    assert load_args({"api_key": ("a,b", "c")}, {}).api_key == ["a,b", "c"]
    assert load_args({"allowed_origins": ('["x", "y"]',)}, {}).allowed_origins == ["x", "y"]
    environ = {"NANO_INFERENCE_ALLOWED_ORIGINS": "http://a, http://b"}
    assert load_args({}, environ).allowed_origins == ["http://a", "http://b"]
    with pytest.raises(ValueError, match="served_model_name must be a list of non-empty strings"):
        load_args({"served_model_name": ("",)}, {})


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "message"),
    [
        ({"port": "99999"}, {}, "", "port must be an integer between 0 and 65535, got 99999 "
         "(from --port)"),
        ({"port": "eighty"}, {}, "", "port must be an integer, got 'eighty' (from --port)"),
        ({}, {"NANO_INFERENCE_BLOCK_SIZE": "0"}, "", "block_size must be an integer of at least 1, "
         "got 0 (from NANO_INFERENCE_BLOCK_SIZE)"),
        ({}, {"NANO_INFERENCE_ACCESS_LOG": "maybe"}, "", "access_log must be 1, true, yes, on, or "
         "0, false, no, off, got 'maybe' (from NANO_INFERENCE_ACCESS_LOG)"),
        ({}, {"NANO_INFERENCE_PORT": "tcp://10.0.0.1:8000"}, "", "Kubernetes"),
        ({"isa": "sse"}, {}, "", "isa must be one of"),
        ({"device": "tpu"}, {}, "", "device must be 'auto', 'cpu', 'cuda', or"),
        ({}, {"NANO_INFERENCE_DEVICE": "cuda"}, "", "(from NANO_INFERENCE_DEVICE)"),
        ({"kv_cache_dtype": "fp8"}, {}, "", "only CUDA has caches of this type (from --kv-cache-"),
        ({"enforce_eager": True}, {}, "", "enforce_eager=True is not possible on cpu"),
        ({"cudagraph_capture_sizes": "1,x"}, {}, "", "a list of integers, as 1,2,4, got '1,x'"),
        ({"cudagraph_capture_sizes": "0"}, {}, "", "cudagraph_capture_sizes must be an integer of"),
        ({}, {}, "cudagraph_capture_sizes = []", "cudagraph_capture_sizes must be a list"),
        ({"isa": "sse"}, {}, "", "(from --isa)"),
        ({"max_num_seqs": "8"}, {"NANO_INFERENCE_MAX_NUM_BATCHED_TOKENS": "4"}, "",
         "(from NANO_INFERENCE_MAX_NUM_BATCHED_TOKENS, --max-num-seqs)"),
        ({}, {}, "hots = '0.0.0.0'", "does not know 'hots'; did you mean 'host'?"),
        ({}, {}, "port = true", "port must be an integer between 0 and 65535, got True (from port"),
        ({}, {}, "max_request_bytes = '3QB'", "max_request_bytes: '3QB' is no size"),
        ({}, {}, "port = ", "is no TOML: "),
        ({"gpu_memory_utilization": "1.5"}, {}, "", "gpu_memory_utilization must be a number"),
        ({"health_timeout": "nan"}, {}, "", "health_timeout must be a number above 0"),
        ({"drain_timeout": "inf"}, {}, "", "drain_timeout must be a number of at least 0"),
        ({"root_path": "llm"}, {}, "", "root_path must be a path, as /llm, got 'llm'"),
        ({"ssl_keyfile": __file__}, {}, "", "ssl_keyfile needs ssl_certfile (from --ssl-keyfile)"),
        ({"ssl_certfile": "/nowhere.pem"}, {}, "", "ssl_certfile /nowhere.pem cannot be read"),
        ({"api_key": ("a b",)}, {}, "", "api_key and the lines of api_key_file must be printable"),
        ({"api_key_file": "/dev/null"}, {}, "", "api_key_file /dev/null holds no key"),
        ({"allow_credentials": True, "allowed_origins": ("*",)}, {}, "", "that are listed, not *"),
        ({"allow_credentials": True}, {}, "", "allow_credentials needs allowed_origins"),
        ({"num_blocks": "3", "kv_cache_memory_bytes": "3GB"}, {}, "", "both size the cache"),
        ({"num_blocks": "3"}, {}, "gpu_memory_utilization = 0.9", "size the cache: give one ("),
    ],
)  # fmt: skip
def test_refusals_name_the_source(
    flags: dict[str, Any], environ: dict[str, str], toml: str, message: str, tmp_path: Path
) -> None:
    if toml:
        file = tmp_path / "serve.toml"
        file.write_text(toml)
        flags = {**flags, "config": str(file)}
        message = message.replace("(from port", f"(from port in {file})")
    with pytest.raises(ValueError) as caught:
        load_args(flags, environ)
    assert message in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(ValueError, match="config /nowhere.toml cannot be read: No such file"):
        load_args({"config": "/nowhere.toml"}, {})


def test_unknown_variables_are_told() -> None:
    environ = {
        "NANO_INFERENCE_PRT": "1",
        "NANO_INFERENCE_PORT": "1",
        "NANO_INFERENCE_CONFIG": "x",
        "NANO_INFERENCE_CACHE": "x",
        "NANO_INFERENCE_SERVICE_HOST": "10.0.0.1",
        "NANO_INFERENCE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "HOME": "/",
    }
    (warning,) = unknown_variables(environ)
    assert "'NANO_INFERENCE_PRT'; did you mean 'NANO_INFERENCE_PORT'?" in warning


# -- ServeArgs ------------------------------------------------------------------------------------


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="ServeArgs does not know 'prot'; did you mean 'port'"):
        ServeArgs(prot=1)


def test_model_names() -> None:
    assert ServeArgs().model_names == ["nano-5m"]
    assert ServeArgs(model="org/name").model_names == ["org/name"]
    assert ServeArgs(model="m", served_model_name=["a", "b"]).model_names == ["a", "b"]


def test_keys_of_flags_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nse#cond\n\n third # until May\n\t# no key\n")
    args = ServeArgs(api_key=["first"], api_key_file=str(file), hf_token="hf-secret")
    assert args.api_keys == ["first", "se#cond", "third"]
    assert "first" not in repr(args) and "hf-secret" not in repr(args)


def test_the_engine_gets_all_of_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for field in dataclasses.fields(EngineArgs):
        cards = ["NVIDIA H200"] if "device" in WITH.get(field.name, {}) else []
        monkeypatch.setattr(_core, "cuda_devices", lambda cards=cards: cards)
        if field.name in NOT_SERVED:
            assert field.name not in OPTIONS
            continue
        known = OPTIONS[field.name]
        _, _, value = other_value(known, tmp_path)
        more = WITH.get(field.name, {})
        given = ServeArgs(**{"model": "m", **more, field.name: value}).engine_args()
        assert getattr(given, field.name) == value
        # Equal defaults, but for what a server does otherwise.
        if field.name not in ("model", "max_waiting", "disable_log_stats"):
            assert known.default == field.default
    assert ServeArgs(model="m").engine_args().max_waiting == 1024


# -- The command ----------------------------------------------------------------------------------


def invoke(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["serve", *args], env=env)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeArgs]:
    """What the server would be started with."""
    from nano_inference.server import run

    seen: list[ServeArgs] = []

    def run_server(args: ServeArgs) -> int:
        seen.append(args)
        return 0

    monkeypatch.setattr(run, "run_server", run_server)
    return seen


def test_flags_reach_the_server(served: list[ServeArgs], tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("drain_timeout = 3\nport = 1\n")
    command = ["--config", str(file), "--port", "0", "--api-key", "a", "--api-key", "b"]
    command += ["--no-access-log", "--kv-cache-memory", "4MB", "--log-format=json"]
    assert invoke(*command, env={"NANO_INFERENCE_HOST": "::1"}).exit_code == 0
    assert served == [
        ServeArgs(
            port=0,
            host="::1",
            drain_timeout=3,
            api_key=["a", "b"],
            access_log=False,
            kv_cache_memory_bytes=4_000_000,
            log_format="json",
        )
    ]
    assert invoke("--num-gpu-blocks-override", "9").exit_code == 0
    assert served[-1].num_blocks == 9


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "99999"], ["port must be", "99999", "--port"]),
        (["--prot", "1"], ["--prot", "--port"]),
        (["--log-format", "xml"], ["log_format must be one of 'text', 'json'"]),
        (["extra"], ["extra"]),
        (["--config", "/nowhere.toml"], ["/nowhere.toml"]),
    ],
)
def test_wrong_usage(args: list[str], words: list[str], served: list[ServeArgs]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and not served
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_help_shows_every_option_in_its_group() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    places = [result.stdout.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    words = result.stdout.replace("/", " ").replace(",", " ").split()
    for known in OPTIONS.values():
        assert words.count(known.flag) == 1
        if known.kind == "bool":
            assert f"--no-{known.flag[2:]}" in words
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Serve a model" in CliRunner().invoke(main, ["--help"]).stdout


def test_the_documentation_shows_the_schema() -> None:
    assert options_table() in DOCS.read_text(encoding="utf-8")
