"""`slow_link.py PORT TO_PORT BYTES_PER_S DELAY_S`: a slow way to an HTTP server on loopback, as a process."""

from __future__ import annotations

import sys
import threading

from faulty_proxy import FaultyProxy


def main() -> None:
    port, to_port, bytes_per_s, delay_s = sys.argv[1:]
    proxy = FaultyProxy(
        "127.0.0.1", int(to_port), delay_s=float(delay_s), uplink_bytes_per_s=float(bytes_per_s), listen_on=int(port)
    )
    proxy.applies = lambda method, path: True
    proxy.rates = {"delay": 1.0}
    threading.Event().wait()


if __name__ == "__main__":
    main()
