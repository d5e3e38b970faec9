"""A PostgreSQL server of the tests' own, on a socket in a folder of its own, without a port."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEM_USER = "postgres"  # Debian's package makes it; the server refuses to be root's


def find_postgres() -> Path | None:
    """The folder of the server's programs: on the PATH, or where Debian puts them; None where they cannot be run."""
    here = shutil.which("initdb")
    folders = [Path(here).parent] if here else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    can_run = os.geteuid() != 0 or (shutil.which("runuser") and SYSTEM_USER in {user.pw_name for user in pwd.getpwall()})
    return folders[0] if folders and can_run else None


@contextmanager
def own_postgres(programs: Path) -> Iterator[str]:
    """Start a server and give its address; end it afterwards."""
    is_root = os.geteuid() == 0
    prefix = ["runuser", "-u", SYSTEM_USER, "--"] if is_root else []
    with tempfile.TemporaryDirectory(prefix="tandem-postgres-") as made:
        folder = Path(made)
        data = folder / "data"
        if is_root:
            shutil.chown(folder, SYSTEM_USER)

        def run(*command: str) -> None:
            subprocess.run([*prefix, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

        control = [str(programs / "pg_ctl"), "-D", str(data), "-w"]
        run(str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "tandem", "-E", "UTF8", "--no-sync")
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run(*control, "-o", settings, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql+psycopg://tandem@/postgres?host={folder}"
        finally:
            run(*control, "-m", "immediate", "stop")
