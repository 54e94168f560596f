"""Plugins that write where others read."""

from hostile.parts import FILES, LIBC, SPAWN, Hostile
from hostile.world import CHANGED


def _writes(name: str, rule: str, body: str, before: str = "", **more: object) -> Hostile:
    held_by = more.pop("held_by", FILES)
    return Hostile(name, CHANGED, rule, body, before, held_by=held_by, **more)  # type: ignore[arg-type]


def _leaves(name: str, rule: str, place: str, body: str = "open(path, 'w').close()") -> Hostile:
    """Leaves a file by the world's token in a place that others read."""
    text = f"path = {place}\n{body}"
    return Hostile(name, CHANGED, rule, text, "import os, sys", held_by=FILES)


CORPUS = [
    _writes("overwrites the ledger", "G202", "open(W['ledger'], 'wb').write(b'gone')"),
    _writes("adds to the settings", "G202", "open(W['config'], 'a').write('[trust]')"),
    _writes(
        "adds to a key by os", "G101", "os.write(os.open(W['key'], 1 | 1024), b'x')", "import os"
    ),
    _writes(
        "deletes rows of the ledger by duckdb",
        "G101",
        "with duckdb.connect(W['ledger']) as db:\n    db.execute('DELETE FROM cf_meta')",
        "import duckdb",
    ),
    _writes("truncates the ledger by path", "G101", "os.truncate(W['ledger'], 0)", "import os"),
    _writes("deletes the ledger", "G101", "os.unlink(W['ledger'])", "import os"),
    _writes(
        "renames the ledger", "G101", "os.rename(W['ledger'], W['ledger'] + '.old')", "import os"
    ),
    _writes(
        "moves a file of its own over the ledger",
        "G202",
        "open('mine', 'w').close()\nimport os\nos.replace('mine', W['ledger'])",
    ),
    _writes(
        "moves the secret into its scratch", "G101", "os.rename(W['secret'], 'mine')", "import os"
    ),
    _writes(
        "links the secret into its scratch", "G101", "os.link(W['secret'], 'mine')", "import os"
    ),
    _writes(
        "writes through a symbolic link",
        "G101",
        "os.symlink(W['ledger'], 'link')\npd.DataFrame({'a': [1]}).to_csv('link')",
        "import os",
    ),
    _writes("writes by pandas", "", "pd.DataFrame({'a': [1]}).to_csv(W['ledger'])"),
    _writes("writes by pandas as Parquet", "", "pd.DataFrame({'a': [1]}).to_parquet(W['ledger'])"),
    _writes(
        "writes by pandas into SQLite",
        "",
        "pd.DataFrame({'a': [1]}).to_sql('t', 'sqlite:/' + '//' + W['folder'] + '/new.db')",
    ),
    _writes("writes by numpy", "", "np.save(W['folder'] + '/new', np.zeros(3))"),
    _writes("writes by pyarrow", "", "pa.OSFile(W['folder'] + '/new', 'wb').close()"),
    _writes(
        "writes by a log",
        "G305",
        "logging.FileHandler(W['config']).close()\n"
        "logging.getLogger('x').addHandler(h := logging.FileHandler(W['config']))\n"
        "logging.getLogger('x').error('x')",
        "import logging, logging.handlers",
    ),
    _writes(
        "writes by a shell",
        "G101",
        "subprocess.run(['sh', '-c', 'echo x >> ' + W['config']])",
        SPAWN,
    ),
    _writes(
        "writes by libc",
        "G101",
        "libc.write(libc.open(W['config'].encode(), 1 | 1024), b'x', 1)",
        LIBC,
    ),
    _writes(
        "writes through its own root",
        "G202",
        "open('/proc/self/root' + W['config'], 'a').write('x')",
    ),
    _writes("makes a folder", "G101", "os.mkdir(W['folder'] + '/new')", "import os"),
    _writes("makes a symbolic link", "G101", "os.symlink('x', W['folder'] + '/new')", "import os"),
    _writes("makes a FIFO", "G101", "os.mkfifo(W['folder'] + '/new')", "import os"),
    _writes(
        "makes a device",
        "G101",
        "os.mknod(W['folder'] + '/new', 0o20666, 0x103)",
        "import os",
        held_by=("seccomp", "landlock", "capabilities"),
        privileged=True,
    ),
    _writes(
        "makes a socket",
        "G101",
        "socket.socket(socket.AF_UNIX).bind(W['folder'] + '/new')",
        "import socket",
        held_by=("seccomp", "landlock"),
    ),
    _writes(
        "opens the permissions of a folder",
        "G101",
        "os.chmod(W['mount'], 0o700)",
        "import os",
        held_by=("seccomp", "user"),
    ),
    _writes(
        "takes a file over",
        "G101",
        "os.chown(W['secret'], 60599, 60599)",
        "import os",
        held_by=("seccomp", "user"),
        privileged=True,
    ),
    _writes("touches a file", "G101", "os.utime(W['secret'])", "import os", held_by=("seccomp",)),
    _writes(
        "sets an extended attribute",
        "G101",
        "os.setxattr(W['secret'], 'user.evil', b'x')",
        "import os",
        held_by=("seccomp",),
    ),
    _writes(
        "removes an extended attribute",
        "G101",
        "os.removexattr(W['secret'], 'user.note')",
        "import os",
        held_by=("seccomp",),
    ),
    _writes(
        "writes into its neighbour's scratch",
        "G202",
        "open(W['neighbour'] + '/rows.csv', 'a').write('x')",
    ),
    _writes(
        "shuts its neighbour's scratch",
        "G101",
        "os.chmod(W['neighbour'], 0)",
        "import os",
        held_by=("seccomp", "user"),
    ),
    _leaves(
        "leaves a path file in site-packages", "G101", "W['code']['site'] + f\"/{W['token']}.pth\""
    ),
    _leaves(
        "leaves byte code beside the libraries",
        "G101",
        "W['code']['site'] + f\"/{W['token']}.cpython-311.pyc\"",
    ),
    _leaves(
        "leaves a shared library in the environment",
        "G101",
        "W['code']['prefix'] + f\"/{W['token']}.so\"",
    ),
    _leaves(
        "leaves a module in the interpreter", "G101", "W['code']['base'] + f\"/{W['token']}.py\""
    ),
    _leaves(
        "leaves a module in the guest's kit", "G101", "W['code']['kit'] + f\"/{W['token']}.py\""
    ),
    _leaves("leaves a file in /tmp", "G101", "f\"/tmp/{W['token']}\""),
    _leaves("leaves a file in shared memory", "G101", "f\"/dev/shm/{W['token']}\""),
]
