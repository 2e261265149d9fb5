"""A person at a terminal, for programs that behave differently there."""

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path


class Terminal:
    """A program in a pseudo-terminal, which keeps no history unless the environment says where."""

    def __init__(self, *command: str, **environment: str):
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_own_terminal,
            env={**os.environ, "TERM": "dumb", "JAXGEN_CHAT_HISTORY": "off", **environment},
        )  # fmt: skip
        os.close(slave)
        self.screen = ""

    def wait_for(self, pattern: str, seconds: float = 600) -> str:
        """What is on the screen up to the end of the pattern, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {pattern!r} in vain; the screen: {self.screen!r}"
            try:
                self.screen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # the program has left
                assert re.search(pattern, self.screen), self.screen
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def wait_until_it_waits(self) -> None:
        """For a key: Linux calls it sleeping, and not only for a moment, as while it writes its prompt."""
        state, looks = Path(f"/proc/{self.process.pid}/stat"), 0
        while state.exists() and looks < 10:
            looks = looks + 1 if state.read_text().rpartition(") ")[2][0] == "S" else 0
            time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _own_terminal() -> None:
    """Makes standard input the terminal that sends the signals."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
