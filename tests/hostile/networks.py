"""Plugins that talk to somebody."""

from hostile.parts import LIBC, NET, SPAWN, Hostile
from hostile.world import CONTACTED, ESCAPED

CORPUS = [
    Hostile(
        "connects by TCP",
        CONTACTED,
        "G101",
        "socket.create_connection(('127.0.0.1', W['port']), 2)",
        "import socket",
        held_by=NET,
    ),
    Hostile(
        "sends by UDP",
        CONTACTED,
        "G101",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        ".sendto(b'x', ('127.0.0.1', W['udp_port']))",
        "import socket",
        held_by=("seccomp", "network_namespace"),
    ),
    Hostile(
        "reads a table from the network by pandas",
        CONTACTED,
        "",
        "return pd.read_csv(W['url'])",
        held_by=NET,
    ),
    Hostile(
        "reads JSON from the network by pandas",
        CONTACTED,
        "",
        "return pd.read_json(W['url'])",
        held_by=NET,
    ),
    Hostile(
        "fetches by urllib",
        CONTACTED,
        "G101",
        "urllib.request.urlopen(f\"http://127.0.0.1:{W['port']}/\", timeout=2)",
        "import urllib.request",
        held_by=NET,
    ),
    Hostile(
        "speaks to a store by pyarrow",
        CONTACTED,
        "G305",
        "fs.S3FileSystem(endpoint_override=f\"127.0.0.1:{W['port']}\", scheme='http',\n"
        "    region='x', access_key='a', secret_key='b', connect_timeout=1,\n"
        "    request_timeout=1, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1))"
        ".get_file_info('a/b')",
        "from pyarrow import fs",
        held_by=NET,
        fresh=True,
    ),
    Hostile(
        "connects to the control socket",
        CONTACTED,
        "G101",
        "socket.socket(socket.AF_UNIX).connect(W['control'])",
        "import socket",
    ),
    Hostile(
        "connects to an abstract socket",
        CONTACTED,
        "G101",
        "socket.socket(socket.AF_UNIX).connect(chr(0) + W['abstract'])",
        "import socket",
        held_by=("seccomp", "landlock_scope", "network_namespace"),
    ),
    Hostile(
        "sends to a socket file from a pair",
        CONTACTED,
        "G101",
        "one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "one.sendto(b'x', W['notify'])",
        "import socket",
    ),
    Hostile(
        "sends a message to a socket file from a pair",
        CONTACTED,
        "G101",
        "one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "one.sendmsg([b'x'], [], 0, W['notify'])",
        "import socket",
    ),
    Hostile(
        "speaks ZeroMQ to the Sentinel",
        CONTACTED,
        "G101",
        "with zmq.Context() as context, context.socket(zmq.DEALER) as sock:\n"
        "    sock.linger = 500\n"
        "    sock.connect(f\"tcp://127.0.0.1:{W['port']}\")\n"
        "    sock.send(b'x')",
        "import zmq",
        held_by=NET,
        fresh=True,
    ),
    Hostile(
        "connects by a shell",
        CONTACTED,
        "G101",
        "subprocess.run(['bash', '-c', f\"exec 3<>/dev/tcp/127.0.0.1/{W['port']}\"])",
        SPAWN,
        held_by=NET,
    ),
    Hostile(
        "connects by asyncio",
        CONTACTED,
        "G101",
        "asyncio.run(asyncio.open_connection('127.0.0.1', W['port']))",
        "import asyncio",
        held_by=NET,
    ),
    Hostile(
        "calls the kernel for a socket",
        CONTACTED,
        "G101",
        """
            number = call("socket", 2, 1, 0)
            address = (2).to_bytes(2, "little") + W["port"].to_bytes(2, "big") + bytes(
                [127, 0, 0, 1]) + bytes(8)
            call("connect", number, address, 16)
            """,
        LIBC,
        held_by=NET,
    ),
    Hostile(
        "asks its bridge for the machine's networks",
        ESCAPED,
        "G101",
        """
            for number in range(200):
                names = array.array("B", bytes(4096))
                request = struct.pack("iL", 4096, names.buffer_info()[0])
                try:
                    fcntl.ioctl(number, 0x8912, request)
                except OSError:
                    continue
                if bytes(names).strip(bytes(1)).replace(b"lo", b"").strip(bytes(1)):
                    return escaped()
            """,
        LIBC + "import array, fcntl, struct, socket\nheld = []\n"
        "try: held.append(socket.socketpair())\nexcept OSError: pass\n",
    ),
    Hostile(
        "sends out-of-band bytes",
        ESCAPED,
        "G101",
        "one, other = socket.socketpair()\none.send(b'x', socket.MSG_OOB)\nreturn escaped()",
        LIBC + "import socket",
    ),
    Hostile(
        "opens a socket of an odd family",
        ESCAPED,
        "G101",
        """
            for family in (16, 17, 38, 40, 30, 31, 44):
                for kind in (1, 2, 3, 5):
                    try:
                        socket.socket(family, kind)
                    except OSError:
                        continue
                    return escaped(family)
            """,
        LIBC + "import socket",
    ),
    Hostile(
        "makes a ring for system calls",
        ESCAPED,
        "G101",
        "call('io_uring_setup', 1, ctypes.create_string_buffer(120))\nreturn escaped()",
        LIBC,
    ),
]
