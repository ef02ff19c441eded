"""A loop-back server of object storage: as much of S3 as listing and reading take."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "drives"


class _S3(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, kind="application/xml", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", headers.pop("length", str(len(content))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_object(self, content):
        """Send an object or the range that is asked for."""
        dates = {"Last_Modified": "Sat, 28 Nov 2026 10:00:00 GMT", "ETag": '"0"', "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.answer(content, kind="application/octet-stream", **dates)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last) if last else len(content) - 1, len(content) - 1)
        part = content[int(first) : end + 1]
        dates["Content_Range"] = f"bytes {first}-{end}/{len(content)}"
        return self.answer(part, 206, "application/octet-stream", **dates)

    @property
    def target(self):
        parts = urlsplit(self.path)
        return unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}

    def found(self, prefix, delimiter):
        """Objects below a prefix, and the folders among them if there is a delimiter."""
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        if not delimiter:
            return keys, []
        folders = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]}
        return [key for key in keys if "/" not in key[len(prefix) :]], sorted(folders)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, query = self.target
        key = path.removeprefix(f"/{BUCKET}").lstrip("/")
        if not path.startswith(f"/{BUCKET}"):
            return self.answer(b"<Error><Code>NoSuchBucket</Code></Error>", 404)
        if key:
            if key not in self.objects:
                return self.answer(b"<Error><Code>NoSuchKey</Code></Error>", 404)
            return self.send_object(self.objects[key])
        keys, folders = self.found(query.get("prefix", ""), query.get("delimiter", ""))
        entries = "".join(
            f"<Contents><Key>{escape(each)}</Key><Size>{len(self.objects[each])}</Size>"
            "<LastModified>2026-11-28T10:00:00.000Z</LastModified><ETag>0</ETag></Contents>"
            for each in keys
        )
        entries += "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders)
        head = f"<Name>{BUCKET}</Name><IsTruncated>false</IsTruncated><KeyCount>{len(keys) + len(folders)}</KeyCount>"
        return self.answer(f'<?xml version="1.0"?><ListBucketResult>{head}{entries}</ListBucketResult>'.encode())


@contextmanager
def s3(objects: dict[str, bytes]) -> Iterator[str]:
    """Serve objects by key; yields a pattern of addresses, to be formatted with a path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_S3,), {"objects": objects}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        options = f"region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
        yield f"s3://KEY:SECRET@{BUCKET}/{{}}?{options}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


__all__ = ["BUCKET", "s3"]
