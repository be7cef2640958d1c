"""Finding models: folders, and the hub through a stand-in server on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import pytest

from nano_inference.hub import resolve_model

COMMIT = "a" * 40
SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
OTHERS = {
    "README.md": b"# no",
    "onnx/model.onnx": b"no",
    "original/model.safetensors": b"no",
    "consolidated.safetensors": b"no",
}
REPOS = {
    "owner/whole": {
        **SMALL,
        **OTHERS,
        "chat_template.jinja": b"{{ messages }}",
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin": b"no",
    },
    "owner/old": {**SMALL, **OTHERS, "pytorch_model.bin": b"pickle"},
    "legacy": {**SMALL, "model.safetensors": b"weights"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes of the hub that a download needs."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.seen.append((self.command, path, self.headers.get("Authorization")))
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/"))
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        body = REPOS.get(repo, {}).get(rest.partition("/")[2])
        if body is None:
            return self.error(404, "EntryNotFound")
        etag = hashlib.sha1(body).hexdigest()
        self.reply(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def api(self, path):
        repo = next((r for r in REPOS if path == r or path.startswith(r + "/")), None)
        if path.startswith("owner/gated"):
            return self.error(403, "GatedRepo")
        if repo is None:
            return self.error(404, "RepoNotFound")
        kind, _, revision = path.removeprefix(repo).strip("/").partition("/")
        if revision not in ("", "main", COMMIT):
            return self.error(404, "RevisionNotFound")
        files = REPOS[repo]
        if kind == "tree":
            answer = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for p, b in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            answer = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def error(self, status, code):
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import json, sys
from nano_inference.hub import resolve_model
for options in json.loads(sys.argv[1]):
    try:
        path = resolve_model(**options)
        files = {p.name: p.read_text() for p in path.rglob("*") if p.is_file()}
        print(json.dumps(["path", str(path), files]))
    except (ValueError, RuntimeError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def resolve(home, endpoint, *calls, **env):
    """resolve_model in a process of its own, since huggingface_hub reads its environment once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = {**clean, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", **env}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def endpoint(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def text(files):
    return {name: body.decode() for name, body in files.items()}


WANTED = {name: body for name, body in REPOS["owner/whole"].items() if name not in OTHERS}
WANTED.pop("pytorch_model.bin")


def test_download_then_offline_from_the_cache(hub, tmp_path):
    hub.seen.clear()
    whole, old, legacy = resolve(
        tmp_path,
        endpoint(hub),
        {"model": "owner/whole", "token": "secret"},
        {"model": "owner/old", "revision": "main"},
        {"model": "legacy"},
    )
    assert whole[2] == text(WANTED)  # no other formats, no subfolders, no .bin beside safetensors
    assert old[2] == text({**SMALL, "pytorch_model.bin": b"pickle"})
    assert legacy[2] == text(REPOS["legacy"])
    assert whole[1].startswith(str(tmp_path))
    tokens = {t for _, path, t in hub.seen if "whole" in path}
    assert tokens == {"Bearer secret"}

    hub.seen.clear()
    again, old_again, unknown = resolve(
        tmp_path,
        endpoint(hub),
        {"model": "owner/whole"},
        {"model": "owner/old"},
        {"model": "owner/never"},
        HF_HUB_OFFLINE="1",
    )
    assert again[1:] == whole[1:]
    assert old_again[2] == old[2]
    assert unknown[0] == "ValueError"
    assert "'owner/never'" in unknown[1] and "HF_HUB_OFFLINE" in unknown[1]
    assert hub.seen == []


def test_errors_are_one_line_and_name_the_model(hub, tmp_path):
    calls = [
        {"model": "owner/nothing"},
        {"model": "owner/whole", "revision": "v9"},
        {"model": "owner/gated"},
    ]
    got = resolve(tmp_path, endpoint(hub), *calls)
    for (kind, message), call, words in zip(
        got, calls, ["neither a folder nor a model on the hub", "'v9'", "restricted"], strict=True
    ):
        assert kind == "ValueError"
        assert f"'{call['model']}'" in message and words in message
        assert "\n" not in message


def test_only_the_config(hub, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (got,) = resolve(
        tmp_path / "home",
        endpoint(hub),
        {"model": "owner/whole", "need_weights": False, "download_dir": str(elsewhere)},
    )
    assert got[1].startswith(str(elsewhere))
    assert not any(name.startswith("model-") for name in got[2])
    assert set(got[2]) >= {"config.json", "tokenizer.json", "chat_template.jinja"}


def test_unreachable_hub(tmp_path):
    # a port that was free a moment ago: nothing listens
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}"
    ((kind, message),) = resolve(tmp_path, address, {"model": "owner/whole"})
    assert kind == "ValueError"
    assert "'owner/whole'" in message and "unreachable" in message and "\n" not in message


def test_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model(str(tmp_path / "model")) == tmp_path / "model"
    assert resolve_model("~/model") == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model").samefile(tmp_path / "model")


@pytest.mark.parametrize(
    "model",
    ["./missing", "/no/such/folder", "a/b/c", "", "owner/", "a b", "x--y", "~/nothing"],
)
def test_neither_folder_nor_hub_name(model):
    with pytest.raises(ValueError, match="neither a folder nor"):
        resolve_model(model)


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))
