"""A real HTTP server on loopback that gives files in ranges, and on request misbehaves as servers in the field do."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(kw_only=True)
class Fault:
    """What happens to requests whose path ends in `on`, `times` times. `after`: bytes of the body that come first."""

    on: str = ""
    times: int = 1
    status: int = 0
    """Answers with this status and nothing else."""
    retry_after: int | None = None
    cut: int | None = None
    """Closes the connection after so many bytes."""
    stall: int | None = None
    """Sends nothing more after so many bytes, until the server closes."""
    mute: bool = False
    """Never answers, until the server closes."""
    drip: float = 0.0
    """Sends a byte at a time, with so many seconds between two."""
    hold: int | None = None
    """Waits after so many bytes until `released` is set."""
    released: threading.Event = field(default_factory=threading.Event)
    whole: bool = False
    """Knows no ranges: sends all of the file."""
    longer: int = 0
    """States so many bytes more than it has, of a file that it sends whole, and closes the connection."""
    unstated: bool = False
    """Sends the file whole and states no length."""
    other_range: bool = False
    """Answers with the range one byte further."""
    redirect: str | None = None
    endless: bool = False
    """Sends links without end."""


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    status: int = 0
    """0 as long as no answer was begun."""
    start: int = 0
    """First byte of the file in the answer."""
    sent: int = 0
    """Bytes of the file that were sent."""


class Server:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        """By path, such as "set/train/0.tar"."""
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.authorization: str | None = None
        """Where set: requests without this header get `refusal`."""
        self.refusal = 401
        self.listing = True
        self.before: Callable[[str], None] = lambda path: None
        """Runs before each answer."""
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def of(self, name: str) -> list[Asked]:
        """The requests for files that end in `name`."""
        with self.lock:
            return [asked for asked in self.asked if asked.path.endswith(name)]

    def sent(self, name: str) -> int:
        """Bytes that were sent of it, in all requests."""
        return sum(asked.sent for asked in self.of(name))

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and path.endswith(fault.on):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: Server

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        self.shared.before(path)
        asked = Asked(path, dict(self.headers))
        with self.shared.lock:
            self.shared.asked.append(asked)
        try:
            self.answer(path, asked, self.shared.fault(path) or Fault())
        except ConnectionError:  # the other side gave up
            self.close_connection = True

    def answer(self, path: str, asked: Asked, fault: Fault) -> None:
        content = self.shared.files.get(path)
        if fault.mute:
            self.shared.closing.wait()
            self.close_connection = True
        elif fault.endless:
            self.send_response(200)
            self.end_headers()
            while not self.shared.closing.is_set():
                self.wfile.write(b'<a href="0.tar">0</a>\n' * 1000)
        elif fault.redirect:
            self.short(asked, 302, {"Location": fault.redirect})
        elif fault.status:
            self.short(asked, fault.status, {} if fault.retry_after is None else {"Retry-After": fault.retry_after})
        elif self.shared.authorization not in (None, self.headers.get("Authorization")):
            self.short(asked, self.shared.refusal, {})
        elif content is not None:
            body = self.head(asked, content, fault)
            if self.command == "GET":
                self.body(asked, body, fault)
        elif path.endswith("/") and self.shared.listing:
            self.short(asked, 200, {"Content-Type": "text/html"}, self.page(path))
        else:
            self.short(asked, 404, {})

    def short(self, asked: Asked, status: int, headers: dict[str, object], body: bytes = b"") -> None:
        asked.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def page(self, path: str) -> bytes:
        names = {name[len(path) :].partition("/")[0] for name in self.shared.files if name.startswith(path)}
        return "".join(f'<a href="{name}">{name}</a>\n' for name in sorted(names)).encode()

    def head(self, asked: Asked, content: bytes, fault: Fault) -> bytes:
        """Sends status and headers; the body that belongs to them."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or fault.whole or fault.longer or fault.unstated:
            asked.status = 200
            headers = {"Connection": "close"} if fault.unstated else {"Content-Length": len(content) + fault.longer}
            body = content
        else:
            asked.status = 206
            asked.start = int(wanted[1]) + fault.other_range
            body = content[asked.start : int(wanted[2]) + 1]
            where = f"{asked.start}-{asked.start + len(body) - 1}"
            if not body:
                asked.status, where = 416, "*"
            headers = {"Content-Range": f"bytes {where}/{len(content)}", "Content-Length": len(body)}
        self.send_response(asked.status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        return body

    def body(self, asked: Asked, body: bytes, fault: Fault) -> None:
        first = next((count for count in (fault.cut, fault.stall, fault.hold) if count is not None), len(body))
        if fault.drip:
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                if self.shared.closing.wait(fault.drip):
                    break
            return
        self.wfile.write(body[:first])
        asked.sent = min(first, len(body))
        if fault.hold is not None:
            while not (fault.released.wait(0.01) or self.shared.closing.is_set()):
                pass
            self.wfile.write(body[first:])
            asked.sent = len(body)
        elif fault.stall is not None:
            self.shared.closing.wait()
        if asked.sent < len(body) or fault.longer or fault.unstated:
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Server]:
    shared = Server()

    class Listening(ThreadingHTTPServer):
        request_queue_size = 64  # with Python's 5 a refused SYN costs a second
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    handler = type("Handler", (_Handler,), {"shared": shared})
    with Listening(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        shared.url = f"http://127.0.0.1:{server.server_address[1]}/set"
        try:
            yield shared
        finally:
            shared.closing.set()
            server.shutdown()
            thread.join()


def until(holds: Callable[[], object], *, within: float = 30.0) -> None:
    """Waits for something that another thread or process does."""
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.01)
