"""Plugins that read what is not theirs: files, the worker, their neighbours."""

from hostile.parts import FILES, LIBC, SPAWN, Hostile
from hostile.world import LEAKED


def _reads(name: str, rule: str, expression: str, before: str = "", **more: object) -> Hostile:
    """An expression that gives the secret's text."""
    held_by = more.pop("held_by", FILES)
    body = f"return [{{'a': str({expression})}}]"
    return Hostile(name, LEAKED, rule, body, before, held_by=held_by, **more)  # type: ignore[arg-type]


READS = [
    _reads("opens a file", "G202", "open(W['secret']).read()"),
    _reads("opens a key", "G202", "open(W['key']).read()"),
    _reads("opens the settings", "G202", "open(W['config']).read()"),
    _reads("opens by os", "G101", "os.read(os.open(W['secret'], 0), 99)", "import os"),
    _reads("opens by io.FileIO", "G202", "io.FileIO(W['secret']).read()", "import io"),
    _reads(
        "opens by the built-in module's own function",
        "G301",
        "print.__self__.open(W['secret']).read()",
    ),
    _reads(
        "walks from an object to FileIO",
        "G301",
        "next(c for c in all_of(object) if c.__name__ == 'FileIO')(W['secret']).read()",
        """
           def all_of(kind):
               for below in type.__subclasses__(kind):
                   yield below
                   yield from all_of(below)
           """,
    ),
    _reads(
        "takes open out of a frame",
        "G302",
        "found()(W['secret']).read()",
        """
           def found():
               try:
                   1 / 0
               except ZeroDivisionError as error:
                   return error.__traceback__.tb_frame.f_builtins["open"]
           """,
    ),
    _reads(
        "takes open out of a function's globals",
        "G301",
        "(lambda: 0).__globals__['__builtins__']['open'](W['secret']).read()",
        "__builtins__ = print.__self__.__dict__",
    ),
    _reads(
        "evaluates text under another name",
        "G201",
        "run('op' + 'en(W[\\'secret\\']).read()')",
        "run = eval",
    ),
    _reads(
        "evaluates text by a subscript",
        "G201",
        "C['open(W[\"secret\"]).read()']",
        "class C:\n    __class_getitem__ = eval",
    ),
    _reads(
        "runs text by a decorator",
        "G201",
        "FOUND",
        """
           @exec
           @(lambda _: "FOUND = open(W['secret']).read()")
           class Text: ...
           """,
    ),
    _reads(
        "runs text by a metaclass",
        "G206",
        "Text.found",
        """
           class Meta(type):
               def __new__(meta, name, bases, space):
                   space["found"] = eval("open(W['secret']).read()")
                   return type.__new__(meta, name, bases, space)
           class Text(metaclass=Meta): ...
           """,
    ),
    _reads(
        "has an annotation evaluated",
        "G305",
        "hints(f)['x'].text",
        """
           from typing import get_type_hints as hints
           class Text:
               def __init__(self, text): self.text = text
               def __call__(self): ...
           def f(x: "Text(open(W['secret']).read())"): ...
           """,
    ),
    _reads(
        "has pydantic evaluate an annotation",
        "G202",
        "M.model_json_schema()",
        """
           from typing import Annotated
           from pydantic import BaseModel, Field
           class M(BaseModel):
               a: "Annotated[int, Field(description=open(W['secret']).read())]"
           """,
    ),
    _reads(
        "has a named tuple evaluate an annotation",
        "G305",
        "hints(N)['a'].__metadata__",
        """
           from typing import Annotated, NamedTuple
           from typing import get_type_hints
           def hints(kind): return get_type_hints(kind, include_extras=True)
           class N(NamedTuple):
               a: "Annotated[int, open(W['secret']).read()]"
           """,
    ),
    _reads("imports by name", "G103", "__import__('o' + 's').popen('cat ' + W['secret']).read()"),
    _reads(
        "imports by importlib",
        "G103",
        "load('subprocess').check_output(['cat', W['secret']])",
        "from importlib import import_module as load",
    ),
    _reads(
        "finds os within another module",
        "G303",
        "pd.io.common.os.popen('cat ' + W['secret']).read()",
    ),
    _reads(
        "calls a computed attribute",
        "G203",
        "getattr(getattr(getattr(pd, 'i' + 'o'), 'comm' + 'on'), 'o' + 's')"
        ".popen('cat ' + W['secret']).read()",
    ),
    _reads(
        "unpickles by numpy",
        "G301",
        "(save(), np.load('p.npy', allow_pickle=True)[0])",
        """
           class P:
               def __reduce__(self): return (eval, ("open(W['secret']).read()", {"W": W}))
           def save(): np.save("p.npy", np.array([P()], dtype=object), allow_pickle=True)
           """,
    ),
    _reads(
        "unpickles by pandas",
        "G202",
        "(save(), pd.read_pickle('p.pkl'))",
        """
           def save():
               with open("p.pkl", "wb") as file:
                   text = b"open('" + W["secret"].encode() + b"').read()"
                   file.write(b"c__builtin__\\neval\\n(V" + text + b"\\ntR.")
           """,
    ),
    _reads(
        "unpickles what pyarrow carries",
        "G101",
        "pickle.loads(pa.array([TEXT]).to_pylist()[0])",
        """
           import pickle
           TEXT = b"c__builtin__\\neval\\n(Vopen('" + W["secret"].encode() + b"').read()\\ntR."
           """,
    ),
    _reads("maps a file by pyarrow", "", "pa.memory_map(W['secret']).read()"),
    _reads("streams a file by pyarrow", "", "pa.input_stream(W['secret']).read()"),
    _reads("opens a file by pyarrow's OSFile", "", "pa.OSFile(W['secret']).read()"),
    _reads("reads a table by pyarrow", "", "pa.csv.read_csv(W['secret'])", "import pyarrow.csv"),
    _reads(
        "reads a folder by pyarrow's data sets",
        "",
        "ds.dataset(W['secret'], format='csv').to_table()",
        "import pyarrow.dataset as ds",
    ),
    _reads(
        "reads by pyarrow's local file system",
        "G305",
        "fs.LocalFileSystem().open_input_file(W['secret']).read()",
        "from pyarrow import fs",
    ),
    _reads(
        "lists by pyarrow's local file system",
        "G305",
        "fs.LocalFileSystem().get_file_info(fs.FileSelector(W['folder']))",
        "from pyarrow import fs",
    ),
    _reads("reads by pandas", "", "pd.read_csv(W['secret'])"),
    _reads("reads by pandas from a file URL", "", "pd.read_csv(W['file_url'])"),
    _reads("reads by pandas with fixed widths", "", "pd.read_fwf(W['secret'])"),
    _reads("reads lines by numpy", "", "np.loadtxt(W['secret'], dtype=str)"),
    _reads("reads bytes by numpy", "", "np.fromfile(W['secret'], dtype='S1').tobytes()"),
    _reads("maps a file by numpy", "", "bytes(np.memmap(W['secret'], mode='r'))"),
    _reads(
        "reads beside its input",
        "",
        "pd.read_csv(file_path.rpartition('/')[0] + '/..' * 40 + W['secret'])",
    ),
    _reads("reads by polars", "G101", "pl.read_csv(W['secret'])", "import polars as pl"),
    _reads(
        "reads the ledger by duckdb",
        "G101",
        "duckdb.connect(W['ledger'], read_only=True).sql('FROM cf_meta').fetchall()",
        "import duckdb",
    ),
    _reads(
        "reads text by duckdb",
        "G101",
        "duckdb.sql(f\"FROM read_text('{W['secret']}')\").fetchall()",
        "import duckdb",
    ),
    _reads("reads the ledger's bytes", "G202", "open(W['ledger'], 'rb').read()"),
    _reads(
        "reads lines for tracebacks", "G101", "linecache.getlines(W['secret'])", "import linecache"
    ),
    _reads(
        "reads by libc",
        "G101",
        "read()",
        LIBC
        + """
def read():
    buffer = ctypes.create_string_buffer(200)
    libc.read(libc.open(W["secret"].encode(), 0), buffer, 200)
    return buffer.value
""",
    ),
    _reads(
        "reads by another program", "G101", "subprocess.check_output(['cat', W['secret']])", SPAWN
    ),
    _reads(
        "reads by a shell",
        "G101",
        "subprocess.getoutput('while read l; do echo $l; done < ' + W['secret'])",
        SPAWN,
    ),
    _reads(
        "reads by a fresh interpreter",
        "G101",
        "subprocess.check_output([sys.executable, '-I', '-S', '-c', "
        "'import sys; print(open(sys.argv[1]).read())', W['secret']])",
        SPAWN,
    ),
    _reads(
        "reads by a symbolic link",
        "G101",
        "(os.symlink(W['secret'], 'link'), pd.read_csv('link'))",
        "import os",
    ),
    _reads(
        "reads by a link in a linked folder",
        "G101",
        "(os.symlink(W['folder'], 'folder'), pd.read_csv('folder/secret.txt'))",
        "import os",
    ),
    _reads("reads through its own root", "G202", "open('/proc/self/root' + W['secret']).read()"),
    _reads(
        "reads through its own working folder",
        "G101",
        "(os.chdir(W['folder']), open('/proc/self/cwd/secret.txt').read())",
        "import os",
    ),
    _reads(
        "reopens a descriptor that was only a path",
        "G101",
        "open(f\"/proc/self/fd/{os.open(W['secret'], os.O_PATH)}\").read()",
        "import os",
    ),
    _reads(
        "opens by a file handle",
        "G101",
        "read()",
        LIBC
        + """
def read():
    handle = ctypes.create_string_buffer(136)
    ctypes.c_uint.from_buffer(handle).value = 128
    mount = ctypes.c_int()
    call("name_to_handle_at", -100, W["secret"].encode(), handle, ctypes.byref(mount), 0)
    folder = os.open(W["folder"], os.O_PATH | os.O_DIRECTORY)
    root = os.open("/", os.O_PATH)
    for at in (os.open(W["folder"], os.O_RDONLY), root, folder):
        try:
            return os.read(call("open_by_handle_at", at, handle, 0), 99)
        except OSError:
            pass
""",
        held_by=("seccomp", "landlock"),
        privileged=True,
    ),
    _reads(
        "reads what it inherited",
        "G101",
        "[read(n) for n in range(3, 200)]",
        """
           import os
           def read(number):
               try:
                   return os.pread(number, 99, 0)
               except OSError:
                   return b""
           """,
        held_by=(),
    ),
    _reads("lists a folder", "G101", "os.listdir(W['folder'])", "import os"),
    _reads("searches a folder", "G101", "glob.glob(W['folder'] + '/*')", "import glob"),
    _reads(
        "completes names by a shell",
        "G101",
        "subprocess.getoutput('echo ' + W['folder'] + '/*')",
        SPAWN,
    ),
    _reads(
        "reads an extended attribute",
        "G101",
        "os.getxattr(W['secret'], 'user.note')",
        "import os",
        held_by=("seccomp",),
    ),
    _reads(
        "maps a file into memory",
        "G101",
        "mmap.mmap(os.open(W['secret'], 0), 0, access=mmap.ACCESS_READ)[:]",
        "import mmap, os",
    ),
    _reads("reads its neighbour's scratch", "G202", "open(W['neighbour'] + '/rows.csv').read()"),
    _reads(
        "lists its neighbour's scratch and reads it",
        "G101",
        "[open(os.path.join(W['neighbour'], n)).read() for n in os.listdir(W['neighbour'])]",
        "import os",
    ),
]

ELSEWHERE = [
    _reads("dumps its environment", "G101", "dict(os.environ)", "import os", held_by=()),
    _reads(
        "reads its environment from the kernel",
        "G202",
        "open('/proc/self/environ').read()",
        held_by=(),
    ),
    _reads(
        "reaches the environment by a format string",
        "G401",
        "'{0.__init__.__globals__[os].environ}'.format(logging.LogRecord)",
        "import logging",
        held_by=(),
    ),
    _reads(
        "prints its environment by another program",
        "G101",
        "subprocess.check_output(['env'])",
        SPAWN,
        held_by=(),
    ),
    _reads(
        "reads the worker's environment", "G202", "open(f\"/proc/{W['worker']}/environ\").read()"
    ),
    _reads("reads the worker's arguments", "G202", "open(f\"/proc/{W['worker']}/cmdline\").read()"),
    _reads(
        "reads the worker's memory",
        "G202",
        "read()",
        """
           def read():
               with open(f"/proc/{W['worker']}/mem", "rb", 0) as file:
                   file.seek(W["address"])
                   return file.read(W["length"])
           """,
    ),
    _reads(
        "reads the worker's open files",
        "G202",
        "open(f\"/proc/{W['worker']}/fd/{W['held']}\").read()",
    ),
    _reads(
        "reads through the worker's root",
        "G202",
        "open(f\"/proc/{W['worker']}/root{W['secret']}\").read()",
    ),
    _reads(
        "lists the worker's working folder",
        "G101",
        "os.listdir(f\"/proc/{W['worker']}/cwd/\")",
        "import os",
    ),
    _reads(
        "reads its parent's environment",
        "G202",
        "read()",
        """
           def read():
               with open("/proc/self/status") as file:
                   parent = next(l.split()[1] for l in file if l.startswith("PPid"))
               return open(f"/proc/{parent}/environ").read()
           """,
    ),
    _reads(
        "copies the worker's memory",
        "G101",
        "read()",
        LIBC
        + """
class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

def read():
    buffer = ctypes.create_string_buffer(W["length"])
    here = Vector(ctypes.addressof(buffer), W["length"])
    there = Vector(W["address"], W["length"])
    call("process_vm_readv", W["worker"], ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return buffer.raw
""",
        held_by=("seccomp", "pid_namespace"),
    ),
    _reads(
        "takes a descriptor from the worker",
        "G101",
        "os.pread(call('pidfd_getfd', os.pidfd_open(W['worker']), W['held'], 0), 99, 0)",
        LIBC,
        held_by=("seccomp", "pid_namespace"),
    ),
    _reads(
        "has the loader run a program that reads",
        "G101",
        "run()",
        SPAWN
        + """
import glob, shutil
def run():
    shutil.copy(shutil.which("cat"), "tool")
    loader = (glob.glob("/lib64/ld-linux*") + glob.glob("/lib/ld-linux*"))[0]
    return subprocess.check_output([loader, os.path.abspath("tool"), W["secret"]])
""",
    ),
]

CORPUS = [*READS, *ELSEWHERE]
