"""A bucket of the tests' own, behind moto's S3 server: the program that TANDEM_TEST_MOTO names, as `.ci/run` does.

None is looked for on the PATH: an older one breaks off what pyarrow uploads.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SERVER = "TANDEM_TEST_MOTO"
WHY_NONE = f"{SERVER} names no moto_server (pip install 'moto[server,s3]==5.2.5')"
BUCKET = "s3://bucket/tandem"
MAKE_BUCKET = "import sys, urllib.request as http; http.urlopen(http.Request(sys.argv[1], method='PUT'))"


def has_bucket() -> bool:
    """Whether there is such a server."""
    return SERVER in os.environ


def bucket_environment(address: str, port: int) -> dict[str, str]:
    """Return what a process needs to reach it, as pyarrow reads it."""
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": f"http://{address}:{port}", **keys}


@contextmanager
def own_bucket(address: str, port: int, on_host: Sequence[str] = ()) -> Iterator[None]:
    """Start a server with the bucket in it, and end it afterwards; `on_host` is put before its command."""
    url = f"http://{address}:{port}/bucket"
    command = [*on_host, os.environ[SERVER], "--host", address, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run([*on_host, sys.executable, "-c", MAKE_BUCKET, url], capture_output=True, check=False).returncode:
            assert server.poll() is None, "it ended"
            assert time.monotonic() < deadline, "it did not start"
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()
