"""A local S3 server (moto) with planned failures and delays; run as `python s3_server.py PORT`.

Every 11th request gets 503 SlowDown, every 13th 500, and every 17th is delayed by half a second.
"""

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Faulty:
    """WSGI middleware that injects the faults."""

    def __init__(self, application: Any) -> None:
        self.application, self.count = application, itertools.count(1)
        self.conditional = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        number = next(self.count)
        if number % 17 == 0:
            time.sleep(0.5)
        for every, status, code in ((11, "503 Slow Down", "SlowDown"), (13, "500 Internal Error", "InternalError")):
            if number % every == 0:
                start_response(status, [("Content-Type", "application/xml")])
                return [f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>again</Message></Error>'.encode()]
        # Object stores carry out conditional writes one after another; moto does not.
        is_conditional = environ["REQUEST_METHOD"] == "PUT" and "HTTP_IF_NONE_MATCH" in environ
        with self.conditional if is_conditional else contextlib.nullcontext():
            answer: Iterable[bytes] = self.application(environ, start_response)
        return answer


class Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    application = Faulty(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", int(sys.argv[1]), application, threaded=True, request_handler=Quiet).serve_forever()
