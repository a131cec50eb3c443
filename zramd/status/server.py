"""The status socket: a line with an attribute's name is answered with its text and a blank line.

    mm_stat              the text of the attribute, exactly as sysfs would print it
    mem_limit 512M       stores to the attribute; the answer is only the blank line
    anything refused     error: ERRNO what was wrong

A connection may ask any number of times. It costs a thread; what it can ask is bounded, and none of it waits for I/O.
"""

import logging
import socket
import threading

from zramd.status.attributes import AttributeRefusedError, Served, read, write

MAX_LINE = 4096
"""Bytes in a request."""
MAX_CLIENTS = 32
IDLE_SECONDS = 60.0
"""A client that asks nothing for so long is disconnected: the place may be needed."""
SEND_SECONDS = 5.0
"""A client that does not take its answer by then is disconnected."""

log = logging.getLogger(__name__)


class StatusServer:
    """Answers for one device on a listening socket, in threads of its own."""

    def __init__(self, listener: socket.socket, served: Served) -> None:
        self._listener = listener
        self._served = served
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        self._stopping = False

    def start(self) -> None:
        """Accept from now on."""
        threading.Thread(target=self._accept, name="status-accept", daemon=True).start()

    def stop(self) -> None:
        """Accept no more. Clients that are connected lose their connection with the process."""
        self._stopping = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                log.warning("cannot accept a status client: %s", error)
                threading.Event().wait(0.1)
                continue
            if not self._places.acquire(blocking=False):
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock,), name="status", daemon=True).start()
            except RuntimeError as error:
                log.warning("cannot serve a status client: %s", error)
                sock.close()
                self._places.release()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._answer_lines(sock)
        except OSError as error:
            log.debug("status client lost: %s", error)
        except Exception as error:
            log.error("status client ended by a defect of the server: %r", error)
        finally:
            self._places.release()

    def _answer_lines(self, sock: socket.socket) -> None:
        pending = b""
        while True:
            sock.settimeout(IDLE_SECONDS)
            received = sock.recv(MAX_LINE)
            pending += received
            *lines, pending = pending.split(b"\n")
            if not received and pending:
                lines.append(pending)
            sock.settimeout(SEND_SECONDS)
            for line in lines:
                if len(line) > MAX_LINE:
                    pending = line
                    break
                if line.strip():
                    sock.sendall(self._answer(line).encode() + b"\n")
            if len(pending) > MAX_LINE:
                sock.sendall(f"error: E2BIG a request has at most {MAX_LINE} bytes\n\n".encode())
                return
            if not received:
                return

    def _answer(self, line: bytes) -> str:
        try:
            name, _, value = line.decode(errors="replace").strip().partition(" ")
            if value:
                write(self._served, name, value)
                return ""
            return read(self._served, name)
        except AttributeRefusedError as error:
            return f"error: {error}\n"
