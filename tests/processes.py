"""Read from /proc the children, ports, environment and arguments of processes."""

import os
from pathlib import Path

LISTENING = "0A"  # state of a listening socket in /proc/net/tcp


def process_tree(pid: int) -> list[int]:
    """Return the process ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # After the name in parentheses: state, id of the parent process, ...
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    result = [pid]
    for parent in result:  # the list grows by the children of each process in it
        result += children.get(parent, [])
    return result


def arguments(pid: int) -> list[str]:
    """Return the arguments of a process, which every user of the machine can read."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment variables with which a process was started."""
    lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return {name: value for name, _, value in (line.partition("=") for line in lines if line)}


def listening_sockets(pid: int) -> set[tuple[str, int]]:
    """Return the address (as in /proc/net) and port of every socket on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)  # noqa: PTH115 (no path: socket:[inode])
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    result = set()
    for protocol in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:  # after the header
            # Of a socket: field 1 is its local address and port, 3 its state, 9 its inode.
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                result.add((address, int(port, 16)))
    return result


# The loopback addresses as /proc/net writes them: in hexadecimal, in the processor's byte order.
LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "00000000000000000000000001000000",  # ::1
}
