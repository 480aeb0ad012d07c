"""STAND-IN for the hub, which cannot be reached from here: it answers what the hub's real client (HfApi) asks
of create_repo, preupload, upload of large files, commit, and the list of files.

It knows nothing of access rights, branches or the hub's limits, and the client's newer way of sending large
files (xet) is switched off, since its other end is a service of its own. The one token is `hf_secret`.
"""

import contextlib
import http.server
import json
import threading


class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        names = list(self.server.files)
        if self.path == "/api/whoami-v2" and self.headers.get("Authorization") != "Bearer hf_secret":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "someone"})
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in names])
        else:
            siblings = [{"rfilename": name} for name in names]
            self.answer({"id": "someone/dpo", "sha": "0" * 40, "siblings": siblings})

    def do_PUT(self):
        self.server.large[self.path.split("/")[-1]] = self.body()
        self.answer({})

    def do_POST(self):
        server, body = self.server, self.body()
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            self.answer({"url": f"{server.url}/someone/dpo"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names, large = (
                [f["path"] for f in json.loads(body)["files"]],
                (".safetensors", ".bin", ".pt", ".pth", ".parquet"),
            )
            modes = {name: "lfs" if name.endswith(large) else "regular" for name in names}
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            to = {o["oid"]: {"upload": {"href": f"{server.url}/large/{o['oid']}"}} for o in objects}
            objects = [o | {"actions": to[o["oid"]]} for o in objects]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            server.commits.append(lines)
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "deletedFile":
                    server.files.pop(value["path"])
                elif key == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
                elif key == "file":
                    server.files[value["path"]] = value["content"]
            url = f"{server.url}/someone/dpo/commit/1"
            self.answer({"success": True, "commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self.answer({"error": f"the stub knows no {self.path}"}, 404)


@contextlib.contextmanager
def serving():
    """A hub with one repository: `files`, `large` (by checksum), `commits` and `created` are what it was
    sent, `environment` leads a client to it.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    server.files, server.large, server.commits, server.created = {}, {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
