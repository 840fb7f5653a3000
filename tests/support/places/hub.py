"""Fake Hugging Face Hub: the endpoints that huggingface_hub 2 uses to publish and pull a model.

Large files are uploaded by LFS to signed URLs (one PUT, or parts above 2 MB), small ones in the
commit; downloads of large files are redirected to signed URLs. Writing requires a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets

from support.places.served import HttpRequest, HttpResponse, HttpServer, make_json_response

TOKEN = "hf_" + "t0ken" * 6
SIGNATURE = "X-Amz-Signature=5ecret5ignature"
SMALL_BYTES = 30_000
WHOLE_BYTES = 2_000_000
PART_BYTES = 700_000

Files = dict[str, bytes]


class FakeHub:
    """`repos`: branch to list of commits, newest last; a commit is its id and its files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, list[tuple[str, Files]]]] = {}
        self.private: dict[str, bool] = {}
        self.collections: dict[str, list[str]] = {}
        self.lfs: Files = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        self.ignored: set[str] = set()
        self._served = HttpServer(self.answer)
        self.port, self.close = self._served.port, self._served.close
        self.url = f"http://127.0.0.1:{self.port}"

    def files(self, repository: str, branch: str = "main") -> Files:
        """Return the files of the newest commit."""
        return self.repos[repository][branch][-1][1]

    def answer(self, request: HttpRequest) -> HttpResponse:
        """Handle a request."""
        self.requests.append((request.method, request.path))
        parts = request.path.strip("/").split("/")
        free = parts[0] == "cdn" or parts[:2] == ["api", "validate-yaml"]
        if (
            not free
            and request.method in {"POST", "PUT"}
            and request.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return make_json_response(401, {"error": "Invalid username or password."})
        if parts[:2] == ["api", "collections"]:
            return self._collect(request, "/".join(parts[2:4]), is_item=parts[4:] == ["items"])
        match parts:
            case ["api", "repos", "create"]:
                return self._create(json.loads(request.body()))
            case ["api", "validate-yaml"]:
                return make_json_response(200, {"errors": [], "warnings": []})
            case ["cdn", *rest]:
                return self._cdn(request, rest)
            case ["verify", oid]:
                return (
                    make_json_response(200, {})
                    if oid in self.lfs
                    else make_json_response(404, {"error": "not there"})
                )
            case ["api", "models", owner, name, *rest]:
                return self._api(request, f"{owner}/{name}", rest)
            case [_, _, "info", "lfs", "objects", "batch"]:
                return self._batch(json.loads(request.body()), request.headers["Host"])
            case [owner, name, "resolve", revision, *path]:
                return self._resolve(request, f"{owner}/{name}", revision, "/".join(path))
        return make_json_response(404, {"error": "no such page"})

    def make(self, repository: str) -> None:
        """Create an empty repository."""
        organization, name = repository.split("/")
        self._create({"organization": organization, "name": name})

    def _create(self, values: dict[str, str]) -> HttpResponse:
        repository = f"{values['organization']}/{values['name']}"
        if repository in self.repos:
            return make_json_response(409, {"error": "You already created this model repo"})
        self.repos[repository] = {
            "main": [(secrets.token_hex(20), {".gitattributes": b"*.safetensors filter=lfs\n"})]
        }
        self.private[repository] = values.get("visibility") == "private"
        return make_json_response(200, {"url": f"{self.url}/{repository}", "id": repository})

    def _collect(self, request: HttpRequest, slug: str, is_item: bool) -> HttpResponse:
        if slug not in self.collections:
            return make_json_response(404, {"error": "Collection not found"})
        if not is_item:
            return make_json_response(200, self._describe(slug))
        item = json.loads(request.body())["item"]
        if item["id"] not in self.repos or item["type"] != "model":
            return make_json_response(400, {"error": "no such model"})
        if item["id"] in self.collections[slug]:
            return make_json_response(409, {"error": "already in the collection"})
        self.collections[slug].append(item["id"])
        return make_json_response(200, self._describe(slug))

    def _describe(self, slug: str) -> dict[str, object]:
        names = self.collections[slug]
        items = [{"_id": n, "id": n, "type": "model", "position": i} for i, n in enumerate(names)]
        return {
            "slug": slug,
            "title": slug,
            "owner": {"name": slug.partition("/")[0]},
            "items": items,
            "lastUpdated": "2026-12-01T00:00:00.000Z",
            "position": 0,
            "private": False,
            "theme": "blue",
            "upvotes": 0,
        }

    def _api(self, request: HttpRequest, repository: str, rest: list[str]) -> HttpResponse:
        if repository not in self.repos:
            return make_json_response(
                404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        if rest[0] == "branch":
            branches = self.repos[repository]
            if rest[1] in branches:
                return make_json_response(409, {"error": "exists"})
            branches[rest[1]] = [branches["main"][-1]]
            return make_json_response(200, {})
        actual = self._commit(repository, rest[1] if len(rest) > 1 else "main")
        if actual is None:
            return make_json_response(
                404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
            )
        commit, files = actual
        if rest[0] == "revision":
            return make_json_response(200, {"id": repository, "sha": commit, "siblings": []})
        if rest[0] == "tree":
            return make_json_response(
                200, [entry(name, content) for name, content in files.items()]
            )
        if rest[0] == "preupload":
            asked = json.loads(request.body())["files"]
            output = [
                {
                    "path": file["path"],
                    "uploadMode": "regular" if file["size"] < SMALL_BYTES else "lfs",
                    "shouldIgnore": file["path"] in self.ignored,
                    "oid": None,
                }
                for file in asked
            ]
            return make_json_response(200, {"files": output})
        return (
            self._write(repository, rest[1], request.body())
            if rest[0] == "commit"
            else make_json_response(404, {})
        )

    def _write(self, repository: str, branch: str, body: bytes) -> HttpResponse:
        commits = self.repos[repository][branch]
        files = dict(commits[-1][1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    if value.get("parentCommit", commits[-1][0]) != commits[-1][0]:
                        return make_json_response(
                            412,
                            {"error": "A commit has happened since. Please refresh and try again."},
                        )
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.lfs:
                        return make_json_response(
                            400,
                            {"error": "Your push was rejected because an LFS pointer is missing"},
                        )
                    files[value["path"]] = self.lfs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commits.append((secrets.token_hex(20), files))
        return make_json_response(
            200, {"commitOid": commits[-1][0], "commitUrl": f"{self.url}/{repository}/commit/x"}
        )

    def _batch(self, asked: dict[str, list[dict[str, object]]], host: str) -> HttpResponse:
        output = []
        for wanted in asked["objects"]:
            oid, n_bytes = str(wanted["oid"]), int(str(wanted["size"]))
            if oid in self.lfs:
                output.append({"oid": oid, "size": n_bytes})
                continue
            verify = {"href": f"http://{host}/verify/{oid}"}
            if n_bytes > WHOLE_BYTES:
                count = -(-n_bytes // PART_BYTES)
                urls = {
                    f"{n:05d}": f"http://{host}/cdn/part/{oid}/{n}?{SIGNATURE}"
                    for n in range(1, count + 1)
                }
                header = {"chunk_size": str(PART_BYTES), **urls}
                upload: dict[str, object] = {
                    "href": f"http://{host}/cdn/whole/{oid}",
                    "header": header,
                }
            else:
                upload = {"href": f"http://{host}/cdn/put/{oid}?{SIGNATURE}"}
            output.append({
                "oid": oid,
                "size": n_bytes,
                "actions": {"upload": upload, "verify": verify},
            })
        return make_json_response(200, {"transfer": "basic", "objects": output})

    def _cdn(self, request: HttpRequest, rest: list[str]) -> HttpResponse:
        kind, oid = rest[0], rest[1]
        if (
            kind in {"put", "part", "get"}
            and request.query.get("X-Amz-Signature") != SIGNATURE.partition("=")[2]
        ):
            return HttpResponse(403, b"<Error><Code>AccessDenied</Code></Error>")
        if kind == "get":
            return HttpResponse(200, self.lfs[oid]) if oid in self.lfs else HttpResponse(404)
        body = request.body()
        self.received += len(body)
        if kind != "whole" and len(body) != int(request.headers["Content-Length"]):
            return HttpResponse(400)  # cut
        if kind == "part":
            self.parts.setdefault(oid, {})[int(rest[2])] = body
            return HttpResponse(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if kind == "whole":
            held = self.parts.pop(oid, {})
            output = json.loads(body)["parts"]
            body = b"".join(held[part["partNumber"]] for part in output)
        if hashlib.sha256(body).hexdigest() != oid:
            return HttpResponse(400, b"<Error><Code>BadDigest</Code></Error>")
        self.lfs[oid] = body
        return HttpResponse(200)

    def _resolve(
        self, request: HttpRequest, repository: str, revision: str, path: str
    ) -> HttpResponse:
        actual = self._commit(repository, revision)
        content = actual[1].get(path) if actual else None
        if content is None:
            return make_json_response(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            )
        oid = hashlib.sha256(content).hexdigest()
        if len(content) < SMALL_BYTES or oid not in self.lfs:
            return HttpResponse(200, content)
        return HttpResponse(
            302, headers={"Location": f"http://{request.headers['Host']}/cdn/get/{oid}?{SIGNATURE}"}
        )

    def _commit(self, repository: str, revision: str) -> tuple[str, Files] | None:
        branches = self.repos.get(repository, {})
        if revision in branches:
            return branches[revision][-1]
        return next(
            (
                commit
                for commits in branches.values()
                for commit in commits
                if commit[0] == revision
            ),
            None,
        )


def entry(name: str, content: bytes) -> dict[str, object]:
    """A line of a listing."""
    oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    output: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": oid}
    if len(content) >= SMALL_BYTES:
        output["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 134,
        }
    return output
